"""What search and evaluation ask of a model, how it is when it is asked, and what tells it from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from cloob.data.content import add_part

if TYPE_CHECKING:
    from PIL.Image import Image

_BLOCK = 1 << 20


class Encoder(Protocol):
    """Pictures and texts to unit rows; :class:`cloob.models.encoder.DualEncoder` is one."""

    name: str

    def preprocess(self, image: Image, /) -> Tensor: ...

    def encode_image(self, images: Tensor, /) -> Tensor: ...

    def encode_text(self, texts: Sequence[str], /) -> Tensor: ...


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Without gradients, and with every module in evaluation mode; the modes are put back afterwards."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def digest(module: nn.Module, *facts: Any) -> str:
    """A digest of a module's parameters and buffers and of JSON-able facts: 32 hex digits, the same on all machines."""
    state = hashlib.blake2b(digest_size=16)
    for fact in facts:
        add_part(state, json.dumps(fact, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        add_part(state, f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in torch.split(flat, _BLOCK):
            state.update(part.numpy().tobytes())
    return str(state.hexdigest())
