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

from cloob.errors import InputError
from cloob.models.tokenizer import describe

_TOGETHER = 32  # texts a forward pass: few enough that a long one does not make many short ones wait
_PICTURES_TOGETHER = 4  # pictures a forward pass on a CPU: what flows between the layers stays in memory that is there


class ImageEncoder(nn.Module):
    """A timm network without its classifier, or an open_clip image tower.

    Args:
        network: Pixels to (n, F).
        preprocess_cfg: open_clip's, with a square ``size``.
    """

    def __init__(self, network: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.preprocess_cfg = preprocess_cfg
        self.features = _width(self, torch.zeros(1, 3, preprocess_cfg["size"], preprocess_cfg["size"]))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, F)."""
        # A program takes any number, so what is traced must not depend on it.
        whole = torch.compiler.is_compiling() or images.device.type != "cpu"
        if whole or len(images) <= _PICTURES_TOGETHER:
            return self._features(images)
        return torch.cat([self._features(some) for some in torch.split(images, _PICTURES_TOGETHER)])

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


class TextEncoder(nn.Module):
    """A Hugging Face transformer, pooled over the tokens that are no padding.

    Args:
        network: ``transformers`` model.
        tokenizer: Its tokenizer.
        pooling: ``"mean"`` or ``"cls"`` (the first token).
        context_length: L; longer texts are cut.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, pooling: str, context_length: int) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.context_length = context_length
        self.tokenizer = PaddedTokenizer(tokenizer, context_length)
        self.pad = int(tokenizer.pad_token_id)
        self.features = _width(self, self.tokenizer(["a"]))

    def options(self) -> list[str]:
        """What decides over the features beside the weights and layers: pooling, and how texts become tokens."""
        config: Any = self.network.config
        return [self.pooling, config.to_json_string(), self.tokenizer.description()]

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, F); texts of about equal length go together, without the padding that they share."""
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        lengths = ((tokens != self.pad) * positions).amax(1)  # a text may hold the padding's word
        order = lengths.argsort()
        parts = [self.pooled(tokens[some, : int(lengths[some[-1]])]) for some in torch.split(order, _TOGETHER)]
        return torch.cat(parts)[order.argsort()]

    def pooled(self, tokens: Tensor) -> Tensor:
        """(n, L') tokens to (n, F), all in one pass as they are."""
        mask = (tokens != self.pad).long()
        hidden: Tensor = self.network(input_ids=tokens, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


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
    """The text tower of an open_clip model.

    Args:
        model: The open_clip module; its image tower is dropped.
        tokenizer: Its tokenizer.
        context_length: L.
    """

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
    features = encoder.eval()(sample)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(f"an encoder gave {shape}; one vector an item, (n, F), is needed")
    return int(features.shape[1])
