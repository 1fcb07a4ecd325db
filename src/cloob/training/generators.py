"""The random generators that training depends on: their state, kept and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import TypedDict

import torch
from torch import Tensor


class RngState(TypedDict):
    """Of python's, numpy's and torch's generators: plain values and tensors."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: dict[str, Tensor]


def torch_rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, that of the device among them."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_torch_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets torch's generators to a stored state."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def rng_state(device: torch.device) -> RngState:
    """State of all generators."""
    import numpy as np  # gradient caching, which keeps torch's alone, works without

    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": (str(name), words, *rest),
        "torch": torch_rng_state(device),
    }


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Sets all generators to a stored state."""
    import numpy as np

    version, internal, python_gauss = state["python"]
    random.setstate((version, tuple(internal), python_gauss))
    name, words, place, has_gauss, gauss = state["numpy"]
    keys = words.numpy().astype(np.uint32)
    np.random.set_state((name, keys, place, has_gauss, gauss))  # noqa: NPY002
    set_torch_rng_state(state["torch"], device)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Keeps what runs inside (loaders, callbacks) from moving the generators that
    training depends on.
    """
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(state, device)
