"""A small model, and its export."""

from pathlib import Path

import pytest
from small_models import write_model

from support import made_once


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ViT."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def exported(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``cloob export --to transformers`` makes of ``small``."""
    from cloob import cli

    def work(folder: Path) -> None:
        words = ["export", str(small), str(folder / "exported"), "--to", "transformers", "--license", "mit"]
        assert cli.main(words) == 0

    return made_once(tmp_path_factory, "transformers-exported", work) / "exported"
