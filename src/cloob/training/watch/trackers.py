"""Weights & Biases beside ``metrics.jsonl``, which stays the source of truth."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.files import write_whole
from cloob.training.callbacks import Callback, RunInfo, RunResult
from cloob.training.ranks import on_rank_zero

logger = logging.getLogger(__name__)


class WandB(Callback):
    """Hands the numbers of rank 0 to ``wandb``: steps as ``train/…``, epochs as ``epoch/…``.

    A resumed run goes on in the same run there, by an id in the run folder. wandb takes a step only once: steps between
    the checkpoint and the kill keep what was logged first. If it cannot begin, every rank raises InputError before the
    first step; if it fails while training, it is dropped with a warning.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._module: Any = require("wandb", "wandb")  # on every rank: an error on one alone would leave the others
        self._run: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Begins a run there, or goes on in the one before."""
        on_rank_zero(lambda: self._begin(info))

    def _begin(self, info: RunInfo) -> None:
        try:
            self._run = self._module.init(
                project=self.project,
                config=info.config.to_dict(),
                resume="allow",
                id=_run_id(info.run / "wandb.json", info.start_step > 0),
                name=info.run.name,
                dir=str(info.run),
            )
        except Exception as error:  # whatever a client raises without a login or a server
            raise InputError(f"wandb: {one_line(error)}; log in there, or leave --wandb out") from error

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of a step."""
        self._log("train", metrics)

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """Logs every number of an epoch."""
        self._log("epoch", metrics)

    def on_end(self, result: RunResult | None) -> None:
        """Ends the run there; one that broke off is marked as failed."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=int(result is None))
        except Exception as error:  # an error here would hide the one that ended the training
            logger.warning("wandb could not be finished (%s)", error)

    def _log(self, group: str, metrics: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        numbers = {f"{group}/{name}": v for name, v in metrics.items() if name != "step" and isinstance(v, int | float)}
        try:
            self._run.log(numbers, step=metrics["step"])
        except Exception as error:  # whatever a client raises when its server or disk is gone
            logger.warning("wandb failed (%s) and is left out from here on; metrics.jsonl goes on", error)
            self._run = None


def _run_id(file: Path, resumed: bool) -> str:
    """The id of this run at wandb: kept in the run folder, new when the run is."""
    if resumed and file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    token = secrets.token_hex(4)
    write_whole(file, json.dumps({"id": token}) + "\n")
    return token
