"""One index of sixty small pictures for all tests that do not change it, and a client of its server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served_colours import N, build, draw, web_of
from starlette.testclient import TestClient

from cloob.search.index import Index
from search_colours import ColourModel


@pytest.fixture(scope="session")
def encoders() -> tuple[ColourModel, ColourModel]:
    return ColourModel(), ColourModel("others")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("collection") / "pictures", range(N))


@pytest.fixture(scope="session")
def index(
    pictures: Path, encoders: tuple[ColourModel, ColourModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Index]:
    with build(tmp_path_factory.mktemp("index") / "idx", pictures, *encoders) as opened:
        yield opened


@pytest.fixture(scope="session")
def client(index: Index) -> Iterator[TestClient]:
    with web_of(index, max_upload_bytes=200_000, max_upload_pixels=1_000_000) as opened:
        yield opened
