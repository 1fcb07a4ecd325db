"""Two heads for vectors of any kind, a and b, as one encoder: what ``cloob train vectors`` makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.heads import Head
from cloob.models.aligned.members import Members, head_of
from cloob.models.aligned.model import AlignedEncoder, ModelFiles, fill_heads
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import HEADS_FILE, VECTORS_FILE

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.vectors import VectorPairs

Side = Literal["a", "b"]
_OF_PICTURES = ("preprocess", "tokenizer", "image_size", "context_length", "mean", "std")


class RowsError(InputError):
    """A model of vectors is asked for a picture or a text."""


class VectorEncoder(AlignedEncoder):
    """Two heads without encoders: rows of numbers in, unit rows out; it trains and is stored as a ``DualEncoder``."""

    on_features = True

    def __init__(self, a: Head | Members, b: Head | Members, objective: dict[str, Any] | None = None) -> None:
        nn.Module.__init__(self)  # a DualEncoder's asks for towers
        self.name = "vectors"
        self.model = nn.Module()
        self.model.image_head, self.model.text_head = a, b  # as an ``AlignedEncoder`` calls them: a stands first
        self.embed_dim: int = a.options["embed_dim"]
        self.config = EncoderConfig("vectors", self.embed_dim, 0, {"format": 1})
        self.objective_config = objective or {}

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PICTURES:
            raise RowsError("a model of vectors takes no pictures and texts, but rows: --a, --b, encode_a, encode_b")
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return next(self.parameters()).device

    def set_channels_last(self, enabled: bool) -> None:
        """Does nothing: there are no pictures."""

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``."""
        return nn.Module.train(self, mode)

    def with_heads(self, image_head: Head | Members, text_head: Head | Members) -> VectorEncoder:
        """Other heads, of a and of b."""
        return VectorEncoder(image_head, text_head, self.objective_config)

    def encode_a(self, rows: np.ndarray | Tensor, *, batch_size: int = 4096) -> Tensor:
        """Embeds vectors of the first kind, without a gradient. Mode (train, eval) is the caller's.

        Args:
            rows: (n, F) numbers of any type, also a memory-mapped array.
            batch_size: Rows that go through the head at once.

        Returns:
            (n, D) float32 unit rows.

        Raises:
            InputError: Rows of another width.
        """
        return self._encode(rows, self.model.image_head, "a", batch_size)

    def encode_b(self, rows: np.ndarray | Tensor, *, batch_size: int = 4096) -> Tensor:
        """As ``encode_a``, of the second kind."""
        return self._encode(rows, self.model.text_head, "b", batch_size)

    @torch.no_grad()
    def _encode(self, rows: np.ndarray | Tensor, head: Head | Members, side: str, batch_size: int) -> Tensor:
        from cloob.data.vectors import as_floats

        width = head.options["features"]
        if rows.ndim != 2 or rows.shape[1] != width:
            what = f"(n, {width}) is what its head was trained on"
            raise InputError(f"{side}: an array {tuple(rows.shape)} found; {what}")
        parts = [torch.zeros(0, self.embed_dim, device=self.device)]
        for start in range(0, len(rows), batch_size):
            some = as_floats(rows[start : start + batch_size]).to(self.device)
            parts.append(F.normalize(head(some), dim=1))
        return torch.cat(parts)


def embed_rows(encoder: Any, side: Side, rows: np.ndarray | Tensor) -> Tensor:
    """The (n, D) unit rows of vectors of one side, on the CPU."""
    if not isinstance(encoder, VectorEncoder):
        raise InputError(f"{encoder.name}: is no model of vectors; --a and --b are for runs of `cloob train vectors`")
    return (encoder.encode_a if side == "a" else encoder.encode_b)(rows).cpu()


def embed_pairs(encoder: Any, pairs: VectorPairs) -> tuple[Tensor, Tensor]:
    """The (N, D) unit rows of both sides of all pairs, on the CPU."""
    parts = []
    for places in np.array_split(np.arange(len(pairs)), -(-len(pairs) // 4096)):
        a, b, *_ = pairs.take(places)
        parts.append((embed_rows(encoder, "a", a), embed_rows(encoder, "b", b)))
    a, b = (torch.cat(side) for side in zip(*parts, strict=True))
    return a, b


def vector_files(encoder: DualEncoder) -> ModelFiles:
    heads = {"a": encoder.model.image_head, "b": encoder.model.text_head}
    content = {**encoder.config.settings, **{side: head.options for side, head in heads.items()}}
    return VECTORS_FILE, content, HEADS_FILE, nn.ModuleDict(heads).state_dict()


def load_vectors(folder: Path, config: dict[str, Any], objective: dict[str, Any]) -> VectorEncoder:
    """The heads of a model folder; ``config`` is what ``vectors.json`` says."""
    with torch.device("meta"):  # no memory before the file of weights has it
        heads = {side: head_of(config[side]) for side in ("a", "b")}
    fill_heads(folder, heads)
    return VectorEncoder(heads["a"], heads["b"], objective)
