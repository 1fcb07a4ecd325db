"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from cloob.cache import use_cache
from cloob.commands.arguments import parse
from cloob.commands.typed import last_value, last_values, take_option, take_recipe
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.models.runs import CHECKPOINTS_FOLDER
from cloob.recipes import get_recipe
from cloob.training.config import TrainConfig
from cloob.training.config.checks import preflight
from cloob.training.config.model import ObjectiveName
from cloob.training.config.pairs import VAL_SPLIT
from cloob.training.config.run import LENGTHS

_USAGE = "[RECIPE | --config FILE]"
_DESCRIPTION = (
    "Trains two towers, starting from a recipe (`cloob recipes` lists them), from the config.json of a run, or from "
    "the defaults below. Under torchrun one process a device: torchrun --nproc-per-node 8 -m cloob train …"
)


def main(words: Sequence[str]) -> int:
    """Trains; exit code 0 when the run reached its end or was asked to stop by SIGTERM."""
    start, rest = read_start(list(words))
    config = parse(TrainConfig, rest, "cloob train", start, usage=_USAGE, description=_DESCRIPTION)
    preflight(config)
    if os.environ.get("RANK", "0") == "0":
        print("cloob: opening data …", file=sys.stderr, flush=True)  # the imports alone take seconds
    use_cache(config.pairs.cache_dir, config.pairs.cache_gb)
    from cloob.commands.work.train import run  # torch: only for a configuration that can begin

    return run(config)


def read_start(words: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration to start from, and the words that change it."""
    file = take_option(words, "--config")
    recipe = take_recipe(words)
    if recipe is not None and file is not None:
        raise InputError(f"both a recipe ({recipe}) and --config {file}: give one of them")
    if recipe is not None:
        start = get_recipe(recipe)
    elif file is not None:
        # What was allowed to one run, which says so in its config.json, is not allowed to the next; nor does it go on.
        start = TrainConfig.from_json(Path(file)).override(overwrite=False, accept_changed_data=False)
        if (Path(file).parent / CHECKPOINTS_FOLDER).is_dir():
            start = start.override(resume="none")
    else:
        start = TrainConfig()
    # A length that is typed takes the place of the start's; its value is read with the other words.
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    typed = [name for name in LENGTHS if f"--{name}" in given]
    start = start.override(**dict.fromkeys(typed, 1)) if len(typed) == 1 else start
    # Another objective does not begin with the scales of the start's.
    objective = last_value(words, "--objective")
    if objective in typing.get_args(ObjectiveName):
        start = start.override(objective=objective)
    # Nor another model with its picture size.
    model = last_value(words, "--model")
    start = start.override(model=model) if model not in (None, "", "None") else start
    # Trained weights of the image tower alone take the place of those of both towers, and the other way round.
    starts = {name: last_value(words, option) for name, option in (("init", "--init"), ("init_image", "--init-image"))}
    typed = [name for name, value in starts.items() if value not in (None, "", "None")]
    start = start.override(**{typed[0]: starts[typed[0]]}) if len(typed) == 1 else start
    # And one way to hold pairs out takes the place of the other.
    if "--val-split" in given and "--val-data" not in given:
        start = start.override(val_data=())
    elif "--val-data" in given and "--val-split" not in given:
        start = start.override(val_split=0.0)
    elif recipe is not None and {"--val-data", "--val-split"}.isdisjoint(given):
        start = _held_out_of(last_values(words, "--data"), start)
    return start, words


def _held_out_of(data: Sequence[str], start: TrainConfig) -> TrainConfig:
    """The demo's held-out pairs judge no others: of those a share is held out, of streamed ones none."""
    if not data or not start.override(data=data).pairs.judged_by_demo:
        return start
    return start.override(val_data=(), val_split=0.0 if any(map(is_remote, data)) else VAL_SPLIT)
