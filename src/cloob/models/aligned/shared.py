"""Several models on the same frozen encoders: each batch goes through an encoder once, whichever model asks first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cloob.models.aligned.model import AlignedEncoder, AlignedTowers, fingerprint


def encoder_facts(encoder: AlignedEncoder) -> dict[str, list[Any]]:
    """What decides over the features of both encoders: weights, layers, and what is done to pixels and texts before."""
    towers: AlignedTowers = encoder.model
    return {
        "image": [fingerprint(towers.visual), repr(towers.visual), encoder.preprocess_cfg],
        "text": [fingerprint(towers.text), repr(towers.text), encoder.context_length, towers.text.options()],
    }


def share_encoders(model: AlignedEncoder, known: dict[str, nn.Module]) -> None:
    """Gives a model the encoders of an earlier one where they are equal; they keep all that they compute.

    The model is changed for good: it is for evaluation from here on.

    Args:
        model: Takes its encoders from ``known``, or adds them there.
        known: The encoders so far.
    """
    for side, facts in zip(("visual", "text"), encoder_facts(model).values(), strict=True):
        key = json.dumps([side, facts], sort_keys=True)
        if key not in known:
            known[key] = getattr(model.model, side)
            known[key].forward = _remembering(known[key].forward)  # of the object: a wrapper would rename its weights
        setattr(model.model, side, known[key])


def _remembering(compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of batches that computes nothing twice; batches are told apart by their bytes."""
    known: dict[tuple[bytes, torch.Size, torch.dtype], Tensor] = {}

    def forward(batch: Tensor) -> Tensor:
        content = batch.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        key = (hashlib.blake2b(content, digest_size=16).digest(), batch.shape, batch.dtype)
        if key not in known:
            known[key] = compute(batch).cpu()
        return known[key].to(batch.device)

    return forward
