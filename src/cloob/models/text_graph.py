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
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, cast

import numpy as np

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.files import whole_folder
from cloob.models.importing import read_json, translated
from cloob.models.onnx import Array, Graph, unit_rows
from cloob.models.settings import ModelConfig
from cloob.models.source import find_model_folder
from cloob.models.tokenizer import ClipTokenizer, read_tokenizer, store_tokenizer

if TYPE_CHECKING:
    from onnx import TensorProto
    from PIL.Image import Image

    from cloob.models.encoder import DualEncoder

    Pictures = Callable[[Sequence[Image]], Array]

FORMAT = 1
_GRAPH_FILE = "text.onnx"
_NOTES_FILE = "text.json"
_TEXT_SETTINGS = {"context_length", "vocab_size", "width", "heads", "layers"}
_TOLERANCE = 1e-5  # of a unit row, between the graph and the loaded model
_PROBES = (
    "a red bird",
    "Two dogs & a cat on a very old wooden boat in the harbour, seen from above.",
)

# The graph as ONNX writes it down, n texts of L tokens in blocks of width w with h
# heads. Names of weights are those of open_clip with _ for a dot; a block's are short.
_BEGINNING = Template("""
<ir_version: 10, opset_import: ["": 20]>
text (int64[n, length] input_ids) => (float[n, $embed_dim] text_embeds)
<
  int64[1] zero = {0}, int64[1] width = {$width}, int64[2] flat = {-1, $width},
  int64[3] parts = {3, $heads, $head_width},
  float scale = {$scale}, float lowest = {-1e30}, float quick = {1.702}
>
{
  count = Shape<start = 0, end = 1>(input_ids)
  length = Shape<start = 1, end = 2>(input_ids)
  places = Slice(positional_embedding, zero, length, zero)
  tokens = Gather(token_embedding_weight, input_ids)
  embedded = Add(tokens, places)
  x0 = Reshape(embedded, flat)
  square = Concat<axis = 0>(length, length)
  low = Expand(lowest, square)
  one = Constant<value_int = 1>()
  mask = Trilu<upper = 1>(low, one)
  split = Concat<axis = 0>(count, length, parts)
""")
_BLOCK = Template("""
  a$i = LayerNormalization<epsilon = 1e-5>(x$i, ${b}_ln_1_weight, ${b}_ln_1_bias)
  b$i = Gemm<transB = 1>(a$i, ${b}_attn_in_proj_weight, ${b}_attn_in_proj_bias)
  c$i = Reshape(b$i, split)
  d$i = Transpose<perm = [2, 0, 3, 1, 4]>(c$i)
  query$i, key$i, value$i = Split<axis = 0, num_outputs = 3>(d$i)
  turned$i = Transpose<perm = [0, 1, 2, 4, 3]>(key$i)
  scaled$i = Mul(query$i, scale)
  scores$i = MatMul(scaled$i, turned$i)
  masked$i = Add(scores$i, mask)
  weights$i = Softmax<axis = -1>(masked$i)
  read$i = MatMul(weights$i, value$i)
  e$i = Transpose<perm = [0, 1, 3, 2, 4]>(read$i)
  f$i = Reshape(e$i, flat)
  g$i = Gemm<transB = 1>(f$i, ${b}_attn_out_proj_weight, ${b}_attn_out_proj_bias)
  y$i = Add(x$i, g$i)
  h$i = LayerNormalization<epsilon = 1e-5>(y$i, ${b}_ln_2_weight, ${b}_ln_2_bias)
  u$i = Gemm<transB = 1>(h$i, ${b}_mlp_c_fc_weight, ${b}_mlp_c_fc_bias)
  $gelu
  w$i = Gemm<transB = 1>(v$i, ${b}_mlp_c_proj_weight, ${b}_mlp_c_proj_bias)
  x$next = Add(y$i, w$i)
""")
_GELU = Template("v$i = Gelu(u$i)")
_QUICK_GELU = Template("""
  s$i = Mul(u$i, quick)
  t$i = Sigmoid(s$i)
  v$i = Mul(u$i, t$i)
""")
_END = Template("""
  shape = Concat<axis = 0>(count, length, width)
  rows = Reshape(x$layers, shape)
  end = ArgMax<axis = 1, keepdims = 1>(input_ids)
  row = GatherND<batch_dims = 1>(rows, end)
  normed = LayerNormalization<epsilon = 1e-5>(row, ln_final_weight, ln_final_bias)
  text_embeds = MatMul(normed, text_projection)
}
""")


class TextGraph:
    """Texts to (n, D) unit rows by the graph of a model in the cache.

    Args:
        folder: What :func:`keep_text_graph` wrote.
        pictures: Embeds upright pictures, which the graph cannot: the loaded model.
    """

    def __init__(self, folder: Path, pictures: Pictures) -> None:
        notes = read_json(folder / _NOTES_FILE)
        self.weights = Path(notes["weights"])
        if notes["format"] != FORMAT or notes["stamp"] != _stamp(self.weights):
            raise InputError(f"{self.weights}: changed since its graph was written")
        graph = folder / _GRAPH_FILE
        if not graph.is_file():
            raise InputError(f"{folder}: holds no graph")
        weights_folder = self.weights.parent
        self._graph = Graph(graph, notes["embed_dim"], pad=0, weights=weights_folder)
        length = notes["context_length"]
        self._tokenizer = read_tokenizer(
            folder / _NOTES_FILE, notes["tokenizer"], length
        )
        self.pictures = pictures

    def texts(self, texts: Sequence[str]) -> Array:
        return unit_rows(self._graph(self._tokenizer.ids(list(texts))))


def open_text_graph(
    source: str, fingerprint: str, pictures: Pictures
) -> TextGraph | None:
    """The graph of the model that had this fingerprint; None where torch has to do, as
    where the source leads to other weights by now.
    """
    folder = _graph_folder(fingerprint)
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
    texts: Callable[..., Array],
) -> bool:
    """Writes the graph of a loaded model into the cache.

    Args:
        source: What the model was loaded from, as for ``cloob.load_model``.
        fingerprint: The model's.
        encoder: The loaded model.
        texts: Embeds a list of texts by it: (n, D) unit rows.

    Returns:
        Whether there is a graph now. A model of another kind has none, and
        none is where the cache cannot be written.
    """
    if open_text_graph(source, fingerprint, texts) is not None:
        return True
    weights = encoder.weights_file
    has_words = isinstance(encoder.tokenizer, ClipTokenizer)
    if weights is None or weights.suffix != ".safetensors" or not has_words:
        return False
    try:
        weights = weights.resolve()
        graph = _text_tower_graph(cast(ModelConfig, encoder.config.settings), weights)
        with whole_folder(_graph_folder(fingerprint)) as folder:
            _write(folder, graph, weights, encoder)
            rows = TextGraph(folder, texts).texts(_PROBES)
            if np.abs(rows - texts(list(_PROBES))).max() >= _TOLERANCE:
                raise InputError(f"{weights}: rows of its graph are others")
    except (InputError, OSError):  # another kind of tower, or no place for its graph
        return False
    return True


def _graph_folder(fingerprint: str) -> Path:
    return cache_root() / "texts" / fingerprint


def _stamp(file: Path) -> list[int]:
    """What tells a file from the one that it may become."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _leads_to(source: str, weights: Path) -> bool:
    """Whether a run still stands for the checkpoint with these weights, and a folder
    for itself; what the hub's cache holds has the stamp of its file.
    """
    folder = find_model_folder(source)
    return folder is None or weights.is_relative_to(folder.resolve())


def _write(folder: Path, graph: bytes, weights: Path, encoder: DualEncoder) -> None:
    (folder / _GRAPH_FILE).write_bytes(graph)
    length = encoder.context_length
    notes = {
        "format": FORMAT,
        "weights": str(weights),
        "stamp": _stamp(weights),
        "embed_dim": encoder.embed_dim,
        "context_length": length,
        "tokenizer": store_tokenizer(encoder.tokenizer, folder, length),
    }
    (folder / _NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")


def _text_tower_graph(model_cfg: ModelConfig, weights: Path) -> bytes:
    """The graph of a text tower: ``input_ids`` int64 (n, L) to ``text_embeds`` float32
    (n, D); InputError for one of another kind.
    """
    from onnx import parser

    text = model_cfg.get("text_cfg")
    if text is None or not text.keys() <= _TEXT_SETTINGS:
        raise InputError(f"{weights}: its text tower is not open_clip's own kind")
    with translated(f"{weights}: no float32 weights of a text tower"):
        prefix = "text." if model_cfg.get("custom_text") else ""
        tensors = _tensors_in_place(weights, prefix)
        model = parser.parse_model(_graph_text(model_cfg))
        initial = model.graph.initializer
        constants = {tensor.name for tensor in initial}
        inputs = {name for node in model.graph.node for name in node.input}
        for name in sorted(inputs & tensors.keys() - constants):
            initial.append(tensors[name])
        return bytes(model.SerializeToString())


def _graph_text(model_cfg: ModelConfig) -> str:
    """The text of the graph of a CLIP text tower, from templates."""
    text = model_cfg["text_cfg"]
    head_width = text["width"] // text["heads"]
    sizes = {
        "embed_dim": model_cfg["embed_dim"],
        "width": text["width"],
        "heads": text["heads"],
        "head_width": head_width,
        "scale": head_width**-0.5,
        "layers": text["layers"],
    }
    gelu = _QUICK_GELU if model_cfg.get("quick_gelu") else _GELU
    parts = [_BEGINNING.substitute(sizes)]
    for i in range(text["layers"]):
        block = f"transformer_resblocks_{i}"
        names = {"i": i, "next": i + 1, "b": block, "gelu": gelu.substitute(i=i)}
        parts.append(_BLOCK.substitute(names))
    return "".join([*parts, _END.substitute(sizes)])


def _tensors_in_place(weights: Path, prefix: str) -> dict[str, TensorProto]:
    """The float32 tensors of safetensors as ONNX names them: by their places in the
    file.
    """
    from onnx import TensorProto

    with weights.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    tensors = {}
    for key, entry in entries.items():
        if key.startswith(prefix) and entry.get("dtype") == "F32":
            name = key.removeprefix(prefix).replace(".", "_")
            start, end = entry["data_offsets"]
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT)
            tensor.dims.extend(entry["shape"])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=weights.name)
            tensor.external_data.add(key="offset", value=str(8 + length + start))
            tensor.external_data.add(key="length", value=str(end - start))
            tensors[name] = tensor
    return tensors
