"""Frozen encoders as modules, and the features that they gave before.

Normalised pixels (n, 3, H, W) or tokens (n, L) go in, (n, F) features come out, in evaluation mode without gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import require
from cloob.models.tokenizer import describe

_TEXT_BATCH = 32  # small, so that one long text does not pad many short ones
_IMAGE_BATCH = 4  # on a CPU: activations fit in its cache
_VERSION = "4"  # of what is computed and kept; another number makes the files of the old one unused
_KEY_BYTES = 16


class ImageEncoder(nn.Module):
    """A timm network without its classifier, or an open_clip image tower."""

    def __init__(self, network: nn.Module, preprocess_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.preprocess_cfg = network, preprocess_cfg
        self.features = _width(self, torch.zeros(1, 3, preprocess_cfg["size"], preprocess_cfg["size"]))

    def forward(self, images: Tensor) -> Tensor:
        # A program takes any number, so what is traced must not depend on it.
        whole = torch.compiler.is_compiling() or images.device.type != "cpu"
        parts = [images] if whole else torch.split(images, _IMAGE_BATCH)
        return torch.cat([self.network(some) for some in parts])


class TextEncoder(nn.Module):
    """A ``transformers`` model, pooled over the tokens that are no padding: their mean, or ``"cls"``, the first one."""

    def __init__(self, network: nn.Module, tokenizer: Any, pooling: str, context_length: int) -> None:
        super().__init__()
        self.network, self.pooling, self.context_length = network, pooling, context_length
        self.tokenizer = PaddedTokenizer(tokenizer, context_length)
        tokens = self.tokenizer(["a"])  # says it where there is no padding
        self.pad = int(tokenizer.pad_token_id)
        self.features = _width(self, tokens)

    def options(self) -> list[str]:
        config: Any = self.network.config
        return [self.pooling, config.to_json_string(), describe(self.tokenizer)]

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = self._mask(tokens).sum(1)
        order = lengths.argsort()
        parts = [self.pooled(tokens[some, : int(lengths[some[-1]])]) for some in torch.split(order, _TEXT_BATCH)]
        return torch.cat(parts)[order.argsort()]

    def pooled(self, tokens: Tensor) -> Tensor:
        """(n, L') tokens to (n, F), all in one pass as they are."""
        mask = self._mask(tokens).long()
        hidden: Tensor = self.network(input_ids=tokens, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def _mask(self, tokens: Tensor) -> Tensor:
        """Whether a token stands before the last that is no padding: a text may hold the padding's word."""
        return (tokens != self.pad).flip(1).cumsum(1).flip(1) > 0


class PaddedTokenizer:
    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self._length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": self._length, "return_tensors": "pt"}
        tokens: Tensor = self.tokenizer(texts, **options)["input_ids"]
        return tokens


class TowerText(nn.Module):
    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor], context_length: int) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.network, self.tokenizer, self.context_length = model, tokenizer, context_length
        self.features = _width(self, tokenizer(["a"]))

    def options(self) -> list[str]:
        return [describe(self.tokenizer)]

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.network.encode_text(tokens)
        return features


@torch.no_grad()
def _width(encoder: nn.Module, sample: Tensor) -> int:
    return int(encoder.eval()(sample).shape[1])


def encoder_key(facts: Sequence[object], device: torch.device) -> str:
    """A short name for a frozen encoder by what decides over its features; kinds of devices round differently."""
    content = json.dumps([_VERSION, device.type, facts], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=6).hexdigest()


def row_keys(batch: Tensor) -> Tensor:
    """(n, 16) uint8: a digest of each row of n pictures (uint8 pixels) or texts (integer tokens)."""
    rows = batch.cpu() if batch.dtype == torch.uint8 else batch.cpu().long()
    digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=_KEY_BYTES).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _KEY_BYTES)


class FeatureMemory:
    """What one frozen encoder gave for each row: in the files of ``cloob train align``, and here.

    ``kept`` is ``"images"`` or ``"texts"``; ``stored`` and ``asked`` are the rows of the files and those looked up.
    """

    def __init__(self, files: Sequence[Path], kept: str) -> None:
        self.kept, self.asked = kept, set[bytes]()
        self._known: dict[bytes, Tensor] = {}
        library = require("safetensors", "train")
        for path in files:  # a damaged one, or one that was just removed, is computed anew
            with suppress(library.SafetensorError, OSError), library.safe_open(path, framework="pt") as file:
                self._known |= zip(_each(file.get_tensor(f"{kept}_rows")), file.get_tensor(kept), strict=True)
        self.stored = frozenset(self._known)

    def features(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, F) features of n rows on the CPU; ``compute`` gives those of the rows that are new."""
        keys = _each(row_keys(batch))
        self.asked.update(keys)
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        if new:
            self._known |= zip(new, compute(batch[list(new.values())]).float().cpu(), strict=True)
        return torch.stack([self._known[key] for key in keys])


def _each(rows: Tensor) -> list[bytes]:
    content = rows.numpy().tobytes()
    return [content[i : i + _KEY_BYTES] for i in range(0, len(content), _KEY_BYTES)]
