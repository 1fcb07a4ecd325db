"""Weights & Biases, by a module that has its documented calls: it is not installed here."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from train_helpers import Trained, lines

from cloob.training.loop import train
from support import fork


class FakeRun:
    def __init__(self, fails_at: int = -1) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[dict[str, Any]] = []
        self.fails_at = fails_at

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.logged.append((step, data))

    def finish(self, **arguments: Any) -> None:
        self.finished.append(arguments)


class FakeWandb(ModuleType):
    """``init`` takes what is given to it; anything else would be a TypeError there and is one here."""

    def __init__(self, name: str, fails_at: int = -1) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []
        self.fails_at = fails_at

    def init(self, *, project: str, config: dict[str, Any], resume: str, name: str, **more: Any) -> FakeRun:
        assert set(more) == {"id", "dir"}
        self.inits.append({"project": project, "config": config, "resume": resume, "name": name, **more})
        self.runs.append(FakeRun(self.fails_at))
        return self.runs[-1]


def test_a_run_and_its_resumption(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = trained.config.override(out=tmp_path / "run", epochs=1, keep=1, wandb="cloob-tests")
    train(config)
    train(config.override(epochs=2, resume="auto"))
    first, second = fake.inits
    assert first["project"] == "cloob-tests" and first["resume"] == "allow"
    assert first["config"]["loss"]["inv_tau"] == pytest.approx(30)  # the resolved configuration
    # The second goes on in the run of the first; a run begun anew would not.
    assert first["id"] == second["id"] and first["name"] == "run"
    train(config.override(overwrite=True))
    assert fake.inits[2]["id"] != first["id"]
    # All numbers of metrics.jsonl and epochs.jsonl, and nothing else.
    sent = [entry for run in fake.runs[:2] for entry in run.logged]
    steps = [(step, data) for step, data in sent if "train/loss" in data]
    told = json.loads(json.dumps([data for _, data in steps]))
    assert [step for step, _ in steps] == list(range(1, 11))
    expected = [
        {f"train/{k}": v for k, v in line.items() if k != "step" and v is not None}
        for line in json.loads(json.dumps(trained.recorder.of("step")[:5]))
    ]
    for here, there in zip(told[:5], expected, strict=True):
        assert here.keys() == there.keys()
        assert all(here[f"train/{k}"] == there[f"train/{k}"] for k in ("epoch", "samples_seen", "loss", "grad_norm"))
    assert [step for step, data in sent if "epoch/loss" in data] == [5, 10]
    assert fake.runs[0].finished == [{"exit_code": 0}]


def test_a_tracker_that_fails_does_not_end_the_training(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb("wandb", fails_at=3)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        train(trained.config.override(out=tmp_path / "run", epochs=1, wandb="x"))
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5 and len(fake.runs[0].logged) == 2
    assert caplog.text.count("WandB failed (the server is gone) and is left out from here on") == 1


def test_a_tracker_that_cannot_begin_ends_all_ranks_in_one_line(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb("wandb")
    fake.init = lambda **_: (_ for _ in ()).throw(ValueError("no API key configured"))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = trained.config.override(out=tmp_path / "run", epochs=1, wandb="x")
    ranks = fork(tmp_path / "ranks", 2, lambda: train(config) and None)
    assert ranks.wait() == [1, 1]
    for output in ranks.outputs:
        said = output.read_text().splitlines()[-1]
        assert said.endswith("InputError: wandb: no API key configured; log in there, or leave --wandb out")
