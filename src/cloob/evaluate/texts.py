"""Short texts through a causal text tower at their own length: the same embeddings for a fraction of the work.

open_clip pads each text to the context length (77 tokens), and a prompt has about ten. In a tower whose attention is
causal, and whose embedding is that of the end-of-text token, nothing behind that token has a part in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def encode_texts(encoder: Any, texts: Sequence[str]) -> Tensor:
    """Embeds texts as ``encoder.encode_text(texts)`` does, without the padding where that is exact.

    Exact is it for open_clip's own text towers with a causal mask that take the embedding of the token of highest
    number (CLIP's); all others get their texts as they are.

    Args:
        encoder: A :class:`cloob.models.encoder.DualEncoder`, or any other encoder.
        texts: T texts; of similar length, as the longest counts.

    Returns:
        (T, D), equal up to rounding.
    """
    tower = _causal_tower(encoder)
    if tower is None:
        features: Tensor = encoder.encode_text(texts)
        return features
    tokens = encoder.tokenizer(list(texts))
    length = int(tokens.argmax(1).max()) + 1
    with _shortened(encoder, tower, length):
        short: Tensor = encoder.encode_text(tokens[:, :length].contiguous())
        return short


def _causal_tower(encoder: Any) -> nn.Module | None:
    """The module that holds the text tower's positions and mask, if the last used token decides alone."""
    model = getattr(encoder, "model", None)
    text = getattr(model, "text", None)
    tower: Any = text if isinstance(text, nn.Module) else model
    if not isinstance(tower, nn.Module) or getattr(tower, "cls_emb", None) is not None:
        return None
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask = getattr(tower, "attn_mask", None)
    positions = getattr(tower, "positional_embedding", None)
    if pool != "argmax" or not isinstance(mask, Tensor) or not isinstance(positions, nn.Parameter):
        return None
    if mask.shape != (len(positions), len(positions)) or getattr(encoder, "context_length", None) != len(positions):
        return None
    return tower if torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)) else None


@contextmanager
def _shortened(encoder: Any, tower: Any, length: int) -> Iterator[None]:
    """The tower with a context of ``length`` tokens; its weights stay where they are."""
    whole = encoder.context_length, tower.positional_embedding, tower.attn_mask
    try:
        encoder.context_length = length
        tower.positional_embedding = nn.Parameter(whole[1].detach()[:length], requires_grad=False)
        tower.attn_mask = whole[2][:length, :length]
        yield
    finally:
        encoder.context_length, tower.positional_embedding, tower.attn_mask = whole
