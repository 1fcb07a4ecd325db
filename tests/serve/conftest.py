"""One index of sixty small pictures for all tests that do not change it, and a client
of its server.
"""

import anyio
import pytest
from served_colours import N, build, draw, web_of

from search_colours import ColourModel

# anyio imports these on first use. In a server's thread pytest would rewrite them then,
# which Python 3.11 now and then ends with a SystemError of its parser.
LOADED = (anyio.open_file, anyio.to_thread.run_sync, anyio.create_task_group)


@pytest.fixture(scope="session")
def encoder():
    return ColourModel()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("collection") / "pictures", range(N))


@pytest.fixture(scope="session")
def index(pictures, encoder, tmp_path_factory):
    with build(tmp_path_factory.mktemp("index") / "idx", pictures, encoder) as opened:
        yield opened


@pytest.fixture(scope="session")
def client(index):
    with web_of(index, max_upload_bytes=200_000, max_upload_pixels=1_000_000) as opened:
        yield opened
