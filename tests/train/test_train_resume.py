"""A run that is killed with -9 at any moment and resumed is the run that was left alone, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_helpers import KilledAfter, exact, fork, lines

from cloob.models.store import latest_checkpoint, list_checkpoints, load_model
from cloob.train.config import TrainConfig
from cloob.train.loop import train

nightly = pytest.mark.nightly


def run(folder: Path, processes: int, config: TrainConfig, killed: KilledAfter | None = None) -> None:
    """Trains in processes of its own, which are killed if so wanted."""
    callbacks = [killed] if killed else []
    ranks = fork(folder, processes, lambda: train(config, callbacks=callbacks) and None)
    codes = ranks.wait(together=killed is not None)
    if killed:
        # A rank may have seen that the killed one is gone before it was killed itself.
        assert -9 in codes and set(codes) <= {-9, 1}, ranks.told()
    else:
        assert set(codes) == {0}, ranks.told()


@pytest.fixture(scope="session")
def whole(
    base: TrainConfig, pairs_as: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], TrainConfig]:
    """The run that nothing happens to, one for each number of processes and form of the data, made when needed."""
    made: dict[tuple[int, str], TrainConfig] = {}

    def of(processes: int, form: str) -> TrainConfig:
        if (processes, form) not in made:
            folder = tmp_path_factory.mktemp(f"{form}-{processes}")
            config = base.override(
                data=[pairs_as[form]],
                val_data=[pairs_as["folder"]],
                learnable_inv_tau=True,
                ema=0.9,
                out=folder / "run",
            )
            run(folder, processes, config)
            made[processes, form] = config
        return made[processes, form]

    return of


@pytest.mark.parametrize(
    ("processes", "form", "workers"),
    [
        (1, "shards", 2),
        (1, "table", 0),
        (2, "shards", 0),
        (2, "table", 2),
        pytest.param(1, "shards", 0, marks=nightly),
        pytest.param(1, "table", 2, marks=nightly),
        pytest.param(2, "shards", 2, marks=nightly),
        pytest.param(2, "table", 0, marks=nightly),
    ],
)
def test_killed_and_resumed(
    whole: Callable[[int, str], TrainConfig], tmp_path: Path, processes: int, form: str, workers: int
) -> None:
    """Also the averaged weights, the raw ones, the epochs' log and the named bad samples are the same."""
    before = whole(processes, form)
    config = before.override(out=tmp_path / "run", workers=workers)
    chance = random.Random()
    killed = KilledAfter(chance.randint(1, 13), chance.uniform(0, 0.08))
    print(killed)  # shown when the test fails
    run(tmp_path, processes, config, killed)
    assert killed.step <= len(lines(config.save.out / "metrics.jsonl")) < 15 or killed.step == 13
    run(tmp_path, processes, config.override(resume="auto"))
    assert exact(config.save.out) == exact(before.save.out)
    here, there = (c.save.out for c in (config, before))
    for log in ("epochs.jsonl", "skipped.jsonl"):
        found = [[{**line, "seconds": 0} for line in lines(out / log)] for out in (here, there)]
        assert found[0] == found[1], log
    names = [[path.name for path in list_checkpoints(out)] for out in (here, there)]
    assert names[0] == names[1]
    ours, theirs = (torch.load(latest_checkpoint(out) / "trainer.pt", weights_only=True) for out in (here, there))
    averaged, expected = (load_model(out).state_dict() for out in (here, there))
    for name, value in expected.items():
        assert torch.equal(averaged[name], value), name
        assert torch.equal(ours["weights"][name], theirs["weights"][name]), name
    assert ours["average"] == theirs["average"] == {"updates": 15}
    assert not torch.equal(ours["weights"]["model.visual.proj"], expected["model.visual.proj"])


def test_another_number_of_processes_goes_on_at_the_same_samples(
    whole: Callable[[int, str], TrainConfig], tmp_path: Path
) -> None:
    """From two processes to one in the middle of an epoch, and it is said; each pair still counts once an epoch."""
    before = whole(2, "shards")
    start = before.save.out / "checkpoints" / "step-00000012"
    config = before.override(out=tmp_path / "run", resume=str(start))
    ranks = fork(tmp_path, 1, lambda: train(config) and None)
    assert ranks.wait() == [0], ranks.told()
    assert "resumed with 1 processes instead of 2: the data go on where they were" in ranks.told()
    here, there = exact(config.save.out), exact(before.save.out)[12:]
    assert [(line["step"], line["samples_seen"]) for line in here] == [
        (line["step"], line["samples_seen"]) for line in there
    ]
    # The samples are the same, so the loss of the first step is, but for dropout, which draws by rank.
    assert here[0]["lr"] == there[0]["lr"] and here[0]["loss"] == pytest.approx(there[0]["loss"], rel=0.2)
