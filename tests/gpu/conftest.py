"""What needs a GPU: skipped with a word where there is none.

``CLOOB_GPU_TESTS=cpu`` runs on the CPU what does not need CUDA itself, to see that the tests are right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, or the CPU where that was asked for."""
    if os.environ.get("CLOOB_GPU_TESTS") == "cpu":
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device("cuda:0")
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU; there is no stand-in for it."""
    if device.type != "cuda":
        pytest.skip("needs CUDA itself")
    return device
