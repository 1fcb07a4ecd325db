"""The words after ``cloob train`` before they are parsed: which of them are options, their values, or a recipe."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Sequence

from cloob.errors import InputError
from cloob.recipes import RECIPES
from cloob.training.config import TrainConfig, hints, leaf_homes


def take_recipe(words: list[str]) -> str | None:
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
    homes = leaf_homes()
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


def last_value(words: list[str], name: str) -> str | None:
    """What ``name VALUE`` or ``name=VALUE`` says last, if anything."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == name:
            found = value if equals else following
    return found


def take_option(words: list[str], name: str) -> str | None:
    """Removes ``name VALUE`` or ``name=VALUE`` from the words."""
    for i, word in enumerate(words):
        if word == name:
            if i + 1 == len(words):
                raise InputError(f"{name} needs a file: the config.json of a run")
            return words.pop(i) and words.pop(i)
        if word.startswith(f"{name}="):
            return words.pop(i).removeprefix(f"{name}=")
    return None
