"""``cloob train``: a recipe or a configuration file, and what the command line changes of it."""

from __future__ import annotations

import itertools
import os
import sys
import typing
from collections.abc import Collection, Sequence
from pathlib import Path

from cloob.cache import use_cache
from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.recipes import RECIPES, get_recipe
from cloob.train.config import TrainConfig
from cloob.train.config.checks import preflight
from cloob.train.config.model import ObjectiveName
from cloob.train.config.run import LENGTHS
from cloob.train.config.strict import hints, leaf_homes

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

    return run(config, words)


def read_start(words: list[str]) -> tuple[TrainConfig, list[str]]:
    """The configuration to start from, and the words that change it."""
    file = _take_option(words, "--config")
    recipe = _take_recipe(words)
    if recipe is not None and file is not None:
        raise InputError(f"both a recipe ({recipe}) and --config {file}: give one of them")
    if recipe is not None:
        start = get_recipe(recipe)
    elif file is not None:
        # What was allowed to one run, which says so in its config.json, is not allowed to the next.
        start = TrainConfig.from_json(Path(file)).override(overwrite=False, accept_changed_data=False)
    else:
        start = TrainConfig()
    # A length that is typed takes the place of the start's; its value is read with the other words.
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    typed = [name for name in LENGTHS if f"--{name}" in given]
    start = start.override(**dict.fromkeys(typed, 1)) if len(typed) == 1 else start
    # Another objective does not begin with the scales of the start's.
    objective = _value(words, "--objective")
    if objective in typing.get_args(ObjectiveName):
        start = start.override(objective=objective)
    # And one way to hold pairs out takes the place of the other.
    if "--val-split" in given and "--val-data" not in given:
        start = start.override(val_data=())
    elif "--val-data" in given and "--val-split" not in given:
        start = start.override(val_split=0.0)
    return start, words


def words_without(words: Sequence[str], options: Collection[str]) -> list[str]:
    """The words but for these options and their values."""
    return [word for word, option in zip(words, _options(words), strict=True) if option not in options]


def _take_recipe(words: list[str]) -> str | None:
    """Removes the recipe's name, wherever it stands: the word that is no option's value."""
    recipes = [place for place, option in enumerate(_options(words)) if option is None]
    if len(recipes) > 1:
        names = " and ".join(words[place] for place in recipes)
        raise InputError(f"{names} are no options' values: one recipe can be given (cloob train --help)")
    return words.pop(recipes[0]) if recipes else None


def _options(words: Sequence[str]) -> list[str | None]:
    """The option that each word is, or is a value of; None for a recipe's name.

    An option of any number of values ends at the next option, and at a recipe's name unless that is its first value.
    """
    found: list[str | None] = []
    option = None
    taken, more = 0, False  # values that the option still takes, and whether it may take others
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0].replace("_", "-")
            taken, more = (0, False) if "=" in word else _values(word)
        elif taken:
            taken -= 1
        elif not word.startswith("-") and (not more or word.replace("_", "-") in RECIPES):
            found.append(None)
            continue
        found.append(option)
    return found


def _values(option: str) -> tuple[int, bool]:
    """How many values an option takes at least, and whether it may take more."""
    leaf = option.removeprefix("--").replace("-", "_")
    homes = leaf_homes(TrainConfig)
    if leaf not in homes:
        switch = leaf in ("help", "debug") or leaf.removeprefix("no_") in homes
        return (0, False) if switch else (1, True)  # an unknown option is refused later, with all that belongs to it
    kind = hints(hints(TrainConfig)[homes[leaf]])[leaf]
    if kind is bool:
        return 0, False
    if typing.get_origin(kind) is not tuple:
        return 1, False
    values = typing.get_args(kind)
    return (1, True) if Ellipsis in values else (len(values), False)


def _value(words: list[str], name: str) -> str | None:
    """What ``name VALUE`` or ``name=VALUE`` says last, if anything."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        option, equals, value = word.partition("=")
        if option == name:
            found = value if equals else following
    return found


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
