"""Experiment trackers beside ``metrics.jsonl``, which stays the source of truth: Weights & Biases, Trackio."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cloob.errors import InputError, one_line, require
from cloob.files import write_whole
from cloob.train.callbacks import Callback, RunInfo, RunResult
from cloob.train.config.run import LogConfig
from cloob.train.ranks import on_rank_zero

logger = logging.getLogger(__name__)


def make_trackers(config: LogConfig) -> list[Callback]:
    """The trackers that a configuration names.

    Raises:
        InputError: One of them is not installed.
    """
    chosen: list[tuple[Literal["wandb", "trackio"], str | None]] = [
        ("wandb", config.wandb),
        ("trackio", config.trackio),
    ]
    return [Tracker(library, project) for library, project in chosen if project is not None]


class Tracker(Callback):
    """Hands the numbers to ``wandb`` or ``trackio``, on rank 0: steps as ``train/…``, epochs as ``epoch/…``.

    A resumed run goes on in the tracker's own run, by an id that the run folder keeps. wandb takes a step only once, so
    the steps between the checkpoint and the kill keep there what was logged first. A tracker that cannot begin ends the
    run before its first step, as InputError on every rank; one that fails while training is dropped with a warning.

    Args:
        library: Which one.
        project: The project's name there.

    Raises:
        InputError: The library is not installed.
    """

    def __init__(self, library: Literal["wandb", "trackio"], project: str) -> None:
        self.library = library
        self.project = project
        self._module: Any = require(library, library)  # on every rank: an error on one alone would leave the others
        self._run: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Begins a run there, or goes on in the one before."""
        on_rank_zero(lambda: self._begin(info))

    def _begin(self, info: RunInfo) -> None:
        token = _run_id(info.run / f"{self.library}.json", info.start_step > 0)
        settings: dict[str, Any] = {"project": self.project, "config": info.config.to_dict(), "resume": "allow"}
        if self.library == "wandb":
            settings |= {"id": token, "name": info.run.name, "dir": str(info.run)}
        else:
            settings |= {"name": f"{info.run.name}-{token}"}  # trackio knows a run by its name
        try:
            self._run = self._module.init(**settings)
        except Exception as error:  # whatever a client raises without a login or a server
            raise InputError(
                f"{self.library}: {one_line(error)}; log in there, or leave --{self.library} out"
            ) from error

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of a step."""
        self._log("train", metrics)

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of an epoch."""
        self._log("epoch", metrics)

    def on_end(self, result: RunResult | None) -> None:
        """Ends the run there; one that broke off is marked as failed, where the tracker knows that."""
        if self._run is None:
            return
        run, self._run = self._run, None
        try:
            if self.library == "wandb":
                run.finish(exit_code=int(result is None))
            else:
                run.finish()
        except Exception as error:  # an error here would hide the one that ended the training
            logger.warning("%s could not be finished (%s)", self.library, error)

    def _log(self, group: str, metrics: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        numbers = {f"{group}/{name}": v for name, v in metrics.items() if name != "step" and isinstance(v, int | float)}
        try:
            self._run.log(numbers, step=metrics["step"])
        except Exception as error:  # whatever a client raises when its server or disk is gone
            logger.warning("%s failed (%s) and is left out from here on; metrics.jsonl goes on", self.library, error)
            self._run = None


def _run_id(file: Path, resumed: bool) -> str:
    """The id of this run with the tracker: kept in the run folder, new when the run is."""
    if resumed and file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    token = secrets.token_hex(4)
    write_whole(file, json.dumps({"id": token}) + "\n")
    return token
