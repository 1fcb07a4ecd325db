"""A run that is killed with -9 at any moment and resumed is the run that was left alone, to the last bit."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import KilledAfter, Recorder, exact, lines

from cloob.data.batch import Batch
from cloob.data.loader import PairLoader
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint, list_checkpoints
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from support import fork

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
        (1, "table", 0),
        (2, "shards", 2),
        *(
            pytest.param(processes, form, workers, marks=nightly)
            for processes, form, workers in itertools.product((1, 2), ("shards", "table"), (0, 2))
            if (processes, form, workers) not in ((1, "table", 0), (2, "shards", 2))
        ),
    ],
)
def test_killed_and_resumed(
    whole: Callable[[int, str], TrainConfig], tmp_path: Path, processes: int, form: str, workers: int
) -> None:
    """Also the averaged weights, the raw ones, the epochs' log and the named bad samples are the same."""
    before = whole(processes, form)
    config = before.override(out=tmp_path / "run", workers=workers)
    chance = random.Random()
    killed = KilledAfter(chance.randint(1, 12), chance.uniform(0, 0.055))
    print(killed)  # shown when the test fails
    run(tmp_path, processes, config, killed)
    # Rank 1 is killed, and rank 0, which writes, may be a line behind it.
    assert killed.step - (processes > 1) <= len(lines(config.save.out / "metrics.jsonl")) < 15
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


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The epoch and the samples of each training batch that was asked for, bad ones included."""
    seen: list[tuple[int, list[str]]] = []
    epoch = PairLoader.epoch

    def noted(self: PairLoader, number: int, *arguments: Any, **more: Any) -> Iterator[Batch]:
        for batch in epoch(self, number, *arguments, **more):
            seen.append((number, [*batch.keys, *(skip.key for skip in batch.skipped)]))
            yield batch

    monkeypatch.setattr(PairLoader, "epoch", noted)
    return seen


@pytest.mark.parametrize(("size", "form"), [(4, "folder"), (12, "folder"), (4, "shards")])
def test_another_batch_size_goes_on_at_the_same_samples(
    base: TrainConfig,
    pairs_as: dict[str, str],
    tmp_path: Path,
    visited: list[tuple[int, list[str]]],
    caplog: pytest.LogCaptureFixture,
    size: int,
    form: str,
) -> None:
    """After 16 of an epoch's 40 samples: each of the others once, at the rates of a run of the new size, and told."""
    common = base.override(data=[pairs_as[form]], shuffle_buffer=6 if form == "shards" else 0, keep=0, epochs=2)
    before = common.override(out=tmp_path / "before", epochs=1)
    train(before)
    order = [key for _, keys in visited for key in keys]
    (first,) = [path for path in list_checkpoints(before.save.out) if path.name == "step-00000002"]
    visited.clear()
    config = common.override(out=tmp_path / "run", resume=str(first), batch_size=size)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        train(config, callbacks=[recorder])
    said = [message for message in caplog.messages if "batch" in message]
    assert said == [
        f"resumed with batch size {size} instead of 8: the data go on where they were, "
        f"the learning rate where a run of that batch size would be"
    ]
    batches = [keys for number, keys in visited if number == 0]
    rest = [key for keys in batches for key in keys]
    assert sorted(rest) == sorted(order[16:]) and len(order) == len(set(order)) == 40
    steps = 24 // size
    assert [len(keys) for keys in batches] == [size] * steps
    again = Counter(key for number, keys in visited if number == 1 for key in keys)
    assert set(again.values()) == {1} and len(again) == 40 // size * size

    found = lines(config.save.out / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(3, 3 + steps + 40 // size))
    assert recorder.of("start")[0].total_steps == found[-1]["step"]
    visited.clear()
    alone = common.override(out=tmp_path / "alone", batch_size=size)
    train(alone)
    rates = [line["lr"] for line in lines(alone.save.out / "metrics.jsonl")]
    assert [line["lr"] for line in found] == rates[16 // size : 16 // size + steps] + rates[40 // size :]

    # A second stop, within the epoch that went on with the other size, finds its place as well.
    middle = list_checkpoints(config.save.out)[0]
    visited.clear()
    train(config.override(out=tmp_path / "later", resume=str(middle)))
    done = int(middle.name[5:]) - 2
    assert [keys for number, keys in visited if number == 0] == batches[done:]
    assert exact(tmp_path / "later") == exact(config.save.out)[done:]
