"""Where the checkpoints lie that the original programs wrote, and a small CLIP to write files from."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[4] / "shared" / "weights"


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """The folder of other programs' checkpoints beside the checkout; absent for most users."""
    if not SHARED.is_dir():
        pytest.skip(f"the checkpoints are not beside the checkout ({SHARED.parent.name}/{SHARED.name})")
    return SHARED
