"""Shards made on the spot."""

import pytest

from make import noise, write_tar


@pytest.fixture
def shards(tmp_path):
    """A folder with three shards of 5, 4 and 3 pairs; pair i has the caption ``"pair
    i"``.
    """
    i = 0
    for number, size in enumerate((5, 4, 3)):
        files = {}
        for _ in range(size):
            files[f"p{i:03d}.png"], files[f"p{i:03d}.txt"] = (
                noise(i),
                f"pair {i}".encode(),
            )
            i += 1
        write_tar(tmp_path / "shards" / f"{number:05d}.tar", files)
    return tmp_path / "shards"
