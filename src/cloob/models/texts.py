"""Captions through a causal text tower at their own length: the same embeddings for a fraction of the work.

open_clip pads each text to the context length (77 tokens), and a caption has about ten to twenty. In a tower whose
attention is causal, and whose embedding is that of the end-of-text token, nothing after that token has a part in the
result or in a gradient. So the padding that all texts of a batch share can go: in training, where the tokens are made;
in evaluation, where texts of similar length go together.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

_SWAPPING = threading.Lock()
_STEP = 8
"""Lengths are multiples of this, so that a run meets few shapes and the kernels even ones."""


def causal_tower(model: nn.Module, context_length: int) -> str | None:
    """The name of the module in an open_clip model that holds the text tower's positions and mask.

    ``""`` for the model itself, ``"text"`` for its text tower; None where padding may have a part in the result: for
    towers without a causal mask, with a class token, or with another pooling than by the token of highest number.
    """
    text = getattr(model, "text", None)
    tower: Any = text if isinstance(text, nn.Module) else model
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask: Any = getattr(tower, "attn_mask", None)
    positions: Any = getattr(tower, "positional_embedding", None)
    known = isinstance(mask, Tensor) and isinstance(positions, nn.Parameter) and pool == "argmax"
    if not known or getattr(tower, "cls_emb", None) is not None or len(positions) != context_length:
        return None
    causal = torch.full((context_length, context_length), -torch.inf).triu(1).to(mask)
    return ("" if tower is model else "text") if torch.equal(mask, causal) else None


def trimmed(tokens: Tensor) -> Tensor:
    """(n, L) tokens on the CPU without the columns that are padding in every row, up to a multiple of 8."""
    longest = int(tokens.argmax(1).max()) + 1 if len(tokens) else 1
    length = -(-longest // _STEP) * _STEP
    return tokens if length >= tokens.shape[1] else tokens[:, :length].contiguous()


class TrimmedTokenizer:
    """A tokeniser whose batches come without the padding that all their rows share; goes to a loader's workers."""

    def __init__(self, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return trimmed(self._tokenizer(list(texts)))


def alone() -> contextlib.AbstractContextManager[Any]:
    """The lock for a causal tower's positions, which ``encode_short`` replaces: threads may share a model."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _SWAPPING


class _Text(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(tokens)
        return features


def encode_short(model: Any, tower: str, tokens: Tensor, *, new_mask: bool = False) -> Tensor:
    """``model.encode_text`` with as many positions as the tokens have; differentiable; to be called ``alone``.

    ``new_mask`` makes the mask anew instead of cutting it out: torch.export, which follows the length as a variable,
    would ask whether what is cut out is all of it.
    """
    holder, length = model.get_submodule(tower), tokens.shape[1]
    prefix = ".".join(filter(None, ("model", tower)))
    if new_mask:
        mask = torch.full_like(holder.attn_mask[0, 0], -torch.inf).expand(length, length).triu(1)
    else:
        mask = holder.attn_mask[:length, :length]
    positions = holder.positional_embedding[:length]
    shorter = {f"{prefix}.positional_embedding": positions, f"{prefix}.attn_mask": mask}
    features: Tensor = functional_call(_Text(model), shorter, (tokens,))
    return features
