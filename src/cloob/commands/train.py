"""``cloob train``: train on your image-caption pairs, or a named recipe."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import cloob
from cloob.commands.console import (
    print_length,
    say,
    say_next,
    say_next_of_pictures,
)
from cloob.commands.options import (
    HELP_FLAGS,
    Field,
    docs_of,
    fields_of,
    pages,
    parse_values,
    show_help,
)
from cloob.errors import InputError, Stopped
from cloob.family import ObjectiveName
from cloob.heads.config import read_config
from cloob.models.runs import CHECKPOINTS_FOLDER, find_best
from cloob.recipes import HEADS, RECIPES, describe, starts_of

if TYPE_CHECKING:
    from cloob.training.callbacks import RunResult

Config = cloob.TrainConfig | cloob.HeadsConfig


@dataclass(frozen=True)
class Words:
    """What there is beside settings."""

    config: Annotated[Path | None, "FILE"] = None
    """Settings in place of the defaults, also those that have no option here: JSON or
    TOML, such as the config.json of a run.
    """
    list: bool = False
    """Print the recipes and the names of towers."""


def read(words: Sequence[str]) -> Config | None:
    """The configuration that the words describe: a recipe, a file over it, and options
    over both; None for ``--list``.
    """
    recipe = words[0] if words and not words[0].startswith("-") else None
    page = page_of(recipe, words)
    kind = cloob.TrainConfig if page == "train" else cloob.HeadsConfig
    fields = {**fields_of(kind), **fields_of(Words)}
    if HELP_FLAGS & set(words):
        help_on(kind, page, fields, recipe)
    values = parse_values(page, fields, words if recipe is None else words[1:])
    if values.pop("list", False):
        if len(words) > 1:
            raise InputError("--list stands alone: cloob train --list")
        return None
    file = values.pop("config", None)
    start = recipe_of(
        recipe or page.partition(" ")[2], values.get("objective"), values.get("model")
    )
    if file is not None:
        start = merged(start, file)
    return start.override(**values)


def recipe_of(name: str, objective: ObjectiveName | None, model: str | None) -> Config:
    """The settings of a recipe; without a name the defaults of towers."""
    if not name:
        return cloob.TrainConfig()
    return cloob.get_recipe(name, objective=objective, model=model)


def merged(start: Config, file: Path) -> Config:
    """The configuration with a file over it; of a run's file without what it says of
    that run's folder.
    """
    start = start.merge_file(file).override(overwrite=False)
    if (file.parent / CHECKPOINTS_FOLDER).is_dir():
        # it is of a run, and this one does not go on with that
        start = start.override(resume="none")
    return start


def page_of(recipe: str | None, words: Sequence[str]) -> str:
    """The page of the help whose options the words may use: by the recipe, or by the
    configuration of a run of heads in ``--config``.
    """
    if recipe is not None:
        if recipe not in HEADS:
            return "train"
        return "train vectors" if recipe == "vectors" else "train align"
    for word, following in itertools.pairwise([*words, ""]):
        option, _, value = word.partition("=")
        file = Path(value or following)
        if option == "--config" and file.suffix == ".json" and file.is_file():
            config = read_config(file)
            if config is not None:
                return "train vectors" if config.has_vectors else "train align"
    return "train"


def help_on(
    kind: type[Config],
    page: str,
    fields: Mapping[str, Field],
    recipe: str | None,
) -> NoReturn:
    """Prints the help of a recipe, or of towers from the defaults."""
    about, starts = pages()[page]["about"], {}
    if recipe is not None:
        about = f"{describe(recipe)}\n{about}"
        starts = starts_of(recipe)
    show_help(page, fields, {**docs_of(kind), **docs_of(Words)}, about, starts)


def print_choices() -> int:
    """Prints the recipes and the names of the towers."""
    from cloob.models.source import known_models

    width = max(map(len, RECIPES))
    for name in RECIPES:
        print(f"{name:<{width}}  {describe(name)}")
    print("\ntowers (--model):", *known_models(), sep="\n")
    say_next(["train", "align", "--data", "demo"])
    return 0


def run(config: Config | None) -> int:
    """Trains, or without a configuration prints what can be trained."""
    if config is None:
        return print_choices()
    if isinstance(config, cloob.HeadsConfig):
        from cloob.commands import train_heads

        return train_heads.run(config)
    return run_training(config)


def run_training(config: cloob.TrainConfig) -> int:
    """Trains under a progress display; 0 when the run reached its end or was stopped by
    SIGTERM.
    """
    from cloob.training.preflight import preflight

    preflight(config)
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:  # torchrun's other processes have nothing to say
        say("opening data …")  # the imports alone take seconds
    level = logging.INFO if is_first else logging.ERROR
    logging.getLogger("cloob.training").setLevel(logging.INFO)
    logging.getLogger("cloob.data.open").setLevel(level)  # what was opened
    from cloob.training.callbacks import ProgressDisplay

    try:
        display = ProgressDisplay(title=config.objective)
        result = cloob.train(config, callbacks=[display])
    except Stopped as stopped:
        result = stopped.result
    if is_first:
        print_result(config, result)
    return 1 if result.checkpoint is None else 0


def print_result(config: cloob.TrainConfig, result: RunResult) -> None:
    """Says what a run came to, and what may come next."""
    if result.stopped:
        step = f"step {result.steps:,}"
        print(f"stopped by {result.stopped} after {step}; go on with --resume auto")
    print_length(result, config.patience)
    if result.already_finished:
        return
    best = find_best(result.run, config.best)
    if best is not None:
        print(f"{result.run}:best: {config.best} {best[1]:.4g} ({best[0].name})")
    if result.stopped is None and result.checkpoint is not None:
        say_next_of_pictures(config.out, config.data[0], config.holds_out)
