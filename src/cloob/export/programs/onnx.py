"""Both towers as ONNX graphs, checked by onnxruntime, that ``cloob.load_model`` and any ONNX runtime run."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, one_line
from cloob.evaluation.sets.labelled import open_labelled
from cloob.export.exported import Exported, check_packages, quiet
from cloob.export.programs.int8 import measured, quantise
from cloob.export.programs.towers import Tower, checked, exportable, worst_difference
from cloob.models.encoder import DualEncoder
from cloob.models.onnx.plain import IMAGE_FILE, TEXT_FILE, Graph, write_config
from cloob.models.onnx.tokens import tokenizer_note

OPSET = 20
"""Of the standard's versions the first with GELU as one operator; onnxruntime runs it since 1.17."""
DEFAULT_SET = "demo:noto-emoji"
"""Measured on where no set is given: it comes with the package."""
_FILES = {"image": IMAGE_FILE, "text": TEXT_FILE}
_USAGE = """```python
import cloob

model = cloob.load_model("DIR")  # onnxruntime runs it; no towers of torch's are built
rows = model.encode_text(["a photo of a dog"])
```

`image.onnx` takes `pixel_values` (n, 3, H, W), normalised by `preprocess_cfg` in `onnx.json`, and gives `image_embeds`;
`text.onnx` takes `input_ids` (n, L) and gives `text_embeds`: unit rows both. Their weights lie in `image.onnx.data` and
`text.onnx.data`, which have to stay beside them. `tokenizer.json` is for the package `tokenizers`.

Without cloob and torch, where `onnx.json` says `resize_mode` `shortest`:

```py
import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder, pictures, texts = Path("DIR"), ["cat.jpg", "dog.jpg"], ["a photo of a cat", "a photo of a dog"]
settings = json.loads((folder / "onnx.json").read_text())["preprocess_cfg"]
size, resample = settings["size"], Image.Resampling[settings["interpolation"].upper()]


def pixels(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    shorter = min(image.size)
    image = image.resize([size * side // shorter for side in image.size], resample)
    left, top = (round((side - size) / 2) for side in image.size)
    rows = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return ((rows - settings["mean"]) / settings["std"]).astype(np.float32).transpose(2, 0, 1)


def run(graph, values):
    session = InferenceSession(folder / graph)
    return session.run(None, {session.get_inputs()[0].name: values})[0]


tokens = [row.ids for row in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]
images = run("image.onnx", np.stack([pixels(path) for path in pictures]))
print(images @ run("text.onnx", np.array(tokens)).T)
```
"""


def export_onnx(encoder: DualEncoder, folder: Path, *, int8: bool = False, sets: Sequence[str] = ()) -> Exported:
    """Writes the graphs of both towers into a folder, with the tokenizer and ``onnx.json``."""
    check_packages("onnx")
    opened = [open_labelled(name) for name in sets or (DEFAULT_SET,)] if int8 else []
    with exportable(encoder) as towers, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-onnx-") as plain:
        place, pad = Path(plain) if int8 else folder, towers[1].pad
        worst = max(_export(encoder, tower, place) for tower in towers)
        config = write_config(place, encoder, precision="float32", pad=pad)
        notes = [f"Checked by onnxruntime: unit rows equal the model's to {worst:.0e}."]
        if int8:
            images, texts = (_quantise(encoder, tower, place, folder) for tower in towers)
            config = write_config(folder, encoder, precision="int8", pad=pad)
            notes = [
                "Matrix products run in 8-bit integers, activations quantised as they come; convolutions in float32.",
                f"Entries of unit rows differ from the model's by up to {images:.1g} (images) and {texts:.1g} (texts).",
                *(f"What that costs, by `cloob eval`: {cost}." for cost in measured(place, folder, opened)),
            ]
    if pad is None:
        notes.append(f"`{TEXT_FILE}` takes {encoder.context_length} tokens, padding included.")
    else:
        notes.append(f"`{TEXT_FILE}` also takes rows without the padding that all of them share ({pad}).")
    notes.append(tokenizer_note(config["tokenizer"]))
    summary = "cloob.load_model and any ONNX runtime read it"
    return Exported("onnx", summary, _USAGE, tuple(notes), ("onnx",))


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's graph and checks it; returns how much an entry of its rows is off at most."""
    ends = ("pixel_values", "image_embeds") if tower.kind == "image" else ("input_ids", "text_embeds")
    path = folder / _FILES[tower.kind]
    try:
        with quiet():
            program: Any = torch.onnx.export(
                tower.module,
                tower.example(),
                dynamo=True,
                dynamic_shapes=tower.dynamic_shapes(),
                input_names=ends[:1],
                output_names=ends[1:],
                opset_version=OPSET,
                verbose=False,
            )
            _strip_metadata(program.model)
    except Exception as error:  # torch's, onnxscript's and onnx's have no common class
        while isinstance(error.__cause__, Exception):
            error = error.__cause__  # the exporter wraps it in pages of advice
        reason = one_line(error, 200)
        raise InputError(f"{encoder.name}: torch.onnx cannot export its {tower.kind} tower ({reason})") from None
    try:
        with quiet():
            program.save(path, external_data=True)  # which onnxruntime maps: a session opens in a third of the time
    except OSError as error:
        if error.errno is None:  # numpy's, of fewer bytes written than there are
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise
    return checked(encoder.name, tower, _runner(path, encoder))


def _quantise(encoder: DualEncoder, tower: Tower, source: Path, target: Path) -> float:
    """Writes one tower's graph in int8; returns how much an entry of its rows is off at most."""
    name = _FILES[tower.kind]
    quantise(source / name, target / name)
    return worst_difference(tower, _runner(target / name, encoder))


def _runner(path: Path, encoder: DualEncoder) -> Callable[[Tensor], Tensor]:
    """A graph as a function of torch's tensors."""
    graph = Graph(path, encoder.embed_dim)
    return lambda items: torch.from_numpy(graph(items.numpy()))


def _strip_metadata(model: Any) -> None:
    """Removes source locations, which contain local paths."""
    nodes = list(model.graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    values += [*model.graph.inputs, *model.graph.initializers.values()]
    for part in (model, model.graph, *nodes, *values):
        part.metadata_props.clear()
    for node in nodes:
        node.doc_string = None
