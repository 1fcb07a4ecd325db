"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Nothing may reach a hub, and one thread a test is fastest on small tensors; both before torch is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the pictogram benchmark beside the checkout; absent for most users."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the pictogram benchmark is not beside the checkout ({path.parent.name}/{path.name})")
    return path
