"""A small model, and its export."""

import pytest
from small_models import write_model

from support import made_once, run_cloob


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model folder with a ViT."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory):
    """What ``cloob export --to transformers`` makes of ``small``."""

    def work(folder):
        words = (
            f"export {small} --out {folder}/exported --to transformers --license mit"
        )
        run_cloob(words)

    return made_once(tmp_path_factory, "transformers-exported", work) / "exported"
