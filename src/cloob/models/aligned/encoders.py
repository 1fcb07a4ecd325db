"""Frozen encoders as modules.

An image encoder is a module, normalised pixels (n, 3, H, W) to (n, F), with ``preprocess_cfg`` (open_clip's keys) and
``features`` (F). A text encoder is a module, tokens (n, L) int64 to (n, F), with ``tokenizer``, ``context_length`` (L)
and ``features``. Both come in evaluation mode without gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cloob.models.tokenizer import describe

_TEXT_BATCH = 32  # small, so that one long text does not pad many short ones
_IMAGE_BATCH = 4  # on a CPU: activations fit in its cache


class ImageEncoder(nn.Module):
    """A timm network without its classifier, or an open_clip image tower."""

    def __init__(self, network: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.preprocess_cfg = preprocess_cfg
        self.features = _width(self, torch.zeros(1, 3, preprocess_cfg["size"], preprocess_cfg["size"]))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, F)."""
        # A program takes any number, so what is traced must not depend on it.
        whole = torch.compiler.is_compiling() or images.device.type != "cpu"
        parts = [images] if whole else torch.split(images, _IMAGE_BATCH)
        return torch.cat([self.network(some) for some in parts])


class TextEncoder(nn.Module):
    """A ``transformers`` model, pooled over the tokens that are no padding: their mean, or ``"cls"``, the first one.

    Texts are cut to ``context_length`` (L) tokens.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, pooling: str, context_length: int) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.context_length = context_length
        self.tokenizer = PaddedTokenizer(tokenizer, context_length)
        tokens = self.tokenizer(["a"])  # says it where there is no padding
        self.pad = int(tokenizer.pad_token_id)
        self.features = _width(self, tokens)

    def options(self) -> list[str]:
        """What decides over the features beside the weights and layers: pooling, and how texts become tokens."""
        config: Any = self.network.config
        return [self.pooling, config.to_json_string(), self.tokenizer.description()]

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, F); texts of about equal length go together, without the padding that they share."""
        lengths = self._lengths(tokens)
        order = lengths.argsort()
        parts = [self.pooled(tokens[some, : int(lengths[some[-1]])]) for some in torch.split(order, _TEXT_BATCH)]
        return torch.cat(parts)[order.argsort()]

    def pooled(self, tokens: Tensor) -> Tensor:
        """(n, L') tokens to (n, F), all in one pass as they are."""
        mask = (self._positions(tokens) <= self._lengths(tokens).unsqueeze(1)).long()
        hidden: Tensor = self.network(input_ids=tokens, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(1, tokens.shape[1] + 1, device=tokens.device)

    def _lengths(self, tokens: Tensor) -> Tensor:
        """(n,) tokens up to the last that is no padding: a text may hold the padding's word."""
        return ((tokens != self.pad) * self._positions(tokens)).amax(1)


class PaddedTokenizer:
    """Texts to (n, L) int64, padded on the right; picklable, for the workers of a loader."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._length = context_length

    @property
    def original(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    def description(self) -> str:
        """The vocabulary and the rules, as one text."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return f"{type(self._tokenizer).__name__} {words}"

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokenises n texts."""
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        tokens: Tensor = encoded["input_ids"]
        return tokens


class TowerText(nn.Module):
    """The text tower of an open_clip model, whose image tower is dropped."""

    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor], context_length: int) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.network = model
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.features = _width(self, tokenizer(["a"]))

    def options(self) -> list[str]:
        """As of a ``TextEncoder``."""
        return [describe(self.tokenizer)]

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, F)."""
        features: Tensor = self.network.encode_text(tokens)
        return features


@torch.no_grad()
def _width(encoder: nn.Module, sample: Tensor) -> int:
    """F, from one forward pass."""
    return int(encoder.eval()(sample).shape[1])
