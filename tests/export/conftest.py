"""A small model, and its export."""

import pytest
from small_models import write_model

from support import made_once


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model folder with a ViT."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory):
    """What ``cloob export --to transformers`` makes of ``small``."""
    from cloob import cli

    def work(folder):
        words = [
            "export",
            str(small),
            "--out",
            str(folder / "exported"),
            "--to",
            "transformers",
            "--license",
            "mit",
        ]
        assert cli.main(words) == 0

    return made_once(tmp_path_factory, "transformers-exported", work) / "exported"
