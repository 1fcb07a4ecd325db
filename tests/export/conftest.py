"""A small model, and its export."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import write_model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ViT."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def exported(small: Path) -> Path:
    """What ``cloob export --to transformers`` makes of ``small``."""
    from cloob import cli

    place = small.parent / "exported"
    assert cli.main(["export", str(small), str(place), "--to", "transformers", "--license", "mit"]) == 0
    return place
