"""Both towers as ONNX graphs, checked by onnxruntime, that ``cloob.load_model`` and any
ONNX runtime run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError, needs, one_line, require
from cloob.export.exported import (
    Exported,
    quiet,
    tokenizer_note,
    usage_of,
    write_json,
)
from cloob.models.aligned.encoders import TextEncoder
from cloob.models.encoder import DualEncoder, causal_features, causal_tower
from cloob.models.onnx import FORMAT, Graph, graph_file
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import TokenizerSettings, store_tokenizer

with needs("export"):
    import onnx_ir
    import onnxscript  # noqa: F401
    from onnx_ir.passes import common as passes

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
_ENDS = {
    "image": ("pixel_values", "image_embeds"),
    "text": ("input_ids", "text_embeds"),
}
_NOTES: dict[str, str] = json.loads(
    (Path(__file__).parent / "usage" / "onnx.json").read_text(encoding="utf-8")
)
OPSET = 20  # the first with GELU as one operator; onnxruntime runs it since 1.17


@torch.no_grad()
def export_onnx(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the graphs of both towers into a folder, with the tokenizer and
    ``onnx.json``.
    """
    require("onnxruntime", "export")  # before a minute of work
    towers = towers_of(encoder)
    (folder / "onnx").mkdir()
    worst = max(_export(encoder, tower, folder) for tower in towers)
    pad = towers[1].pad
    settings = store_tokenizer(encoder.tokenizer, folder, encoder.context_length)
    _write_config(folder, encoder, settings, pad=pad)
    length = "whole" if pad is None else "padded"
    notes = (
        _NOTES["checked"].format(worst),
        _NOTES[length].format(pad=pad, length=encoder.context_length),
        tokenizer_note(settings),
    )
    summary = "cloob.load_model and any ONNX runtime read it"
    return Exported("onnx", summary, usage_of("onnx"), notes, ("onnx",))


def _graphs_digest(folder: Path) -> str:
    """SHA-256 of both towers' graphs with their weights."""
    graphs = [graph_file(folder, kind) for kind in ("image", "text")]
    weights = [path.with_name(f"{path.name}_data") for path in graphs]
    state = hashlib.sha256()
    for path in [*graphs, *filter(Path.is_file, weights)]:
        with path.open("rb") as opened:
            state.update(hashlib.file_digest(opened, "sha256").digest())
    return state.hexdigest()


def _write_config(
    folder: Path, encoder: DualEncoder, settings: TokenizerSettings, *, pad: int | None
) -> None:
    """Writes ``onnx.json``, after the graphs and the tokenizer; texts may lack the
    padding ``pad``.
    """
    content = {
        "format": FORMAT,
        "name": encoder.name,
        "embed_dim": encoder.embed_dim,
        "context_length": encoder.context_length,
        "logit_scale": float(encoder.model.logit_scale.detach()),
        "pad": pad,
        "preprocess_cfg": encoder.preprocess_cfg,
        "tokenizer": settings,
        "fingerprint": _graphs_digest(folder),
    }
    write_json(folder / ONNX_FILE, content)


def _save(model: onnx_ir.Model, path: Path) -> None:
    """Writes a graph; weights next to it are mapped, so that it opens in a third of the
    time.
    """
    onnx_ir.save(model, path, external_data=f"{path.name}_data")


def _export(encoder: DualEncoder, tower: Tower, folder: Path) -> float:
    """Writes one tower's graph and checks it; returns how much an entry of its rows is
    off at most.
    """
    path = graph_file(folder, tower.kind)
    sizes = {0: torch.export.Dim(f"{tower.kind}s", min=1)}
    example = tower.samples[:2]
    # texts one token short, as no size is to be met by chance
    if tower.pad is not None:
        sizes[1] = torch.export.Dim("length", min=2, max=example.shape[1])
        example = example[:, :-1].contiguous()
    source, target = _ENDS[tower.kind]
    with _translated(
        f"{encoder.name}: torch.onnx cannot export its {tower.kind} tower"
    ):
        program = torch.onnx.export(
            tower.module,
            (example,),
            dynamo=True,
            dynamic_shapes=(sizes,),
            input_names=[source],
            output_names=[target],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        passes.RemoveUnusedNodesPass()(program.model)  # the other tower's weights
        # Source locations hold local paths.
        passes.ClearMetadataAndDocStringPass()(program.model)
        _save(program.model, path)
    return worst_difference(encoder.name, tower, _runner(path, encoder))


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Keeps exporters silent, and makes one line of what torch, onnx and the runtime
    raise.
    """
    try:
        with quiet():
            yield
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
    # the padding that texts may come without; None: they have L tokens
    pad: int | None = None


class _Rows(nn.Module):
    """One tensor to unit rows by the ``encode`` of a model."""

    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, items: Tensor) -> Tensor:
        return F.normalize(self.encode(items), dim=-1)


def _text_rows(encoder: DualEncoder) -> tuple[_Rows, int | None]:
    """The text tower, and the padding that tokens may lack; None if they may not."""
    model = encoder.model
    causal = causal_tower(model, encoder.context_length)
    if causal is not None:
        tower = model.get_submodule(causal)
        return _Rows(tower, partial(causal_features, tower)), 0
    text = getattr(model, "text", None)
    if isinstance(text, TextEncoder):

        def encode(tokens: Tensor) -> Tensor:
            rows: Tensor = model.text_head(text.pooled(tokens))
            return rows

        return _Rows(model, encode), text.pad
    return _Rows(model, model.encode_text), None


def towers_of(encoder: DualEncoder) -> tuple[Tower, Tower]:
    """The image tower and the text tower of an encoder on the CPU in float32, which is
    in eval mode afterwards.
    """
    encoder.check_weights()
    encoder.eval()
    images = _pictures(encoder)
    tokens = _tokens(encoder)
    with torch.no_grad():
        image_rows, text_rows = encoder(images, tokens)
    encoder.set_channels_last(False)
    image = _Rows(encoder.model, encoder.model.encode_image)
    text, pad = _text_rows(encoder)
    return (
        Tower("image", image.eval(), images, image_rows),
        Tower("text", text.eval(), tokens, text_rows, pad),
    )


def _pictures(encoder: DualEncoder) -> Tensor:
    """Seven pictures on which a graph and its tower are compared."""
    size = encoder.image_size
    return torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))


def _tokens(encoder: DualEncoder) -> Tensor:
    """Seven texts likewise."""
    try:
        return encoder.tokenizer(list(_TEXTS))
    except InputError:  # a model that takes tokens alone
        text = getattr(encoder.model, "text", encoder.model)
        words = text.token_embedding.num_embeddings
        shape = (len(_TEXTS), encoder.context_length)
        return torch.randint(
            1, words, shape, generator=torch.Generator().manual_seed(0)
        )


@torch.no_grad()
def worst_difference(name: str, tower: Tower, run: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of an entry between a graph's rows and the encoder's;
    InputError above ``TOLERANCE``.

    For 1, 2 and 7 items, and for texts that may come without padding at the length of
    the longest.
    """
    batches = [tower.samples[:n] for n in (1, 2, 7)]
    if tower.pad is not None:
        batches += [_without_padding(batch, tower.pad) for batch in batches]
    worst = 0.0
    for batch in batches:
        off = (run(batch) - tower.expected[: len(batch)]).abs()
        worst = max(worst, float(off.nan_to_num(torch.inf).max()))
    if worst > TOLERANCE:
        raise InputError(
            f"{name}: the exported {tower.kind} tower is off by {worst:.1g} (at most"
            f" {TOLERANCE:.0e}); nothing is written"
        )
    return worst


def _without_padding(tokens: Tensor, pad: int) -> Tensor:
    """Texts at the length of the longest, at least two tokens."""
    is_text = (tokens != pad).any(dim=0)
    length = int(is_text.nonzero().max()) + 1
    return tokens[:, : max(length, 2)].contiguous()
