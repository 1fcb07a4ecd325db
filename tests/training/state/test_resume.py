"""A run that is killed with -9 at any moment and started again is the run that was left
alone, to the last bit.

The moment is drawn by the feature's name; ``pytest -m nightly`` has the features one by
one.
"""

import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from train_helpers import (
    At,
    KilledAfter,
    Recorder,
    assert_same_run,
    lines,
    write_shards,
)

from cloob import TrainConfig, train
from cloob.cli import main
from cloob.models.runs import latest_checkpoint, list_checkpoints
from support import fork


@dataclass(frozen=True)
class Feature:
    """Settings of a run; ``data`` is one of the forms of ``pairs_as`` or
    ``streamed``.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "table"
    processes: int = 1
    nightly: bool = True


def usual(data="table", processes=1, **settings):
    return Feature(settings, data, processes, nightly=False)


LEARNS = {"learnable_inv_tau": True, "learnable_beta": True}
JOINS = {"retrieval_from": 0.5, "best": "val_recall"}
COOLS = {"optimizer": "muon", "schedule": "cosine-restarts", "restarts": 2}
FROZEN = {"freeze": "image"}
FEATURES = {
    "learnable scales, micro-batches": usual(
        **LEARNS, micro_batch_size=5, clip_grad_norm=1.0, ema=0.9
    ),
    "two ranks, shards, two workers": usual(
        "shards", 2, workers=2, learnable_inv_tau=True, shuffle_buffer=6
    ),
    "streamed, weighted, ends inside an epoch": usual(
        "streamed", steps=13, shuffle_buffer=10, **JOINS, **COOLS
    ),
    "frozen tower, SigLIP": Feature(
        {"model": "nano-resnet", "objective": "siglip"} | FROZEN
    ),
    "one worker": Feature({"workers": 1}, "folder"),
    "restarts": Feature({"schedule": "cosine-restarts", "restarts": 2}),
    "bf16": Feature({"precision": "bf16"}),
    "CLIP": Feature({"objective": "clip"}),
    "retrieval joins": Feature(JOINS),
    "text frozen": Feature({"freeze": "text"}),
    "held-out share": Feature(
        {"val_split": 0.25, "val_data": [], "mask_duplicates": True, "epochs": 5}
    ),
    "two ranks, frozen tower": Feature(FROZEN, "table", 2),
    "two ranks, streamed": Feature({"shuffle_buffer": 10, "workers": 1}, "streamed", 2),
    "sharded weights": Feature(
        {"fsdp": True, "model": "nano-vit", "learnable_inv_tau": True}, "shards", 2
    ),
}
CASES = [
    pytest.param(name, marks=[pytest.mark.nightly] * f.nightly, id=name)
    for name, f in FEATURES.items()
]


def killed(folder, processes, config, trouble):
    ranks = fork(folder, processes, lambda: train(config, callbacks=[trouble]) and None)
    codes = ranks.wait(together=True)
    # A rank may have seen that the killed one is gone before it was killed itself.
    assert -9 in codes and set(codes) <= {-9, 1}, f"{trouble}: {ranks.told()}"


def command(folder, processes, config, *words):
    """``cloob train --config …`` with what was typed, not with what the run made of
    it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "typed.json").write_text(config.to_json())
    ranks = fork(
        folder,
        processes,
        lambda: main(["train", "--config", str(folder / "typed.json"), *words]),
    )
    assert set(ranks.wait()) == {0}, ranks.told()
    return ranks


@pytest.fixture
def configured(base, pairs_as, nano_configs, tmp_path):
    def of(feature):
        config = base.override(**{"val_data": [pairs_as["folder"]], **feature.settings})
        if feature.data == "streamed":
            stream = f"local://{pairs_as['shards']}/{{00000..00001}}.tar"
            data = [stream, pairs_as["table"]]
            return config.override(data=data, max_bad_fraction=1.0)
        return config.override(data=[pairs_as[feature.data]])

    return of


@pytest.mark.parametrize("name", CASES)
def test_killed_and_started_again(name, configured, tmp_path):
    feature, chance = FEATURES[name], random.Random(name)
    whole, config = (
        configured(feature).override(out=tmp_path / folder)
        for folder in ("whole", "run")
    )
    command(tmp_path / "a", feature.processes, whole)
    steps = len(lines(whole.out / "metrics.jsonl"))
    trouble = KilledAfter(chance.randint(1, steps - 3), chance.uniform(0, 0.055))
    killed(tmp_path / "b", feature.processes, config, trouble)
    # The last rank is killed; rank 0, which writes, may be a line behind it.
    assert (
        trouble.step - feature.processes + 1
        <= len(lines(config.out / "metrics.jsonl"))
        < steps
    )
    command(tmp_path / "c", feature.processes, config, "--resume", "auto")
    assert_same_run(config.out, whole.out)
    chosen = TrainConfig().merge_file(config.out / "config.json").batch_size
    assert steps >= 12 and chosen == 8


NIGHTLY = [
    pytest.param(step, signal.SIGTERM, marks=pytest.mark.nightly) for step in (7, 13)
]


@pytest.mark.parametrize(
    ("step", "number"), [(7, signal.SIGINT), (10, signal.SIGTERM), *NIGHTLY]
)
def test_told_to_end_and_started_again(base, pairs_as, tmp_path, step, number):
    """In an epoch, and at the end of one: it is told while it validates, which the next
    start makes good.
    """
    config = base.override(
        val_data=[pairs_as["folder"]], steps=13, save_every=0, keep=0, best="val_recall"
    )
    train(config.override(out=tmp_path / "whole"))
    config, told = config.override(out=tmp_path / "run"), Recorder()
    callbacks = [told, At(step, lambda: signal.raise_signal(number))]
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it
    try:
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                train(config, callbacks=callbacks)
            assert told.of("end") == [None]
        else:
            with pytest.raises(KeyboardInterrupt, match="SIGTERM after step") as caught:
                train(config, callbacks=callbacks)
            result = caught.value.result
            assert told.of("end") == [result]
            assert (result.stopped, result.steps, result.out_of_patience) == (
                "SIGTERM",
                step,
                False,
            )
            assert result.checkpoint == latest_checkpoint(tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before[1])
    assert signal.getsignal(signal.SIGTERM) is before[0]
    assert len(lines(tmp_path / "run" / "epochs.jsonl")) == (step - 1) // 5
    assert train(config.override(resume="auto")).stopped is None
    assert_same_run(
        tmp_path / "run",
        tmp_path / "whole",
        ["step-00000007"] if told.of("end")[0] and step == 7 else [],
    )
    for run in ("run", "whole"):
        judged = [
            path.name
            for path in list_checkpoints(tmp_path / run)
            if (path / "validation.json").is_file()
        ]
        assert judged == ["step-00000005", "step-00000010", "step-00000013"]


@pytest.mark.parametrize(
    ("form", "size", "processes"),
    [
        ("folder", 12, (1, 1)),
        pytest.param("folder", 4, (1, 1), marks=pytest.mark.nightly),
        ("streamed", 8, (2, 1)),
        pytest.param("shards", 4, (1, 1), marks=pytest.mark.nightly),
        pytest.param("streamed", 4, (1, 2), marks=pytest.mark.nightly),
    ],
)
def test_another_batch_size_or_number_of_processes_goes_on_at_the_same_samples(
    base, pairs_as, tmp_path, form, size, processes
):
    """After 16 of an epoch's 40 samples.

    A quarter of them is bad: skipped.jsonl names the places that were visited.
    """
    bad = {f"{c}{t}" for c in range(4) for t in (0, 3, 8)} | {"13", "27"}
    shutil.copytree(pairs_as["folder"], tmp_path / "pairs")
    for stem in bad - {"13", "27"}:
        (tmp_path / "pairs" / f"{stem}.txt").write_bytes(b"")
    data = str(tmp_path / "pairs")
    if form != "folder":
        data = write_shards(tmp_path / "pairs", tmp_path / "shards")
    if form == "streamed":
        data = f"local://{data}/{{00000..00001}}.tar"
    config = base.override(
        data=[data],
        out=tmp_path / "run",
        max_bad_fraction=1.0,
        epochs=2,
        shuffle_buffer=0 if form == "folder" else 7,
    )
    killed(tmp_path / "a", processes[0], config, KilledAfter(3, 0.0))
    again = config.override(batch_size=size)
    told = command(tmp_path / "b", processes[1], again, "--resume", "auto").told()
    assert (f"resumed with batch size {size} instead of 8: the" in told) == (size != 8)
    other = f"resumed with {processes[1]} processes instead of {processes[0]}: the data"
    assert (other in told) == (processes[0] != processes[1])

    found = lines(tmp_path / "run" / "metrics.jsonl")
    first = [line for line in found if line["epoch"] == 1]
    assert len(first) == 2 + 24 // size and len(found) == len(first) + 40 // size
    named = [Counter(), Counter()]
    for line in lines(tmp_path / "run" / "skipped.jsonl"):
        named[line["epoch"] - 1][Path(line["key"]).stem] += 1
    assert named[0] == Counter(bad)
    assert set(named[1].values()) == {1} and set(named[1]) <= bad
    assert first[-1]["samples_seen"] == 40 - len(bad)
    if processes == (1, 1):  # the rates are those of a run of that size
        command(tmp_path / "c", 1, again.override(out=tmp_path / "alone"))
        rates = [line["lr"] for line in lines(tmp_path / "alone" / "metrics.jsonl")]
        assert [line["lr"] for line in found[2:]] == rates[16 // size :]
