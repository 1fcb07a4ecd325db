"""Trains by a configuration, and says at the end what the run came to."""

from __future__ import annotations

import logging
import os

from cloob.models.runs import AVERAGED_FOLDER, find_best
from cloob.train.callbacks import RunResult
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.watch.log import ProgressDisplay


def run(config: TrainConfig) -> int:
    """Trains; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.train.align").setLevel(logging.INFO)  # says how far the encoders are
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("cloob.data.open").setLevel(logging.INFO if first else logging.ERROR)  # says what was opened
    result = train(config, callbacks=[ProgressDisplay(title=config.loss.objective)])
    if first:  # torchrun's other processes have nothing to add
        _report(config, result)
    return 0


def _report(config: TrainConfig, result: RunResult) -> None:
    """What the run came to, and where it is."""
    if result.already_finished:
        print(
            f"{result.run}: already finished ({result.epochs} epochs, {result.steps:,} steps); "
            "more --epochs go on, --overwrite or another --out starts anew"
        )
        return
    if result.stopped:
        print(f"stopped by {result.stopped} after step {result.steps:,}; go on with --resume auto")
    print(f"{result.run}: {result.steps:,} steps, {result.samples_seen:,} pairs, {result.seconds:,.0f} s")
    best = find_best(result.run, config.save.best) if config.pairs.val_data else None
    if best is not None:
        print(f"{result.run}:best: {config.save.best} {best[1]:.4g} ({best[0].name})")
    if result.stopped is None and config.towers.average_with_start is not None:
        print(f"{result.run / AVERAGED_FOLDER}: averaged with {config.towers.init}")
