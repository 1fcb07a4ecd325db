"""Both towers as ONNX graphs, checked by onnxruntime, that ``cloob.load_model`` and any
ONNX runtime run.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError, one_line, refuse, require
from cloob.export.exported import Exported, quiet, usage_of
from cloob.export.transformers import processor_config
from cloob.functional.private import MODULE_PARTS
from cloob.models.aligned.encoders import TextEncoder
from cloob.models.encoder import DualEncoder, causal_features, causal_tower
from cloob.models.onnx import Graph, graph_file, write_config
from cloob.models.tokenizer import tokenizer_note

TOLERANCE = 1e-4
"""The most that an entry of a unit row may be off; towers that are exported well are
off by 1e-6.
"""
_TEXTS = (
    "a photo of a dog",
    "",
    "Ein Mädchen & zwei Katzen — 3 Bäume!",
    "a long sentence about many things that somebody has seen on a walk by the river in"
    " the early morning " * 3,
    "x",
    "an old map of the harbour, drawn in ink",
    "🙂 smile",
)
OPSET = 20  # the first with GELU as one operator; onnxruntime runs it since 1.17


@torch.no_grad()
def export_onnx(encoder: DualEncoder, folder: Path, *, int8: bool = False) -> Exported:
    """Writes the graphs of both towers into a folder, with the tokenizer and
    ``onnx.json``.
    """
    towers = towers_of(encoder)
    pad = towers[1].pad
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-onnx-") as plain:
        place = Path(plain) if int8 else folder
        for target in {place, folder}:
            (target / "onnx").mkdir()
        worst = max(_export(encoder, tower, place) for tower in towers)
        notes = [f"Checked by onnxruntime: unit rows equal the model's to {worst:.0e}."]
        if int8:
            images, texts = (
                _quantise(encoder, tower, place, folder) for tower in towers
            )
            notes = [
                (
                    "Matrix products run in 8-bit integers, activations quantised as"
                    " they come; convolutions in float32."
                ),
                (
                    "Entries of unit rows differ from the model's by up to"
                    f" {images:.1g} (images) and {texts:.1g} (texts)."
                ),
                "`cloob eval` of both says what that costs on a labelled set.",
            ]
    precision = "int8" if int8 else "float32"
    config = write_config(folder, encoder, precision=precision, pad=pad)
    _join(folder, precision, math.exp(config["logit_scale"]))
    text = graph_file(folder, "text", precision).name
    how = f"also takes rows without the padding that all of them share ({pad})"
    if pad is None:
        how = (
            f"takes {encoder.context_length} tokens, padding included (`padding:"
            ' "max_length"`)'
        )
    # What transformers.js reads in addition to graphs and tokenizer.
    js_settings = {"use_external_data_format": precision == "float32"}
    content = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "transformers.js_config": js_settings,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    pictures = (
        "transformers.js cannot prepare this model's pictures:"
        " `preprocessor_config.json` is missing."
    )
    if processor := processor_config(encoder):
        (folder / "preprocessor_config.json").write_text(
            json.dumps(processor, indent=2), encoding="utf-8"
        )
        pictures = (
            "transformers.js resizes pictures in its way, ignores EXIF tags, and drops"
            " what is transparent."
        )
    notes += [f"`{text}` {how}.", pictures, tokenizer_note(config["tokenizer"])]
    summary = "cloob.load_model, transformers.js and any ONNX runtime read it"
    usage = usage_of("onnx")
    if int8:
        usage = usage.replace("fp32", "q8").replace(
            "model.onnx", "model_quantized.onnx"
        )
    return Exported("onnx", summary, usage, tuple(notes), ("onnx", "transformers.js"))


def _join(folder: Path, precision: str, inv_tau: float) -> None:
    """Writes both towers as one graph with logits: the zero-shot pipeline of
    transformers.js wants one.
    """
    onnx: Any = require("onnx", "export")
    both, text = (
        onnx.load(graph_file(folder, kind, precision)) for kind in ("image", "text")
    )
    onnx.compose.add_prefix(
        text, "text.", rename_inputs=False, rename_outputs=False, inplace=True
    )
    graph, make = both.graph, onnx.helper
    for part in ("node", "initializer", "input", "output"):
        getattr(graph, part).extend(getattr(text.graph, part))
    del graph.value_info[:]
    graph.initializer.append(
        make.make_tensor("inv_tau", onnx.TensorProto.FLOAT, [], [inv_tau])
    )
    cosines = make.make_node(
        "Einsum", ["image_embeds", "text_embeds"], ["cosines"], equation="id,td->it"
    )
    graph.node.extend(
        [cosines, make.make_node("Mul", ["cosines", "inv_tau"], ["logits_per_image"])]
    )
    graph.output.append(
        make.make_tensor_value_info(
            "logits_per_image", onnx.TensorProto.FLOAT, ["images", "texts"]
        )
    )
    ir, path = require("onnx_ir", "export"), graph_file(folder, "both", precision)
    ir.save(
        ir.from_proto(both),
        path,
        external_data=f"{path.name}_data" if precision == "float32" else None,
    )


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's graph and checks it; returns how much an entry of its rows is
    off at most.
    """
    ends = (
        ("pixel_values", "image_embeds")
        if tower.kind == "image"
        else ("input_ids", "text_embeds")
    )
    path = graph_file(folder, tower.kind)
    sizes = {0: torch.export.Dim(f"{tower.kind}s", min=1)}
    example = tower.samples[:2]
    # texts one token short, as no size is to be met by chance
    if tower.pad is not None:
        sizes[1] = torch.export.Dim("length", min=2, max=example.shape[1])
        example = example[:, :-1].contiguous()
    with _translated(
        f"{encoder.name}: torch.onnx cannot export its {tower.kind} tower"
    ):
        program: Any = torch.onnx.export(
            tower.module,
            (example,),
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=ends[:1],
            output_names=ends[1:],
            opset_version=OPSET,
            verbose=False,
        )
        # Source locations hold local paths. Weights next to the graph are mapped: it
        # opens in a third of the time.
        require("onnx_ir.passes.common", "export").ClearMetadataAndDocStringPass()(
            program.model
        )
        require("onnx_ir", "export").save(
            program.model, path, external_data=f"{path.name}_data"
        )
    return worst_difference(encoder.name, tower, _runner(path, encoder))


def _quantise(encoder: DualEncoder, tower: Tower, source: Path, target: Path) -> float:
    """Writes a graph whose matrix products run in integers; returns how much an entry
    of its rows is off at most.
    """
    # Weights have 7 bits: without VNNI x86 processors saturate in products of 8 bits
    # with 8 bits. Convolutions stay floats: in integers onnxruntime is slower on a CPU.
    quantization: Any = require("onnxruntime.quantization", "export")
    path = graph_file(target, tower.kind, "int8")
    with _translated(
        f"{encoder.name}: onnxruntime cannot quantise its {tower.kind} tower"
    ):
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


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Keeps exporters silent, and makes one line of what torch, onnx and the runtime
    raise.
    """
    try:
        with quiet():
            yield
    except OSError:  # of the folder's disk, see whole_folder
        raise
    except Exception as error:
        while isinstance(error.__cause__, Exception):
            error = error.__cause__  # the exporter wraps it in pages of advice
        raise InputError(f"{what} ({one_line(error, 200)})") from None


def _runner(path: Path, encoder: DualEncoder) -> Callable[[Tensor], Tensor]:
    graph = Graph(path, encoder.embed_dim)
    return lambda items: torch.from_numpy(graph(items.numpy()))


@dataclass(frozen=True)
class Tower:
    """One tower as a module of one tensor, and what it is tried with."""

    kind: str  # "image" or "text"
    module: nn.Module  # the tensor to (n, D) unit rows
    # seven items: (7, 3, H, W) float32 pixels, or (7, context length L) int64 tokens
    samples: Tensor
    expected: Tensor  # (7, D), their rows by the encoder
    pad: int | None = (
        None  # the padding that texts may come without; None: they have L tokens
    )


class _Rows(nn.Module):
    """One tensor to unit rows; tokens without ``end`` get it in their last place, as
    transformers.js cuts it off.
    """

    def __init__(self, model: Any, encode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode
        self.end: int | None = None

    def forward(self, items: Tensor) -> Tensor:
        if self.end is not None:
            cut = (items != self.end).all(1, keepdim=True)
            items = torch.cat(
                [items[:, :-1], items[:, -1:].masked_fill(cut, self.end)], 1
            )
        return F.normalize(self.encode(self.model, items), dim=-1)


def _text_rows(model: Any, context_length: int) -> tuple[_Rows, int | None]:
    """The text tower, and the padding that tokens may lack; None if they may not."""
    causal = causal_tower(model, context_length)
    if causal is not None:
        tower = model.get_submodule(causal)
        return _Rows(tower, causal_features), 0
    if isinstance(getattr(model, "text", None), TextEncoder):
        rows = _Rows(
            model, lambda model, tokens: model.text_head(model.text.pooled(tokens))
        )
        return rows, model.text.pad
    return _Rows(model, lambda model, tokens: model.encode_text(tokens)), None


def towers_of(encoder: DualEncoder) -> tuple[Tower, Tower]:
    """The image tower and the text tower of an encoder on the CPU in float32, which is
    in eval mode afterwards.
    """
    encoder.check_weights()
    images, tokens = _samples(encoder)
    encoder.eval()
    with torch.no_grad():
        image_rows, text_rows = encoder(images, tokens)
    encoder.set_channels_last(False)
    image = _Rows(
        _side(encoder.model, image=True),
        lambda model, pixels: model.encode_image(pixels),
    )
    model = _side(encoder.model, image=False)
    text, pad = _text_rows(model, encoder.context_length)
    with contextlib.suppress(InputError):  # of a model that takes tokens alone
        short, long = encoder.tokenizer(["x", "a " * encoder.context_length]).tolist()
        text.end = long[-1] if long[-1] in short else None
    return Tower("image", image.eval(), images, image_rows), Tower(
        "text", text.eval(), tokens, text_rows, pad
    )


@torch.no_grad()
def worst_difference(
    name: str, tower: Tower, run: Callable[[Tensor], Tensor], most: float = TOLERANCE
) -> float:
    """The largest difference of an entry between a graph's rows and the encoder's;
    InputError above ``most``.

    For 1, 2 and 7 items, and for texts that may come without padding at the length of
    the longest.
    """
    worst = 0.0
    for n in (1, 2, 7):
        items, tried = tower.samples[:n], [tower.samples[:n]]
        if tower.pad is not None:
            longest = int(
                ((items != tower.pad) * torch.arange(1, items.shape[1] + 1)).max()
            )
            tried.append(items[:, : max(longest, 2)].contiguous())
        for batch in tried:
            worst = max(
                worst,
                float(
                    (run(batch) - tower.expected[:n]).abs().nan_to_num(torch.inf).max()
                ),
            )
    what = f"the exported {tower.kind} tower is off by {worst:.1g} (at most {most:.0e})"
    refuse({f"{name}: {what}; nothing is written": worst > most})
    return worst


def _side(model: Any, *, image: bool) -> Any:
    """A model without the parts of the other tower, whose weights a graph would
    contain; it shares the rest.
    """
    side, of_images = copy.copy(model), ("visual", "image_head")
    for part in MODULE_PARTS:
        vars(side)[part] = {
            key: value
            for key, value in vars(model)[part].items()
            if (key in of_images) == image
        }
    return side


def _samples(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    """Pictures and tokens on which a graph and its tower are compared."""
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    noise = [
        torch.rand(1, 3, side, side, generator=generator)
        for side in (2, 3, 5, 8, 13, 21, size)
    ]
    pictures = torch.cat(
        [F.interpolate(picture, size, mode="bilinear") for picture in noise]
    )
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std)
    )
    try:
        tokens = encoder.tokenizer(list(_TEXTS))
    except InputError:  # a model that takes tokens alone
        tables = [
            module.num_embeddings
            for module in encoder.model.modules()
            if isinstance(module, nn.Embedding)
        ]
        shape = (len(_TEXTS), encoder.context_length)
        tokens = torch.randint(1, max(tables, default=2), shape, generator=generator)
    return (pictures - mean) / std, tokens
