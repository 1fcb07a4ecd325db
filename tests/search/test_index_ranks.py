"""Two ranks with a real process group make the index that one process makes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from index_fakes import FakeEncoder, content, faults, options, write_noise

from cloob.search.index import Index
from support import fork


def update_twice(index: Path, pictures: Path, answer: Path) -> None:
    """What each of two ranks does; the pictures change in between."""
    encoder = FakeEncoder()

    def update() -> list[Any]:
        with Index.open(index, writable=True) as opened:
            done = opened.update([pictures], options(encoder))
        return [done.added, done.removed, done.unchanged, done.embedded, done.faults]

    told, rank = [*update(), encoder.seen], os.environ["RANK"]
    if rank == "0":  # the other one waits for this one in its second group
        (pictures / "00.png").unlink()
        (pictures / "01.png").rename(pictures / "moved.png")
        shutil.copy(pictures / "moved.png", pictures / "copy.png")
        for seed in range(30, 36):
            write_noise(pictures / f"{seed}.png", seed)
    answer.with_name(f"{answer.name}-{rank}").write_text(json.dumps([told, update()]))


def test_two_ranks_make_one_index(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for seed in range(23):
        write_noise(pictures / f"{seed:02}.png", seed)
    (pictures / "bad.png").write_bytes(b"nope")
    Index.create(tmp_path / "index").close()
    ranks = fork(tmp_path / "ranks", 2, lambda: update_twice(tmp_path / "index", pictures, tmp_path / "answer"))
    assert ranks.wait() == [0, 0], ranks.told()
    (first, first_again), (second, second_again) = (
        json.loads((tmp_path / f"answer-{rank}").read_text()) for rank in (0, 1)
    )
    assert first[:5] == second[:5] == [23, 0, 0, 23, {"corrupt image": 1}]
    assert first[5] + second[5] == 23 and first[5] and second[5]
    assert first_again == second_again == [8, 2, 21, 6, {"corrupt image": 1}]
    with Index.open(tmp_path / "index") as made, Index.create(tmp_path / "alone") as alone:
        alone.update([pictures], options(FakeEncoder()))
        assert content(made) == content(alone) and faults(made) == faults(alone)
        assert made.store.nearest("fake", alone.store.vectors("fake", [1])[0], 1).searched == 29
