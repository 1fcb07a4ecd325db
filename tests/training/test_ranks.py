"""What takes one rank longer than the others wait for it, in real processes whose process group waits for a moment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from cloob.distributed import process_group, rank
from cloob.training import ranks
from support import Ranks, fork

WAITS = 1.5
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def two_ranks(folder: Path, action: Callable[[], object]) -> Ranks:
    def run() -> None:
        distributed_c10d.default_pg_timeout = timedelta(seconds=WAITS)
        with process_group(torch.device("cpu")):
            action()

    return fork(folder, 2, run)


@pytest.mark.nightly
def test_a_rank_may_take_longer_than_the_group_waits(tmp_path: Path) -> None:
    def slow(name: str) -> str:
        time.sleep(WAITS + 0.5)
        return name

    def action() -> None:
        assert ranks.on_rank_zero(lambda: slow("of rank 0"), slow=True) == "of rank 0"
        with ranks.no_timeout():
            if rank() == 1:  # as one on another host, with a cache of its own
                slow("")
        assert ranks.gather_objects(rank()) == [0, 1]
        assert ranks.collect_objects(rank()) == ([] if rank() else [0, 1])
        with pytest.raises(ZeroDivisionError):  # what fails on rank zero fails on all
            ranks.on_rank_zero(lambda: 1 / 0, slow=True)

    both = two_ranks(tmp_path, action)
    assert both.wait() == [0, 0], both.told()


def test_a_rank_that_dies_is_waited_for_no_longer(tmp_path: Path) -> None:
    both = two_ranks(tmp_path, lambda: ranks.on_rank_zero(lambda: os._exit(9), slow=True))
    assert both.wait() == [9, 1] and "Traceback" in both.told()
