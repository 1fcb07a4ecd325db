"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.commands.options import parse
from cloob.commands.terminal import say_next
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.training.callbacks import RunResult
    from cloob.training.config import TrainConfig

_USAGE = "[RECIPE | --config FILE]"
_DESCRIPTION = (
    "Trains two towers, starting from a recipe (`cloob recipes` lists them), from the config.json of a run, or from "
    "the defaults below. Under torchrun one process a device: torchrun --nproc-per-node 8 -m cloob train …"
)


def read(words: Sequence[str]) -> TrainConfig:
    """The configuration that the words describe: a recipe or a file first, then what changes of it."""
    from cloob.recipes import get_recipe
    from cloob.training.config import TrainConfig

    name, equals, file = (words[0] if words else "--").partition("=")
    rest = list(words)
    if name == "--config":
        rest = rest[1:] if equals else rest[2:]
        file = file or (words[1] if len(words) > 1 else "")
        if not file:
            raise InputError("--config needs a file: the config.json of a run")
        start = _start_again(TrainConfig.from_json(Path(file)), Path(file))
    elif not name.startswith("-"):
        start, rest = get_recipe(name), rest[1:]
    else:
        start = TrainConfig()
    typed = _typed(rest)
    if "config" in typed:
        raise InputError("--config FILE stands first, in place of a recipe")
    start = _make_room(start, typed)
    return parse(TrainConfig, rest, "cloob train", start, usage=_USAGE, description=_DESCRIPTION)


def check(config: TrainConfig) -> None:
    from cloob.training.config.checks import preflight

    preflight(config)


def _start_again(config: TrainConfig, file: Path) -> TrainConfig:
    """The configuration of a run, for another one: it may not overwrite, and does not go on."""
    from cloob.models.runs import CHECKPOINTS_FOLDER

    config = config.override(overwrite=False, accept_changed_data=False)
    return config.override(resume="none") if (file.parent / CHECKPOINTS_FOLDER).is_dir() else config


def _typed(words: Sequence[str]) -> dict[str, list[str]]:
    """The values of each option; of one that stands there twice, the last."""
    typed: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = typed[name.replace("-", "_")] = [value] if equals else []
        else:
            values.append(word)
    return typed


def _make_room(start: TrainConfig, typed: Mapping[str, list[str]]) -> TrainConfig:
    """The start without what typed options take the place of, see ``TrainConfig.override``."""
    from cloob.data.shards.spec import is_remote
    from cloob.training.config.pairs import VAL_SPLIT
    from cloob.training.config.run import LENGTHS

    changes: dict[str, Any] = {}
    lengths = [name for name in LENGTHS if name in typed]
    if len(lengths) == 1:
        changes[lengths[0]] = 1  # its value is read with the other words
    for name in ("objective", "model", "init", "init_image"):
        if (values := typed.get(name)) and values[0] not in ("", "None"):
            changes[name] = values[0]
    start = start.override(**changes)
    if "val_split" in typed and "val_data" not in typed:
        return start.override(val_data=())
    if "val_data" in typed and "val_split" not in typed:
        return start.override(val_split=0.0)
    data = typed.get("data")
    if data and "val_data" not in typed and start.override(data=data).pairs.judged_by_demo:
        # The demo's held-out pairs judge no others: of those a share is held out, of streamed ones none.
        return start.override(val_data=(), val_split=0.0 if any(map(is_remote, data)) else VAL_SPLIT)
    return start


def run(config: TrainConfig) -> int:
    """Trains; 0 when the run reached its end or was asked to stop by SIGTERM."""
    first = os.environ.get("RANK", "0") == "0"  # torchrun's other processes have nothing to say
    if first:
        print("cloob: opening data …", file=sys.stderr, flush=True)  # the imports alone take seconds
    import logging

    from cloob.cache import use_cache
    from cloob.training.loop import train
    from cloob.training.watch.log import ProgressDisplay

    use_cache(config.pairs.cache_dir, config.pairs.cache_gb)
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.training.align").setLevel(logging.INFO)  # says how far the encoders are
    logging.getLogger("cloob.training.towers.build").setLevel(logging.INFO)  # says what is held out, and the batch size
    logging.getLogger("cloob.data.open").setLevel(logging.INFO if first else logging.ERROR)  # says what was opened
    result = train(config, callbacks=[ProgressDisplay(title=config.loss.objective)])
    if first:
        _report(config, result)
    return 0 if result.checkpoint is not None else 1


def _report(config: TrainConfig, result: RunResult) -> None:
    """What the run came to, and where it is."""
    from cloob.models.runs import AVERAGED_FOLDER, find_best
    from cloob.training.config.run import LENGTHS

    run, metric = result.run, config.save.best
    if result.already_finished:
        length = next(name for name in LENGTHS if getattr(config.run, name) is not None)
        epochs = f"{result.epochs} epochs, " if length == "epochs" else ""
        on = f"more --{length} go on"
        if result.out_of_patience:
            on = "the patience was used up; a larger --patience, or 0, goes on"
        anew = "another --out or --overwrite in place of --resume starts anew"
        print(f"{run}: already finished ({epochs}{result.steps:,} steps); {on}, {anew}")
        return
    if result.stopped:
        print(f"stopped by {result.stopped} after step {result.steps:,}; go on with --resume auto")
    print(f"{run}: {result.steps:,} steps, {result.samples_seen:,} pairs, {result.seconds:,.0f} s")
    best = find_best(run, metric) if config.pairs.holds_out else None
    if best is not None and result.out_of_patience:
        worth = f"{100 * best[1]:.0f} % recall" if metric == "val_recall" else f"{metric} {best[1]:.4g}"
        said = f"no better since {_epoch_of(run, best[0])} ({worth}), kept as {run}:best"
        print(f"stopped at epoch {result.epochs}: {said}")
    elif best is not None:
        print(f"{run}:best: {metric} {best[1]:.4g} ({best[0].name})")
    if result.stopped is None and config.towers.average_with_start is not None:
        print(f"{run / AVERAGED_FOLDER}: averaged with {config.towers.init}")
    if result.stopped is None and result.checkpoint is not None:
        out, data = config.save.out, config.pairs.data[0]
        judge: list[list[str | Path]] = [["eval", out, "--held-out"]] if config.pairs.holds_out else []
        pictures = data if Path(data).is_dir() else "PICTURES"
        say_next(*judge, ["index", pictures, "--model", out, "--out", "pictures.idx"])


def _epoch_of(run: Path, checkpoint: Path) -> str:
    from cloob.models.runs import EPOCHS_FILE, checkpoint_step, read_lines

    step = checkpoint_step(checkpoint)
    epochs = [f"epoch {line['epoch']}" for line in read_lines(run / EPOCHS_FILE) if line.get("step") == step]
    return epochs[-1] if epochs else checkpoint.name
