"""Both towers as ONNX graphs, checked by onnxruntime, that ``cloob.load_model`` and any ONNX runtime run."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, one_line, require
from cloob.export.exported import Exported, quiet
from cloob.export.programs.int8 import measured, open_sets, quantise
from cloob.export.programs.towers import Tower, checked, exportable, worst_difference
from cloob.models.encoder import DualEncoder
from cloob.models.onnx.contents import IMAGE_FILE, TEXT_FILE
from cloob.models.onnx.folder import write_config
from cloob.models.onnx.session import Graph
from cloob.models.onnx.tokens import store_tokenizer, tokenizer_note
from cloob.models.runs import ONNX_FILE

OPSET = 20
"""Of the standard's versions the first with GELU as one operator; onnxruntime runs it since 1.17."""
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
    """Writes the graphs of both towers into a folder, with the tokenizer and ``onnx.json``.

    Args:
        encoder: On the CPU, in float32.
        folder: An empty folder.
        int8: Whether the weights of matrix products are stored as 8-bit integers, and products computed in them.
        sets: Labelled sets to measure the export on, in float32 and in int8; with ``int8`` alone.

    Raises:
        InputError: The towers cannot be exported, or the graphs do not compute what they do.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")
    opened = open_sets(sets) if int8 else []
    with exportable(encoder) as towers, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-onnx-") as plain:
        place = Path(plain) if int8 else folder
        worst = {tower.kind: _export(encoder, tower, place) for tower in towers}
        _complete(encoder, place, towers[1].pad, "float32")
        if not int8:
            return _summarise(encoder, folder, worst)
        off = {}
        for tower, name in zip(towers, (IMAGE_FILE, TEXT_FILE), strict=True):
            quantise(place / name, folder / name)
            off[tower.kind] = worst_difference(tower, _runner(folder / name, encoder))
        _complete(encoder, folder, towers[1].pad, "int8")
        return _summarise(encoder, folder, off, measured(place, folder, opened))


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's graph and checks it; returns how much an entry of its rows is off at most."""
    ends = ("pixel_values", "image_embeds") if tower.kind == "image" else ("input_ids", "text_embeds")
    path = folder / (IMAGE_FILE if tower.kind == "image" else TEXT_FILE)
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
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
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


def _runner(path: Path, encoder: DualEncoder) -> Callable[[Tensor], Tensor]:
    """A graph as a function of torch's tensors."""
    graph = Graph(path, encoder.embed_dim)
    return lambda items: torch.from_numpy(graph(items.numpy()))


def _complete(encoder: DualEncoder, folder: Path, pad: int | None, precision: str) -> None:
    """Writes what an ONNX folder has beside its graphs."""
    tokenizer = store_tokenizer(encoder.tokenizer, folder, encoder.context_length)
    write_config(folder, encoder, precision=precision, pad=pad, tokenizer=tokenizer)


def _strip_metadata(model: Any) -> None:
    """Removes source locations, which contain local paths."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _summarise(encoder: DualEncoder, folder: Path, worst: dict[str, float], costs: Sequence[str] = ()) -> Exported:
    """What the card says of the folder."""
    config = json.loads((folder / ONNX_FILE).read_text(encoding="utf-8"))
    images, texts = worst["image"], worst["text"]
    if config["precision"] == "int8":
        notes = [
            "Matrix products run in 8-bit integers, activations quantised as they come; convolutions stay in float32.",
            f"Entries of unit rows differ from the model's by up to {images:.1g} (images) and {texts:.1g} (texts).",
        ]
        notes += [f"What that costs, by `cloob eval`: {cost}." for cost in costs]
    else:
        notes = [f"Checked by onnxruntime: unit rows equal the model's to {max(images, texts):.0e}."]
    if config["pad"] is None:
        notes.append(f"`{TEXT_FILE}` takes {encoder.context_length} tokens, padding included.")
    else:
        notes.append(f"`{TEXT_FILE}` also takes rows without the padding that all of them share ({config['pad']}).")
    notes.append(tokenizer_note(config["tokenizer"]))
    summary = "cloob.load_model and any ONNX runtime read it"
    return Exported("onnx", summary, _USAGE, tuple(notes), ("onnx",))
