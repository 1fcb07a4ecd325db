"""Streamed shards in the training loop: weights, the cache, and the lanes of an epoch that goes on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cloob.data.batch import Batch
from cloob.data.loader import PairLoader
from cloob.models.runs import list_checkpoints
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.state.resume import read_checkpoint


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int | None]]:
    """What each epoch was begun with: its number, the first step, the lanes."""
    calls: list[tuple[int, int, int | None]] = []
    epoch = PairLoader.epoch

    def noted(
        self: PairLoader, number: int, start_step: int = 0, lanes: int | None = None, **more: Any
    ) -> Iterator[Batch]:
        calls.append((number, start_step, lanes))
        return epoch(self, number, start_step, lanes, **more)

    monkeypatch.setattr(PairLoader, "epoch", noted)
    return calls


def test_an_epoch_keeps_its_lanes_and_the_next_has_its_own(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path: Path, begun: list[tuple[int, int, int | None]]
) -> None:
    config = base.override(
        data=(f"pipe:cat {pairs_as['shards']}/{{00000..00001}}.tar", pairs_as["table"]),
        data_weights=(1.0, 0.5),
        cache_dir=tmp_path / "cache",
        shuffle_buffer=10,
        out=tmp_path / "run",
        epochs=2,
        save_every=3,
        keep=0,
        workers=0,
        max_bad_fraction=1.0,
    )
    result = train(config)
    assert result.steps == 2 * ((40 + 20) // 8) and begun == [(0, 0, 1), (1, 0, 1)]
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 2
    lanes = [read_checkpoint(path).progress.lanes for path in list_checkpoints(tmp_path / "run")]
    assert len(lanes) >= 4 and set(lanes) == {0, 1}  # 0: the epoch has not begun

    # As if two processes had written it in the middle of the first epoch.
    first = list_checkpoints(tmp_path / "run")[0]
    state = torch.load(first / "trainer.pt", weights_only=True)
    state["progress"]["lanes"] = 2
    torch.save(state, first / "trainer.pt")
    begun.clear()
    train(config.override(out=tmp_path / "elsewhere", resume=str(first)))
    assert begun == [(0, 3, 2), (1, 0, 1)]
