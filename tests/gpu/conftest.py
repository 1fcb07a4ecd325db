"""What needs a GPU: skipped with a word where there is none.

``CLOOB_GPU_TESTS=cpu`` runs on the CPU what does not need CUDA itself, to see that the tests are right.
``CLOOB_GPU_REPORT=FILE`` has a line of JSON for each test, at once, so that a run that is ended keeps what it had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes what came of a test: of its call, or of a setup that failed or skipped it."""
    path = os.environ.get("CLOOB_GPU_REPORT")
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext.strip().rpartition("\n")[2]
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": said[-300:]}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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
