"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.train.config import TrainConfig
from cloob.train.config.checks import preflight

if TYPE_CHECKING:
    from cloob.train.callbacks import RunResult

_USAGE = "[RECIPE | --config FILE]"
_DESCRIPTION = (
    "Trains two towers, starting from a recipe (`cloob recipes` lists them), from the config.json of a run, or from "
    "the defaults below. Under torchrun one process a device: torchrun --nproc-per-node 8 -m cloob.cli train …"
)


def main(words: Sequence[str]) -> int:
    """Trains; exit code 0 when the run reached its end or was asked to stop by SIGTERM."""
    start, rest = _start(list(words))
    config = parse(TrainConfig, rest, "cloob train", start, usage=_USAGE, description=_DESCRIPTION)
    preflight(config)
    if os.environ.get("RANK", "0") == "0":
        print("cloob: opening data …", file=sys.stderr, flush=True)  # the imports alone take seconds

    from cloob.train.loop import train
    from cloob.train.watch.log import ProgressDisplay

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
    from cloob.models.store import find_best

    if result.already_finished:
        print(
            f"{result.run}: already finished ({result.epochs} epochs, {result.steps:,} steps); nothing was written; "
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
        print(f"{result.run / 'averaged'}: averaged with {config.towers.init}")


def _start(words: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """The configuration to start from, and the words that change it."""
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    file = _take_option(words, "--config")
    if recipe is not None and file is not None:
        raise InputError(f"both a recipe ({recipe}) and --config {file}: give one of them")
    if recipe is not None:
        from cloob.recipes import get_recipe

        return get_recipe(recipe), words
    if file is None:
        return None, words
    # What was allowed to one run, which says so in its config.json, is not allowed to the next.
    return TrainConfig.from_json(Path(file)).override(overwrite=False, accept_changed_data=False), words


def _take_option(words: list[str], name: str) -> str | None:
    """Removes ``name VALUE`` or ``name=VALUE`` from the words."""
    for i, word in enumerate(words):
        if word == name:
            if i + 1 == len(words):
                raise InputError(f"{name} needs a file: the config.json of a run")
            return words.pop(i) and words.pop(i)
        if word.startswith(f"{name}="):
            return words.pop(i).removeprefix(f"{name}=")
    return None
