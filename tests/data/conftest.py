"""Shards made on the spot."""

import pytest

from make import noise, write_tar


@pytest.fixture
def shards(tmp_path):
    """A folder with three shards of 5, 4 and 3 pairs; pair i has the caption ``"pair
    i"``.
    """
    folder = tmp_path / "shards"
    for number, rows in enumerate((range(5), range(5, 9), range(9, 12))):
        files = {}
        for row in rows:
            files[f"p{row:03d}.png"] = noise(row)
            files[f"p{row:03d}.txt"] = b"pair %d" % row
        write_tar(folder / f"{number:05d}.tar", files)
    return folder
