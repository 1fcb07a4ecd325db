"""Trains by a configuration, and says at the end what the run came to."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cloob.commands.advice import lines
from cloob.commands.steps import columns, say_next
from cloob.errors import TooFewPairs
from cloob.models.runs import AVERAGED_FOLDER, EPOCHS_FILE, checkpoint_step, find_best, read_lines
from cloob.train.callbacks import Callback, RunInfo, RunResult
from cloob.train.config import TrainConfig
from cloob.train.config.run import LENGTHS
from cloob.train.loop import train
from cloob.train.optim import warmup_steps
from cloob.train.watch.log import ProgressDisplay


def run(config: TrainConfig, typed: Sequence[str]) -> int:
    """Trains; returns the exit code.

    Args:
        config: The run's.
        typed: The words after ``cloob train`` that it was read from.
    """
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.train.align").setLevel(logging.INFO)  # says how far the encoders are
    logging.getLogger("cloob.train.towers.build").setLevel(logging.INFO)  # says what is held out
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("cloob.data.open").setLevel(logging.INFO if first else logging.ERROR)  # says what was opened
    try:
        result = train(config, callbacks=[_Advice(typed), ProgressDisplay(title=config.loss.objective)])
    except TooFewPairs as error:
        if first:
            _advise(config, error.pairs, 0, 0, typed)
        raise
    if first:  # torchrun's other processes have nothing to add
        _report(config, result)
    return 0 if result.checkpoint is not None else 1


class _Advice(Callback):
    """Says before the first step of a small run what it does with few pairs, and what would do better."""

    def __init__(self, typed: Sequence[str]) -> None:
        self.typed = typed

    def on_start(self, info: RunInfo) -> None:
        """Prints it; nothing for a run that goes on."""
        if info.rank or info.start_step:
            return
        warmup = warmup_steps(info.config.optim, info.total_steps)
        _advise(info.config, info.pairs_per_epoch, info.total_steps, warmup, self.typed)


def _advise(config: TrainConfig, pairs: int, steps: int, warmup: int, typed: Sequence[str]) -> None:
    for line in lines(config, pairs, steps, warmup, typed):
        print(f"cloob: {line}" if not line.startswith(" ") else line, file=sys.stderr)


def _report(config: TrainConfig, result: RunResult) -> None:
    """What the run came to, and where it is."""
    if result.already_finished:
        length = next(name for name in LENGTHS if getattr(config.run, name) is not None)
        on = f"more --{length} go on"
        if result.out_of_patience:
            on = "the patience was used up; a larger --patience, or 0, goes on"
        epochs = f"{result.epochs} epochs, " if length == "epochs" else ""
        print(
            f"{result.run}: already finished ({epochs}{result.steps:,} steps); "
            f"{on}, another --out or --overwrite in place of --resume starts anew"
        )
        return
    if result.stopped:
        print(f"stopped by {result.stopped} after step {result.steps:,}; go on with --resume auto")
    print(f"{result.run}: {result.steps:,} steps, {result.samples_seen:,} pairs, {result.seconds:,.0f} s")
    best = find_best(result.run, config.save.best) if config.pairs.holds_out else None
    if result.out_of_patience:
        print(_early(config, result, best[0] if best is not None else None))
    if best is not None:
        print(f"{result.run}:best: {config.save.best} {best[1]:.4g} ({best[0].name})")
    if result.stopped is None and config.towers.average_with_start is not None:
        print(f"{result.run / AVERAGED_FOLDER}: averaged with {config.towers.init}")
    if result.stopped is None and result.checkpoint is not None:
        say_next(*_next(config, f"{result.run}:best" if best is not None else str(result.run)))


def _early(config: TrainConfig, result: RunResult, best: Path | None) -> str:
    """That a run's patience ended it, and since when nothing got better."""
    looks = f"{config.run.patience} looks" if config.run.patience > 1 else "1 look"
    step = checkpoint_step(best) if best is not None else -1
    epochs = [line["epoch"] for line in read_lines(result.run / EPOCHS_FILE) if line.get("step") == step]
    return (
        f"{result.run}: ended early at epoch {result.epochs}: {looks} at the held-out pairs gave no better "
        f"{config.save.best}{f' after epoch {epochs[-1]}, the best' if epochs else ''}"
    )


def _next(config: TrainConfig, model: str) -> list[list[str | Path]]:
    """Look at the model: on held-out pairs of their own, at its geometry, at what it finds; two of these at most."""
    pairs, out = config.pairs, config.save.out
    named = columns(pairs.image_column, pairs.caption_column)
    commands: list[list[str | Path]] = []
    if pairs.val_data:
        commands.append(["eval", model, "--retrieval", *pairs.val_data, *named, "--out", out / "eval"])
    judged_on = (pairs.val_data or pairs.data)[0]
    commands.append(["analyze", out, "--pairs", judged_on, *named, "--out", out / "analyze"])
    if Path(pairs.data[0]).is_dir():
        commands.append(["index", pairs.data[0], "--model", model, "--out", out / "index"])
    return commands[-2:]
