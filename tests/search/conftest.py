"""An index without pictures."""

import pytest

from cloob.search.index import Index


@pytest.fixture
def index(tmp_path_factory):
    with Index.create(tmp_path_factory.mktemp("index") / "index") as made:
        yield made
