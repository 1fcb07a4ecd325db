"""What the tests of training alone share beside fixtures: its callbacks, its logs, and
processes that train.
"""

import os
import signal
import threading
import time
from collections import namedtuple

import pytest
import torch

from cloob.errors import Stopped
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint, list_checkpoints
from cloob.training.callbacks import Callback, ProgressDisplay
from make import write_tar
from support import fork, read_lines

# Compared between runs that must be the same; the other keys of a line are times.
EXACT = ("step", "epoch", "samples_seen", "loss", "lr", "grad_norm", "inv_tau", "beta")


class Recorder(Callback):
    """Keeps what it was called with."""

    def __init__(self):
        self.events = []

    def on_start(self, info):
        self.events.append(("start", info))

    def on_step(self, metrics):
        self.events.append(("step", dict(metrics)))

    def on_epoch_end(self, metrics):
        self.events.append(("epoch", dict(metrics)))

    def on_checkpoint(self, path):
        self.events.append(("checkpoint", path))

    def on_end(self, result):
        self.events.append(("end", result))

    def of(self, kind):
        return [value for name, value in self.events if name == kind]


Trained = namedtuple("Trained", "config run result recorder")


def on_last_rank():
    return (
        int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    )


def last_line(ranks, code=2):
    """Of what a run printed, which ended with this code and without a traceback."""
    assert set(ranks.wait()) == {code} and "Traceback" not in ranks.told(), ranks.told()
    return ranks.outputs[0].read_text().splitlines()[-1]


def result_of(action, *arguments, **options):
    """The result of a training, also of one that SIGTERM ended."""
    try:
        return action(*arguments, **options)
    except Stopped as stopped:
        return stopped.result


def exact(run):
    """What two runs must have in common to the last bit."""
    return [
        {key: line.get(key) for key in EXACT}
        for line in read_lines(run / "metrics.jsonl")
    ]


def assert_close_runs(run, other, tolerance, keys=("loss", "grad_norm")):
    """The numbers of two runs that may differ by rounding."""
    for here, there in zip(exact(run), exact(other), strict=True):
        assert here["samples_seen"] == there["samples_seen"]
        for key in keys:
            wanted = pytest.approx(there[key], rel=tolerance)
            assert here[key] == wanted, (here["step"], key)


def learned(run, name):
    """What the loss of a run has learned."""
    state = torch.load(latest_checkpoint(run) / "trainer.pt", weights_only=True)
    return state["objective"][name].item()


def on_two_ranks(folder, action):
    """Runs a training on both, which has to come to its end."""
    ranks = fork(folder, 2, lambda: action() and None)
    assert ranks.wait(200) == [0, 0], ranks.told()
    return ranks


class KilledAfter(Callback):
    """kill -9 to this process some time after a step, in the middle of whatever it does
    then; on the last rank only.
    """

    def __init__(self, step, seconds):
        self.step = step
        self.seconds = seconds

    def on_step(self, metrics):
        if metrics["step"] == self.step and on_last_rank():
            threading.Timer(
                self.seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)
            ).start()
        if metrics["step"] >= self.step:
            time.sleep(0.02)


def write_shards(pairs, folder):
    """Two shards of the pairs in a folder, and their sizes.json."""
    stems = sorted({path.stem for path in pairs.iterdir()})
    for number, part in enumerate((stems[:23], stems[23:])):
        names = [f"{stem}.{ending}" for stem in part for ending in ("png", "txt")]
        write_tar(
            folder / f"{number:05d}.tar",
            {name: (pairs / name).read_bytes() for name in names},
        )
    (folder / "sizes.json").write_text('{"00000.tar": 23, "00001.tar": 17}')
    return str(folder)


def command_until(folder, config, step=0, then=lambda: None, processes=1):
    """``cloob train --config …`` in processes of its own, in which something happens
    after a step.
    """
    from cloob.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json())

    def action():
        on_step = ProgressDisplay.on_step

        def with_event(self, metrics):
            on_step(self, metrics)
            if metrics["step"] == step:
                then()

        ProgressDisplay.on_step = with_event  # type: ignore[method-assign] # in a process of its own
        return main(["train", "--config", str(folder / "config.json")])

    return fork(folder, processes, action)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(run, other, extra=(), load=load_model):
    """All that a run folder holds but for times, and the weights that are loaded from
    it.
    """
    assert exact(run) == exact(other)
    for log in ("epochs.jsonl", "skipped.jsonl"):
        found, wanted = (
            [{**line, "seconds": 0} for line in read_lines(folder / log)]
            for folder in (run, other)
        )
        # a step that was not finite may be noticed some steps later
        found.sort(key=lambda line: line["step"])
        wanted.sort(key=lambda line: line["step"])
        assert found == wanted, log
    names = [
        {path.name for path in list_checkpoints(folder)} for folder in (run, other)
    ]
    assert names[0] == names[1] | set(extra)
    last = [latest_checkpoint(folder) for folder in (run, other)]
    states = [
        torch.load(checkpoint / "trainer.pt", weights_only=True) for checkpoint in last
    ]
    for state in states:
        state["progress"]["seconds"] = 0.0
        for group in state["optimizer"]["param_groups"]:
            group["lr"] = 0.0  # set before each step
    for part in states[1]:
        assert equal(states[0][part], states[1][part]), part
    assert equal(load(run).state_dict(), load(other).state_dict())
    averages = [checkpoint / "ema" for checkpoint in last]
    if averages[1].is_dir():
        assert equal(*(load(average).state_dict() for average in averages))


class At(Callback):
    """Does something after a step, or after each."""

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def on_step(self, metrics):
        if self.step in (None, metrics["step"]):
            self.action()


def told_to_end(step):
    """SIGTERM after a step."""
    return At(step, lambda: signal.raise_signal(signal.SIGTERM))


class Poison(Callback):
    """Makes a weight NaN after one step and gives it back after another; on the last
    rank only.
    """

    def __init__(self, first, last):
        self.first = first
        self.last = last

    def on_start(self, info):
        self.weight = info.encoder.model.token_embedding.weight

    def on_step(self, metrics):
        if on_last_rank() and metrics["step"] == self.first:
            self.kept = self.weight.detach().clone()
            self.weight.data.fill_(float("nan"))
        elif on_last_rank() and metrics["step"] == self.last:
            self.weight.data.copy_(self.kept)


def recall(k, x, y):
    """Of two matrices of rows, the mean of both directions."""
    scores = x @ y.T
    right = scores.diagonal()
    ahead = torch.stack([(scores > right[:, None]).sum(1), (scores > right).sum(0)])
    return float((ahead < k).double().mean())
