"""The text tower of open_clip's own kind by onnxruntime, without torch.

A question of words needs one text row. Torch and open_clip take seconds to import for
it, onnxruntime a tenth of one. So the first process that loads a model writes down the
graph of its text tower (some 60 KB): the weights stay where they lie, in the model's
safetensors file, and the graph names their places in it. The rows of the graph are
compared with those of the loaded model before it is kept, and a graph is used only as
long as its weights file is unchanged.

The graph is open_clip's ``TextTransformer`` (pre-norm blocks, causal attention, the row
at the end token, a projection). A model that is anything else has no graph; torch
serves it.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.models.importing import read_json, translated
from cloob.models.onnx import Array, Graph, unit_rows
from cloob.models.runs import CHECKPOINTS_FOLDER, CONFIG_FILE, chosen_checkpoint
from cloob.models.source import ModelSource, file_stamp
from cloob.models.tokenizer import ClipTokenizer, read_tokenizer, store_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

    from cloob.models.encoder import DualEncoder

    Pictures = Callable[[Sequence[Image]], Array]

FORMAT = 1
_GRAPH_FILE = "text.onnx"
_NOTES_FILE = "text.json"
_OPSET = 20
_TEXT_SETTINGS = {"context_length", "vocab_size", "width", "heads", "layers"}
_TOLERANCE = 1e-5  # of a unit row, between the graph and the loaded model
_PROBES = (
    "a red bird",
    "Two dogs & a cat on a very old wooden boat in the harbour, seen from above.",
)


class TextGraph:
    """Texts to (n, D) unit rows by the kept graph of a model.

    Args:
        folder: What :func:`keep_text_graph` wrote.
        pictures: Embeds upright pictures, which the graph cannot: the loaded model.
    """

    def __init__(self, folder: Path, pictures: Pictures) -> None:
        notes = read_json(folder / _NOTES_FILE)
        self.weights = Path(notes["weights"])
        if notes["format"] != FORMAT or notes["stamp"] != _stamp(self.weights):
            raise InputError(f"{self.weights}: changed since its graph was written")
        if not (folder / _GRAPH_FILE).is_file():
            raise InputError(f"{folder}: holds no graph")
        self._graph = Graph(
            folder / _GRAPH_FILE, notes["embed_dim"], pad=0, weights=self.weights.parent
        )
        self._tokenizer = read_tokenizer(
            folder / _NOTES_FILE, notes["tokenizer"], notes["context_length"]
        )
        self.pictures = pictures

    def texts(self, texts: Sequence[str]) -> Array:
        return unit_rows(self._graph(self._tokenizer.ids(list(texts))))


def open_text_graph(
    source: str, fingerprint: str, pictures: Pictures
) -> TextGraph | None:
    """The kept graph of the model that had this fingerprint; None where torch has to
    do, as where the source leads to other weights by now.
    """
    folder = _kept_folder(fingerprint)
    if not (folder / _NOTES_FILE).is_file():
        return None
    try:
        graph = TextGraph(folder, pictures)
        return graph if _leads_to(source, graph.weights) else None
    except (InputError, OSError, KeyError):
        return None  # of other weights, of another version, or damaged


def keep_text_graph(
    source: str,
    fingerprint: str,
    encoder: DualEncoder,
    texts: Callable[..., Any],
) -> bool:
    """Writes the graph of a loaded model into the cache.

    Args:
        source: What the model was loaded from, as for ``cloob.load_model``.
        fingerprint: The model's.
        encoder: The loaded model.
        texts: Embeds a list of texts by it: (n, D) unit rows.

    Returns:
        Whether there is a graph now. A model of another kind, one whose weights were
        written a moment ago, or a cache that cannot be written, has none.
    """
    target = _kept_folder(fingerprint)
    if open_text_graph(source, fingerprint, texts) is not None:
        return True
    tower = _find_tower(source)
    if tower is None or not isinstance(encoder.tokenizer, ClipTokenizer):
        return False
    stamp = _stamp(tower.weights)
    if stamp is None:
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as place:
            folder = Path(place)
            _write(folder, tower, encoder, stamp)
            if not _agrees(TextGraph(folder, texts), texts):
                return False
            shutil.rmtree(target, ignore_errors=True)  # of weights that have changed
            folder.rename(target)  # whole, or not at all
    except OSError:
        return False
    return True


def _leads_to(source: str, weights: Path) -> bool:
    """Whether a run still stands for the checkpoint with these weights, and a folder
    for itself.
    """
    parsed = ModelSource.parse(source)
    if parsed.kind != "folder" or parsed.path is None:
        return True  # what the hub's cache holds has the stamp of its file
    folder = parsed.path
    if parsed.variant or (folder / CHECKPOINTS_FOLDER).is_dir():
        folder = chosen_checkpoint(folder, parsed.variant)
    return weights.is_relative_to(folder.resolve())


def _kept_folder(fingerprint: str) -> Path:
    return cache_root() / "texts" / fingerprint


def _stamp(weights: Path) -> Any:
    """What tells whether the weights were changed, as JSON gives it back."""
    if not weights.is_file():
        return None
    return json.loads(json.dumps(file_stamp([weights])))


def _agrees(graph: TextGraph, texts: Callable[..., Any]) -> bool:
    try:
        difference = np.abs(graph.texts(_PROBES) - texts(list(_PROBES))).max()
    except InputError:  # onnxruntime cannot run it
        return False
    return bool(difference < _TOLERANCE)


def _write(folder: Path, tower: _TextTower, encoder: DualEncoder, stamp: Any) -> None:
    (folder / _GRAPH_FILE).write_bytes(tower.graph())
    length = encoder.context_length
    notes = {
        "format": FORMAT,
        "weights": str(tower.weights),
        "stamp": stamp,
        "embed_dim": encoder.embed_dim,
        "context_length": length,
        "tokenizer": store_tokenizer(encoder.tokenizer, folder, length),
    }
    (folder / _NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")


def _find_tower(source: str) -> _TextTower | None:
    """The text tower of a loaded model: in its folder, or in the hub's cache."""
    from cloob.models.load import find_model_folder  # torch, which has loaded it

    folder = find_model_folder(source)
    parsed = ModelSource.parse(source)
    places = [folder] if folder else [path.parent for path in parsed.files()]
    files = {path for place in places for path in place.glob("[!.]*.safetensors")}
    if len(files) != 1:
        return None
    [weights] = files
    if parsed.kind == "towers":
        return _TextTower.read(_registered_config(parsed), weights)
    config = weights.parent / CONFIG_FILE
    if not config.is_file():
        return None
    return _TextTower.read(read_json(config)["model_cfg"], weights)


def _registered_config(source: ModelSource) -> dict[str, Any]:
    """open_clip's own configuration of NAME/TAG."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(source.name)
    pretrained = open_clip.get_pretrained_cfg(source.name, source.variant) or {}
    quick = config.get("quick_gelu", False) or pretrained.get("quick_gelu", False)
    return config | {"quick_gelu": quick}


@dataclass(frozen=True)
class _TextTower:
    """A text tower of open_clip's own kind in a model folder."""

    model_cfg: dict[str, Any]
    weights: Path  # safetensors, with its links resolved
    entries: dict[str, Any]  # name to dtype, shape, data_offsets
    data_start: int  # where the tensors' bytes begin in the file
    prefix: str  # of the tower's names

    @classmethod
    def read(cls, model_cfg: dict[str, Any], weights: Path) -> _TextTower | None:
        """The tower with these weights; None if it is of another kind."""
        if not model_cfg["text_cfg"].keys() <= _TEXT_SETTINGS:
            return None
        weights = weights.resolve()
        with translated(f"{weights}: no safetensors"), weights.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        prefix = "text." if model_cfg.get("custom_text") else ""
        tower = cls(model_cfg, weights, entries, 8 + length, prefix)
        return tower if tower.is_float32() else None

    def is_float32(self) -> bool:
        parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
        names = tuple(self.prefix + part for part in (*parts, "text_projection"))
        taken = [key for key in self.entries if key.startswith(names)]
        return bool(taken) and all(self.entries[key]["dtype"] == "F32" for key in taken)

    def graph(self) -> bytes:
        """The graph: ``input_ids`` int64 (n, L) to ``text_embeds`` float32 (n, D)."""
        text = self.model_cfg["text_cfg"]
        heads = text["heads"]
        width = text["width"]
        graph = _GraphWriter(self)
        count = graph.add("Shape", "input_ids", start=0, end=1)
        length = graph.add("Shape", "input_ids", start=1, end=2)
        flat = graph.constant([-1, width])

        x = _embedded_tokens(graph, length)
        x = graph.add("Reshape", x, flat)
        mask = _causal_mask(graph, length, text.get("context_length", 77))
        split = graph.add(
            "Concat", count, length, graph.constant([3, heads, width // heads]), axis=0
        )
        scale = graph.constant(np.float32((width // heads) ** -0.5))
        for layer in range(text["layers"]):
            block = f"transformer.resblocks.{layer}."
            normed = graph.layer_norm(x, f"{block}ln_1")
            joined = graph.linear(normed, f"{block}attn.in_proj", separator="_")
            joined = graph.add("Reshape", joined, split)
            mixed = _attention(graph, joined, mask, scale)
            mixed = graph.add("Reshape", mixed, flat)
            x = graph.add("Add", x, graph.linear(mixed, f"{block}attn.out_proj"))
            normed = graph.layer_norm(x, f"{block}ln_2")
            hidden = graph.linear(normed, f"{block}mlp.c_fc")
            hidden = graph.gelu(hidden, quick=self.model_cfg.get("quick_gelu", False))
            x = graph.add("Add", x, graph.linear(hidden, f"{block}mlp.c_proj"))

        rows = graph.add("Concat", count, length, graph.constant([width]), axis=0)
        x = graph.add("Reshape", x, rows)
        end = graph.add("ArgMax", "input_ids", axis=1, keepdims=1)
        x = graph.add("GatherND", x, end, batch_dims=1)
        x = graph.layer_norm(x, "ln_final")
        embeds = graph.add("MatMul", x, graph.weight("text_projection"))
        return graph.serialised(embeds, self.model_cfg["embed_dim"])


def _embedded_tokens(graph: _GraphWriter, length: str) -> str:
    zero = graph.constant([0])
    table = graph.weight("positional_embedding")
    places = graph.add("Slice", table, zero, length, zero)
    tokens = graph.add("Gather", graph.weight("token_embedding.weight"), "input_ids")
    return graph.add("Add", tokens, places)


def _causal_mask(graph: _GraphWriter, length: str, context_length: int) -> str:
    """−inf above the diagonal, (L, L)."""
    square = np.full((context_length, context_length), -np.inf, np.float32)
    corner = graph.add("Concat", length, length, axis=0)
    origin = graph.constant([0, 0])
    axes = graph.constant([0, 1])
    return graph.add("Slice", graph.constant(np.triu(square, 1)), origin, corner, axes)


def _attention(graph: _GraphWriter, joined: str, mask: str, scale: str) -> str:
    """(n, L, 3, heads, d) to (n, L, heads, d)."""
    joined = graph.add("Transpose", joined, perm=[2, 0, 3, 1, 4])
    query, key, value = (
        graph.add("Gather", joined, graph.constant(np.int64(part)), axis=0)
        for part in range(3)
    )
    turned = graph.add("Transpose", key, perm=[0, 1, 3, 2])
    scores = graph.add("MatMul", graph.add("Mul", query, scale), turned)
    weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    read = graph.add("MatMul", weights, value)
    return graph.add("Transpose", read, perm=[0, 2, 1, 3])


@dataclass
class _GraphWriter:
    """Collects the nodes and tensors of a graph; names are of values in it."""

    tower: _TextTower
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator; returns the name of what it gives."""
        from onnx import helper

        output = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"constant{len(self.tensors)}"
        array: npt.NDArray[Any] = np.asarray(value)
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        """A tensor of the weights file, by its place there."""
        from onnx import TensorProto

        name = self.tower.prefix + name
        if name not in self.tensors:
            entry = self.tower.entries[name]
            start, end = entry["data_offsets"]
            place = {
                "location": self.tower.weights.name,
                "offset": self.tower.data_start + start,
                "length": end - start,
            }
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT)
            tensor.dims.extend(entry["shape"])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self.tensors[name] = tensor
        return name

    def linear(self, x: str, name: str, separator: str = ".") -> str:
        matrix = self.weight(f"{name}{separator}weight")
        bias = self.weight(f"{name}{separator}bias")
        return self.add("Gemm", x, matrix, bias, transB=1)

    def layer_norm(self, x: str, name: str) -> str:
        scale = self.weight(f"{name}.weight")
        bias = self.weight(f"{name}.bias")
        kind = "LayerNormalization"
        return self.add(kind, x, scale, bias, axis=-1, epsilon=1e-5)

    def gelu(self, x: str, *, quick: bool) -> str:
        """GELU; OpenAI's quick form is x·sigmoid(1.702·x)."""
        if not quick:
            return self.add("Gelu", x)
        scaled = self.add("Mul", x, self.constant(np.float32(1.702)))
        return self.add("Mul", x, self.add("Sigmoid", scaled))

    def serialised(self, output: str, embed_dim: int) -> bytes:
        from onnx import TensorProto, helper

        ids = helper.make_tensor_value_info(
            "input_ids", TensorProto.INT64, ["n", "length"]
        )
        rows = helper.make_tensor_value_info(
            output, TensorProto.FLOAT, ["n", embed_dim]
        )
        graph = helper.make_graph(
            self.nodes, "text", [ids], [rows], list(self.tensors.values())
        )
        opset = helper.make_opsetid("", _OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        return bytes(model.SerializeToString())
