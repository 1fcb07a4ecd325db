"""The study's machinery: the same budget for all, one order of pairs for all, runs that can be stopped anywhere."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def tiny_data(n: int = 40) -> Any:
    from benchmarks.pictograms.cache import Data, Pairs

    random = np.random.default_rng(0)

    def pairs(count: int) -> Pairs:
        tokens = np.zeros((count, 24), np.int32)
        tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, random.integers(1, 500, count), 49407
        images = random.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        return Pairs(images, tokens, np.arange(count), tuple(f"thing {i}" for i in range(count)))

    return Data({"train": pairs(n), "val": pairs(12)}, {}, {})


def tiny_cell(**changes: Any) -> Any:
    from benchmarks.pictograms.cells import DEFAULTS, search_cell

    cell = search_cell("cloob", dataclasses.replace(DEFAULTS["cloob"], batch_size=16, **changes), 2)
    return dataclasses.replace(cell, tower="tiny-convnext")


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    curve = [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in record["curve"]]
    return {k: v for k, v in record.items() if not k.endswith("seconds")} | {"curve": curve}


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    from benchmarks.pictograms.running import Interrupted, Run

    data, cell = tiny_data(), tiny_cell()
    whole = Run(cell, data, tmp_path / "whole.pt", full=False).go(lambda: False)
    assert (whole["steps"], whole["pairs_seen"], len(whole["curve"])) == (4, 64, 2)
    state = tmp_path / "stopped.pt"
    for stop_after in (1, 2):  # in the middle of the first epoch, and of the second
        counter = itertools.count(1)
        with pytest.raises(Interrupted):
            Run(cell, data, state, full=False).go(lambda c=counter, n=stop_after: next(c) == n)  # type: ignore[misc]
    assert comparable(Run(cell, data, state, full=False).go(lambda: False)) == comparable(whole)
