"""Both towers as ONNX graphs, checked by onnxruntime, that ``cloob.load_model`` and any ONNX runtime run."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, one_line, require
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled
from cloob.evaluation.suite import evaluate
from cloob.export.exported import Exported, quiet
from cloob.export.towers import Tower, towers_of, worst_difference
from cloob.export.transformers import processor_config
from cloob.models.encoder import DualEncoder
from cloob.models.onnx import Graph, graph_file, write_config
from cloob.models.tokens import tokenizer_note

OPSET = 20  # the first with GELU as one operator; onnxruntime runs it since 1.17
_USAGE = """```python
import cloob

model = cloob.load_model("DIR")  # onnxruntime runs it; no towers of torch's are built
rows = model.encode_text(["a photo of a dog"])
```

In `onnx/`, `vision_model.onnx` takes `pixel_values` (n, 3, H, W), normalised by `preprocess_cfg` in `onnx.json`, and
gives `image_embeds`; `text_model.onnx` takes `input_ids` (n, L) and gives `text_embeds`: unit rows both. `model.onnx`
takes both and gives `logits_per_image` too. `tokenizer.json` is for the package `tokenizers`. With transformers.js:

```js
import { env, pipeline } from "@huggingface/transformers";

env.allowLocalModels = true; // DIR lies in /models/ of the same site
const classify = await pipeline("zero-shot-image-classification", "DIR", { dtype: "fp32" });
console.log(await classify("picture.jpg", ["a dog", "a cat"]));
```

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
images = run("onnx/vision_model.onnx", np.stack([pixels(path) for path in pictures]))
print(images @ run("onnx/text_model.onnx", np.array(tokens)).T)
```
"""


@torch.no_grad()
def export_onnx(encoder: DualEncoder, folder: Path, *, int8: bool = False, sets: Sequence[str] = ()) -> Exported:
    """Writes the graphs of both towers into a folder, with the tokenizer and ``onnx.json``."""
    opened = [open_labelled(name) for name in sets or ("demo:noto-emoji",)] if int8 else []
    towers = towers_of(encoder)
    pad = towers[1].pad
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-onnx-") as plain:
        place = Path(plain) if int8 else folder
        for target in {place, folder}:
            (target / "onnx").mkdir()
        worst = max(_export(encoder, tower, place) for tower in towers)
        config = write_config(place, encoder, precision="float32", pad=pad)
        notes = [f"Checked by onnxruntime: unit rows equal the model's to {worst:.0e}."]
        if int8:
            images, texts = (_quantise(encoder, tower, place, folder) for tower in towers)
            config = write_config(folder, encoder, precision="int8", pad=pad)
            notes = [
                "Matrix products run in 8-bit integers, activations quantised as they come; convolutions in float32.",
                f"Entries of unit rows differ from the model's by up to {images:.1g} (images) and {texts:.1g} (texts).",
                *(f"What that costs, by `cloob eval`: {cost}." for cost in _costs(place, folder, opened)),
            ]
    precision = config["precision"]
    _join(folder, precision, math.exp(config["logit_scale"]))
    text = graph_file(folder, "text", precision).name
    how = f"also takes rows without the padding that all of them share ({pad})"
    if pad is None:
        how = f'takes {encoder.context_length} tokens, padding included (`padding: "max_length"`)'
    notes += [f"`{text}` {how}.", _write_settings(encoder, folder, precision), tokenizer_note(config["tokenizer"])]
    summary = "cloob.load_model, transformers.js and any ONNX runtime read it"
    usage = _USAGE.replace("fp32", "q8").replace("model.onnx", "model_quantized.onnx") if int8 else _USAGE
    return Exported("onnx", summary, usage, tuple(notes), ("onnx", "transformers.js"))


def _write_settings(encoder: DualEncoder, folder: Path, precision: str) -> str:
    """Writes what transformers.js reads beside graphs and tokenizer; returns what is to be known of its pictures."""
    beside = {"use_external_data_format": precision == "float32"}
    content = {"model_type": "clip", "architectures": ["CLIPModel"], "transformers.js_config": beside}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    processor = processor_config(encoder)
    if processor is None:
        return "transformers.js cannot prepare this model's pictures: `preprocessor_config.json` is missing."
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    return "transformers.js resizes pictures in its own way, turns none by its EXIF tag, and drops what is transparent."


def _join(folder: Path, precision: str, inv_tau: float) -> None:
    """Writes both towers as one graph with logits: the zero-shot pipeline of transformers.js wants one."""
    onnx: Any = require("onnx", "export")
    both, text = (onnx.load(graph_file(folder, kind, precision)) for kind in ("image", "text"))
    onnx.compose.add_prefix(text, "text.", rename_inputs=False, rename_outputs=False, inplace=True)
    graph, make = both.graph, onnx.helper
    for part in ("node", "initializer", "input", "output"):
        getattr(graph, part).extend(getattr(text.graph, part))
    del graph.value_info[:]
    graph.initializer.append(make.make_tensor("inv_tau", onnx.TensorProto.FLOAT, [], [inv_tau]))
    cosines = make.make_node("Einsum", ["image_embeds", "text_embeds"], ["cosines"], equation="id,td->it")
    graph.node.extend([cosines, make.make_node("Mul", ["cosines", "inv_tau"], ["logits_per_image"])])
    graph.output.append(make.make_tensor_value_info("logits_per_image", onnx.TensorProto.FLOAT, ["images", "texts"]))
    ir, path = require("onnx_ir", "export"), graph_file(folder, "both", precision)
    ir.save(ir.from_proto(both), path, external_data=f"{path.name}_data" if precision == "float32" else None)


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's graph and checks it; returns how much an entry of its rows is off at most."""
    ends = ("pixel_values", "image_embeds") if tower.kind == "image" else ("input_ids", "text_embeds")
    path = graph_file(folder, tower.kind)
    with _translated(f"{encoder.name}: torch.onnx cannot export its {tower.kind} tower"):
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
        # Source locations hold local paths. Weights beside the graph are mapped: it opens in a third of the time.
        require("onnx_ir.passes.common", "export").ClearMetadataAndDocStringPass()(program.model)
        require("onnx_ir", "export").save(program.model, path, external_data=f"{path.name}_data")
    return worst_difference(encoder.name, tower, _runner(path, encoder))


def _quantise(encoder: DualEncoder, tower: Tower, source: Path, target: Path) -> float:
    """Writes a graph whose matrix products run in integers; returns how much an entry of its rows is off at most.

    Weights have 7 bits: on x86 processors without VNNI a product of 8 bits with 8 bits would saturate, and figures of
    one machine would not hold on another. onnxruntime's integer convolution is slower on a CPU than that of floats.
    """
    quantization: Any = require("onnxruntime.quantization", "export")
    path = graph_file(target, tower.kind, "int8")
    with _translated(f"{encoder.name}: onnxruntime cannot quantise its {tower.kind} tower"):
        quantization.quantize_dynamic(
            graph_file(source, tower.kind),
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    return worst_difference(encoder.name, tower, _runner(path, encoder), most=math.inf)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Keeps exporters silent, and makes one line of what they raise: torch's, onnx's and the runtime's own kinds."""
    try:
        with quiet():
            yield
    except OSError:  # of the folder's disk, see whole_folder
        raise
    except Exception as error:
        while isinstance(error.__cause__, Exception):
            error = error.__cause__  # the exporter wraps it in pages of advice
        raise InputError(f"{what} ({one_line(error, 200)})") from None


def _costs(plain: Path, quantised: Path, sets: Sequence[LabelledSet]) -> Iterator[str]:
    """What quantisation costs: a sentence for each labelled set, as ``cloob eval`` measures it."""
    results = evaluate({"float32": str(plain), "int8": str(quantised)}, sets)
    for failure in results.get("failures", ()):
        raise InputError(f"{failure['set'] or failure['model']}: {failure['error']}")
    rows = {row["model"]: row["zeroshot"] for row in results["rows"]}
    for name in (data.name for data in sets):
        before, after = (100 * rows[kind][name]["acc1"] for kind in ("float32", "int8"))
        count = rows["int8"][name]["n"]
        sentence = f"zero-shot {name}, top-1 of {count:,} pictures: {before:.1f} % in float32, {after:.1f} % in int8"
        for pair in results["differences"]:
            if pair["metric"] == "acc1" and pair["set"] == name:
                sign = 1 if pair["model"] == "int8" else -1
                low, high = sorted(100 * sign * pair[end] for end in ("low", "high"))
                around = f"95 % interval {low:+.1f} … {high:+.1f}"
                sentence += f" (difference {after - before:+.1f} points, {around})"
        yield sentence


def _runner(path: Path, encoder: DualEncoder) -> Callable[[Tensor], Tensor]:
    graph = Graph(path, encoder.embed_dim)
    return lambda items: torch.from_numpy(graph(items.numpy()))
