"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from cloob.cache import use_cache
from cloob.commands.arguments import parse
from cloob.commands.typed import last_value, take_option, take_recipe
from cloob.data.shards.spec import is_remote
from cloob.models.runs import CHECKPOINTS_FOLDER
from cloob.recipes import get_recipe
from cloob.training.config import TrainConfig
from cloob.training.config.checks import preflight
from cloob.training.config.options import changed, options, typed_leaves
from cloob.training.config.parts import VAL_SPLIT, ObjectiveName

_USAGE = "[RECIPE] [--config FILE]"
_DESCRIPTION = (
    "Trains two towers, starting from a recipe (`cloob recipes` lists them) or from the defaults below. --config FILE "
    "(JSON or TOML, such as the config.json of a run) changes them, and can set what has no option here; docs/"
    "training-step.md lists it. Under torchrun one process a device: torchrun --nproc-per-node 8 -m cloob train …"
)


def main(words: Sequence[str]) -> int:
    """Trains; exit code 0 when the run reached its end or was asked to stop by SIGTERM."""
    config = read_config(list(words))
    preflight(config)
    if os.environ.get("RANK", "0") == "0":
        print("cloob: opening data …", file=sys.stderr, flush=True)  # the imports alone take seconds
    use_cache(config.pairs.cache_dir, config.pairs.cache_gb)
    from cloob.commands.work.train import run  # torch: only for a configuration that can begin

    return run(config)


def read_config(words: list[str]) -> TrainConfig:
    """The configuration that the words describe: a recipe, a file over it, and options over both."""
    file = take_option(words, "--config")
    recipe = take_recipe(words)
    start = TrainConfig()
    if recipe is not None:
        objective, model = last_value(words, "--objective"), last_value(words, "--model")
        known = objective if objective in typing.get_args(ObjectiveName) else "cloob"  # else it is refused below
        start = get_recipe(recipe, objective=typing.cast(ObjectiveName, known), model=model or None)
    if file is not None:
        # What was allowed to one run, which says so in its config.json, is not allowed to the next; nor does it go on.
        start = start.merge_file(file).override(overwrite=False, accept_changed_data=False)
        if (Path(file).parent / CHECKPOINTS_FOLDER).is_dir():
            start = start.override(resume="none")
    typed = typed_leaves(words)
    parsed = parse(options(start, words), words, "cloob train", usage=_USAGE, description=_DESCRIPTION)
    config = changed(start, parsed, typed)
    if recipe is not None and not {"val_data", "val_split"} & set(typed) and config.pairs.judged_by_demo:
        # The demo's held-out pairs judge no others: of those a share is held out, of streamed ones none.
        config = config.override(val_split=0.0 if any(map(is_remote, config.pairs.data)) else VAL_SPLIT)
    return config
