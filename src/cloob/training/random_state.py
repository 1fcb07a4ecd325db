"""State of the random generators that training depends on: python's, numpy's and torch's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from cloob.distributed import rank


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of python's, numpy's and torch's generators, as tensors and plain types."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (towers may use the global one)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Keeps what runs inside (loaders, callbacks) from moving the generators that training depends on."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)


def seed_generators(seed: int, states: list[dict[str, Any]], device: torch.device) -> None:
    """Sets this rank's generators to its checkpoint's ``states``, or freshly to ``seed`` + rank if there are none."""
    seed += rank()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (whatever a tower may draw from)
    if rank() < len(states):
        set_rng_state(states[rank()], device)
