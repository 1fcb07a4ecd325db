"""One index of colours for all tests that only read."""

import pytest

from search_colours import make_index, open_index, write_pictures


@pytest.fixture(scope="session")
def coloured(tmp_path_factory):
    """An index of four shades of eight colours; the pictures lie in ``pictures`` beside it."""
    folder = tmp_path_factory.mktemp("coloured")
    return make_index(folder / "index", write_pictures(folder / "pictures"))


@pytest.fixture
def index(coloured):
    with open_index(coloured) as opened:
        yield opened
