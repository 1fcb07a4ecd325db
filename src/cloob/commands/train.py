"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cloob.cache import use_cache
from cloob.commands.arguments import parse, tyro
from cloob.commands.typed import last_value, take_option, take_recipe
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.models.runs import CHECKPOINTS_FOLDER
from cloob.recipes import get_recipe
from cloob.training.config import OTHER_FLAGS, USUAL_FLAGS, TrainConfig, hints, leaf_homes, parts
from cloob.training.config.checks import preflight
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
    given = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    typed = [leaf for leaf in leaf_homes() if given & {_option(leaf), _option(f"no-{leaf}")}]
    for leaf in typed:
        if leaf not in USUAL_FLAGS + OTHER_FLAGS:
            raise InputError(
                f"{_option(leaf)} is set in a file: --config more.toml, with the lines [{leaf_homes()[leaf]}] and "
                f"{leaf} = …"
            )
    helps = _helps() if {"--help", "-h"} & set(words) else {}
    groups = [_group(name, leaves, start, helps) for name, leaves in (("usual", USUAL_FLAGS), ("other", OTHER_FLAGS))]
    options: Any = dataclasses.make_dataclass("Options", [(group.__name__, group) for group in groups], frozen=True)
    parsed = parse(options, words, "cloob train", usage=_USAGE, description=_DESCRIPTION)
    values = vars(parsed.usual) | vars(parsed.other)
    config = start.override(**{leaf: values[leaf] for leaf in typed})
    if recipe is not None and not {"val_data", "val_split"} & set(typed) and config.pairs.judged_by_demo:
        # The demo's held-out pairs judge no others: of those a share is held out, of streamed ones none.
        config = config.override(val_split=0.0 if any(map(is_remote, config.pairs.data)) else VAL_SPLIT)
    return config


def _option(leaf: str) -> str:
    return f"--{leaf.replace('_', '-')}"


def _group(name: str, leaves: Sequence[str], start: TrainConfig, helps: Mapping[str, str]) -> type:
    """A dataclass of some leaves, as the command line shows them, with the values of ``start``."""
    fields: list[Any] = []
    for leaf in leaves:
        part = getattr(start, leaf_homes()[leaf])
        kind: Any = Annotated[hints(type(part))[leaf], tyro.conf.arg(help=helps.get(leaf))]
        fields.append((leaf, kind, dataclasses.field(default=getattr(part, leaf))))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def _helps() -> dict[str, str]:
    """The docstring under each field of a configuration; they are in the source alone."""
    helps = {}
    for kind in ast.parse(inspect.getsource(parts)).body:
        for field, text in itertools.pairwise(getattr(kind, "body", ())):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                helps[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return helps
