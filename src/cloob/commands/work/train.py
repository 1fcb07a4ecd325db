"""Trains by a configuration, and says at the end what the run came to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cloob.commands.steps import say_next
from cloob.models.runs import AVERAGED_FOLDER, EPOCHS_FILE, checkpoint_step, find_best, read_lines
from cloob.training.callbacks import RunResult
from cloob.training.config import TrainConfig
from cloob.training.config.parts import LENGTHS
from cloob.training.loop import train
from cloob.training.watch.log import ProgressDisplay


def run(config: TrainConfig) -> int:
    """Trains; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.training.align").setLevel(logging.INFO)  # says how far the encoders are
    logging.getLogger("cloob.training.build").setLevel(logging.INFO)  # says what is held out, and the batch size
    logging.getLogger("cloob.training.watch.profiling").setLevel(logging.INFO)  # says where the profile is
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("cloob.data.open").setLevel(logging.INFO if first else logging.ERROR)  # says what was opened
    result = train(config, callbacks=[ProgressDisplay(title=config.loss.objective)])
    if first:  # torchrun's other processes have nothing to add
        _report(config, result)
    return 0 if result.checkpoint is not None else 1


def _report(config: TrainConfig, result: RunResult) -> None:
    """What the run came to, and where it is."""
    if result.already_finished:
        length = next(name for name in LENGTHS if getattr(config.run, name) is not None)
        on = f"more {'samples' if length == 'samples' else f'--{length}'} go on"
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
    if best is not None and result.out_of_patience:
        print(_early(result, config.save.best, *best))
    elif best is not None:
        print(f"{result.run}:best: {config.save.best} {best[1]:.4g} ({best[0].name})")
    if result.stopped is None and config.towers.average_with_start is not None:
        print(f"{result.run / AVERAGED_FOLDER}: averaged with {config.towers.init}")
    if result.stopped is None and result.checkpoint is not None:
        say_next(*_next(config))


def _early(result: RunResult, metric: str, best: Path, value: float) -> str:
    """That a run's patience ended it, and since when nothing got better."""
    step = checkpoint_step(best)
    epochs = [f"epoch {line['epoch']}" for line in read_lines(result.run / EPOCHS_FILE) if line.get("step") == step]
    worth = f"{100 * value:.0f} % recall" if metric == "val_recall" else f"{metric} {value:.4g}"
    since = epochs[-1] if epochs else best.name
    return f"stopped at epoch {result.epochs}: no better since {since} ({worth}), kept as {result.run}:best"


def _next(config: TrainConfig) -> list[list[str | Path]]:
    """How good the model is on the held-out pairs, and what it finds among pictures."""
    out, data = config.save.out, config.pairs.data[0]
    judge: list[list[str | Path]] = [["eval", out, "--held-out"]] if config.pairs.holds_out else []
    pictures = data if Path(data).is_dir() else "PICTURES"
    return [*judge, ["index", pictures, "--model", out, "--out", "pictures.idx"]]
