"""Which model this is: a digest of its weights and of what else decides over its embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cloob.data.content import add_part
from cloob.errors import InputError
from cloob.models.encoding import Encoder

_BLOCK = 1 << 20


def add_module(state: Any, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Adds a model's parameters and buffers to a hash.

    Args:
        state: Of hashlib.
        module: The model.
        facts: JSON-able; what else decides over its embeddings, such as the configuration of its towers.
    """
    add_part(state, json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        add_part(state, f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in torch.split(flat, _BLOCK):
            state.update(part.numpy().tobytes())


def fingerprint(encoder: Encoder) -> str:
    """A digest of a model's weights, towers and preprocessing: 32 hex digits, on every machine the same.

    Where the model lies, what it is called and where it runs play no part. An encoder that is no module says its own,
    as ``fingerprint``.

    Raises:
        InputError: It is no module and has none.
    """
    if not isinstance(encoder, nn.Module):
        own = getattr(encoder, "fingerprint", None)
        if not isinstance(own, str):
            raise InputError(f"{encoder.name}: is no torch module and has no fingerprint, so nobody can tell it again")
        return own
    config = getattr(encoder, "config", None)
    facts = {
        "config": getattr(config, "settings", None),
        "preprocess": getattr(encoder, "preprocess_cfg", None),
    }
    state = hashlib.blake2b(digest_size=16)
    add_module(state, encoder, facts)
    return str(state.hexdigest())
