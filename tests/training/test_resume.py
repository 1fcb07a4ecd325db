"""A run that is killed with -9 at any moment and started again is the run that was left
alone, to the last bit.

The moment is drawn by the feature's name; ``pytest -m nightly`` has the features one by
one.
"""

import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from train_helpers import At, KilledAfter, Recorder, assert_same_run, write_shards

from cloob import TrainConfig, train
from cloob.cli import main
from cloob.models.runs import latest_checkpoint
from support import fork, read_lines

LEARNS = {"learnable_inv_tau": True, "learnable_beta": True}
JOINS = {"retrieval_from": 0.5, "best": "val_recall"}
COOLS = {"optimizer": "muon", "schedule": "cosine-restarts", "restarts": 2}
FROZEN = {"freeze": "image"}
# Data in one of the forms of ``pairs_as``, or streamed; number of processes; settings.
USUAL = {
    "learnable scales, micro-batches": (
        *("table", 1),
        LEARNS | {"micro_batch_size": 5, "clip_grad_norm": 1.0, "ema": 0.9},
    ),
    "two ranks, shards, two workers": (
        *("shards", 2),
        {"workers": 2, "learnable_inv_tau": True, "shuffle_buffer": 6},
    ),
    "streamed, weighted, ends inside an epoch": (
        *("streamed", 1),
        {"steps": 13, "shuffle_buffer": 10} | JOINS | COOLS,
    ),
}
NIGHTLY = {
    "frozen tower, SigLIP": (
        *("table", 1),
        {"model": "nano-resnet", "objective": "siglip"} | FROZEN,
    ),
    "one worker": ("folder", 1, {"workers": 1}),
    "restarts": ("table", 1, {"schedule": "cosine-restarts", "restarts": 2}),
    "bf16": ("table", 1, {"precision": "bf16"}),
    "CLIP": ("table", 1, {"objective": "clip"}),
    "retrieval joins": ("table", 1, JOINS),
    "text frozen": ("table", 1, {"freeze": "text"}),
    "held-out share": (
        *("table", 1),
        {"val_split": 0.25, "val_data": [], "mask_duplicates": True, "epochs": 5},
    ),
    "two ranks, frozen tower": ("table", 2, FROZEN),
    "two ranks, streamed": ("streamed", 2, {"shuffle_buffer": 10, "workers": 1}),
    "sharded weights": (
        *("shards", 2),
        {"fsdp": True, "model": "nano-vit", "learnable_inv_tau": True},
    ),
}
CASES = [
    *USUAL,
    *(pytest.param(name, marks=pytest.mark.nightly) for name in NIGHTLY),
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


@pytest.mark.parametrize("name", CASES)
def test_killed_and_started_again(name, base, pairs_as, tmp_path):
    form, processes, settings = (USUAL | NIGHTLY)[name]
    config = base.override(val_data=[pairs_as["folder"]]).override(**settings)
    if form == "streamed":
        stream = f"local://{pairs_as['shards']}/{{00000..00001}}.tar"
        data = [stream, pairs_as["table"]]
        config = config.override(data=data, max_bad_fraction=1.0)
    else:
        config = config.override(data=[pairs_as[form]])
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    command(tmp_path / "a", processes, config.override(out=whole))
    steps = len(read_lines(whole / "metrics.jsonl"))
    config = config.override(out=run)
    chance = random.Random(name)
    trouble = KilledAfter(chance.randint(1, steps - 3), chance.uniform(0, 0.055))
    killed(tmp_path / "b", processes, config, trouble)
    # The last rank is killed; rank 0, which writes, may be a line behind it.
    done = len(read_lines(run / "metrics.jsonl"))
    assert trouble.step - processes + 1 <= done < steps
    command(tmp_path / "c", processes, config, "--resume", "auto")
    assert_same_run(run, whole)
    chosen = TrainConfig().merge_file(run / "config.json").batch_size
    assert steps >= 12
    assert chosen == 8


LATER = [
    pytest.param(step, signal.SIGTERM, marks=pytest.mark.nightly) for step in (7, 13)
]


@pytest.mark.parametrize(
    ("step", "number"), [(7, signal.SIGINT), (10, signal.SIGTERM), *LATER]
)
def test_told_to_end_and_started_again(base, pairs_as, tmp_path, step, number):
    """In an epoch, and at the end of one: it is told while it validates, which the next
    start makes good.
    """
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    config = base.override(val_data=[pairs_as["folder"]], steps=13, best="val_recall")
    config = config.override(save_every=0, keep=0)
    train(config.override(out=whole))
    config = config.override(out=run)
    told = Recorder()
    callbacks = [told, At(step, lambda: signal.raise_signal(number))]
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    # a shell's background jobs ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            train(config, callbacks=callbacks)
    finally:
        signal.signal(signal.SIGINT, before[1])
    assert signal.getsignal(signal.SIGTERM) is before[0]
    result = getattr(caught.value, "result", None)
    assert told.of("end") == [result]
    if number == signal.SIGTERM:
        assert f"SIGTERM after step {step}" in str(caught.value)
        assert result.stopped == "SIGTERM"
        assert result.steps == step
        assert not result.out_of_patience
        assert result.checkpoint == latest_checkpoint(run)
    assert len(read_lines(run / "epochs.jsonl")) == (step - 1) // 5
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"note": "a line of somebody else"}\n{"step": 99')
    assert train(config.override(resume="auto")).stopped is None
    inside = step == 7 and number == signal.SIGTERM
    assert_same_run(run, whole, ["step-00000007"] if inside else [])
    for folder in (run, whole):
        judged = [path.parent.name for path in folder.rglob("validation.json")]
        assert sorted(judged) == ["step-00000005", "step-00000010", "step-00000013"]


CHANGED_SIZES = [
    ("folder", 12, (1, 1)),
    pytest.param("folder", 4, (1, 1), marks=pytest.mark.nightly),
    ("streamed", 8, (2, 1)),
    pytest.param("shards", 4, (1, 1), marks=pytest.mark.nightly),
    pytest.param("streamed", 4, (1, 2), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(
    ("form", "size", "processes"),
    CHANGED_SIZES,
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
    assert (f"batch_size {size} instead of 8" in told) == (size != 8)
    other = f"resumed with processes {processes[1]} instead of {processes[0]}"
    assert (other in told) == (processes[0] != processes[1])

    found = read_lines(tmp_path / "run" / "metrics.jsonl")
    first = [line for line in found if line["epoch"] == 1]
    assert len(first) == 2 + 24 // size
    assert len(found) == len(first) + 40 // size
    named = [Counter(), Counter()]
    for line in read_lines(tmp_path / "run" / "skipped.jsonl"):
        named[line["epoch"] - 1][Path(line["key"]).stem] += 1
    assert named[0] == Counter(bad)
    assert set(named[1].values()) == {1}
    assert set(named[1]) <= bad
    assert first[-1]["samples_seen"] == 40 - len(bad)
    if processes == (1, 1):  # the rates are those of a run of that size
        command(tmp_path / "c", 1, again.override(out=tmp_path / "alone"))
        rates = [
            line["lr"] for line in read_lines(tmp_path / "alone" / "metrics.jsonl")
        ]
        assert [line["lr"] for line in found[2:]] == rates[16 // size :]
