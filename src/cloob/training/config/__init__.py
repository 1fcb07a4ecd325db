"""What a training run is made of: frozen dataclasses, checked as they are made, nested
in ``TrainConfig``.

Here they are changed by leaf, written as JSON and read back. Leaf names are unique
across the parts: on the command line and in ``override`` a leaf goes by its name
(``--lr``, not ``--optim.lr``). No torch is imported here.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError, nearest, one_line, require
from cloob.family import ALIASES, FAMILY
from cloob.models.importing import read_json
from cloob.training.config import parts


@dataclass(frozen=True)
class TrainConfig:
    """A full training run.

    Example:
        >>> from cloob import TrainConfig
        >>> config = TrainConfig().override(data=["demo"], model="tiny-vit")
        >>> config = config.override(lr=5e-4, epochs=3)
        >>> config.optim.lr, config.run.epochs, config.pairs.data
        (0.0005, 3, ('demo',))
        >>> TrainConfig.from_dict(config.to_dict()) == config
        True
    """

    pairs: parts.PairsConfig = field(default_factory=parts.PairsConfig)
    towers: parts.TowersConfig = field(default_factory=parts.TowersConfig)
    loss: parts.LossConfig = field(default_factory=parts.LossConfig)
    optim: parts.OptimConfig = field(default_factory=parts.OptimConfig)
    run: parts.RunConfig = field(default_factory=parts.RunConfig)
    save: parts.SaveConfig = field(default_factory=parts.SaveConfig)
    log: parts.LogConfig = field(default_factory=parts.LogConfig)
    given: parts.GivenConfig = field(default_factory=parts.GivenConfig)

    @property
    def holds_out(self) -> bool:
        return bool(
            self.pairs.val_data or self.pairs.val_split or self.given.given_held_out
        )

    def override(self, **leaves: Any) -> TrainConfig:
        """A copy with some leaves changed, wherever they sit:
        ``config.override(lr=1e-4, epochs=3)``.

        Some leaves take the place of others, unless these are given, too: a length of
        the run (``epochs``, ``samples`` or ``steps``) that of the length before;
        another objective begins with its τ⁻¹, β and scale, another model with its
        picture size; held-out pairs (``val_data``) and ``val_split`` replace
        each other. In place of the demo's held-out pairs, a tenth of other ``data`` is
        held out.

        Raises:
            InputError: No part has such a leaf (the nearest is named), or the value is
                not right for it.
        """
        if "objective" in leaves:
            leaves["objective"] = ALIASES.get(leaves["objective"], leaves["objective"])
        homes = leaf_homes()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in {**self._replaced(leaves), **leaves}.items():
            if name not in homes:
                raise InputError(f"unknown key {name!r}; {nearest(name, homes)}")
            changes.setdefault(homes[name], {})[name] = value
        changed = {
            part: dataclasses.replace(getattr(self, part), **values)
            for part, values in changes.items()
        }
        return dataclasses.replace(self, **changed)

    def _replaced(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves whose place others take, with what becomes of them."""
        replaced: dict[str, Any] = {}
        if any(leaves.get(name) is not None for name in parts.LENGTHS):
            replaced |= dict.fromkeys(parts.LENGTHS)
        if leaves.get("objective", self.loss.objective) != self.loss.objective:
            replaced |= dict.fromkeys(parts.SCALES)
        if (
            self.towers.model is not None
            and leaves.get("model", self.towers.model) != self.towers.model
        ):
            replaced["image_size"] = None
        if "val_split" in leaves:
            replaced["val_data"] = ()
        elif "val_data" in leaves:
            replaced["val_split"] = 0.0
        elif (
            "data" in leaves
            and _is_demo(self.pairs.val_data)
            and not _is_demo(leaves["data"])
        ):
            # The demo's held-out pairs judge no others: of those a share is held out,
            # of streamed ones none.
            replaced |= {
                "val_data": (),
                "val_split": (
                    0.0 if any(map(is_remote, leaves["data"])) else parts.VAL_SPLIT
                ),
            }
        return replaced

    def merge(
        self, values: Mapping[str, Any], *, source: str = "config"
    ) -> TrainConfig:
        """As ``override``, of nested values as ``to_dict`` gives them; ``source`` is
        what errors call them.
        """
        leaves: dict[str, Any] = {}
        for (
            name,
            value,
        ) in (
            values.items()
        ):  # names of leaves are unique, so it does not matter in which part they stand
            leaves |= value if isinstance(value, Mapping) else {name: value}
        try:
            return self.override(**leaves)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def merge_file(self, path: Path | str) -> TrainConfig:
        """As ``merge``, of a JSON or TOML file, such as the ``config.json`` of a
        run.
        """
        path = Path(path)
        try:
            values = (
                tomllib.loads(path.read_text("utf-8"))
                if path.suffix == ".toml"
                else read_json(path)
            )
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(
                f"{path}: is not TOML, or cannot be read ({one_line(error)})"
            ) from None
        return self.merge(values, source=str(path))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON: ``{"optim": {"lr": 0.001, …}, …}``."""
        values: dict[str, dict[str, Any]] = json.loads(self.to_json())
        return values

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, source: str = "config"
    ) -> TrainConfig:
        """The inverse of ``to_dict``; what is left out takes its default."""
        return cls().merge(values, source=source)

    @classmethod
    def from_json(cls, path: Path | str) -> TrainConfig:
        """Reads a ``config.json``."""
        return cls().merge_file(path)


def _is_demo(specs: Sequence[str]) -> bool:
    return {spec.partition(":")[0] for spec in specs} == {"demo"}


hints = functools.cache(typing.get_type_hints)
"""The types of a dataclass's fields, without their rules."""


@functools.cache
def leaf_homes() -> dict[str, str]:
    """The part of every leaf: ``{"lr": "optim", …}``."""
    return {
        leaf: part for part, kind in hints(TrainConfig).items() for leaf in hints(kind)
    }


_USUAL = (
    "data val_data val_split model init objective epochs batch_size lr workers"
    " precision device seed resume out"
)
_OTHER = """image_column caption_column max_bad_fraction image_size freeze
inv_tau beta learnable_inv_tau retrieval_from mask_duplicates steps patience micro_batch_size grad_checkpointing compile
fsdp weight_decay schedule warmup save_every best overwrite wandb"""
USUAL, OTHER = tuple(_USUAL.split()), tuple(_OTHER.split())
"""The leaves with an option, first those that people type, in the order of the help;
the others are set in a file.
"""


def options(start: TrainConfig, words: Sequence[str]) -> Any:
    """A dataclass for tyro of groups of options, whose defaults are the values of
    ``start``.
    """
    tyro, groups = require("tyro", "train"), []
    helps = _helps() if {"--help", "-h"} & set(words) else {}
    for name, leaves in (
        ("usual", USUAL),
        ("other", OTHER),
    ):
        fields = []
        for leaf in leaves:
            part = getattr(start, leaf_homes()[leaf])
            home: Any = type(part)
            kind: Any = Annotated[
                hints(home)[leaf], tyro.conf.arg(help=helps.get(leaf))
            ]
            fields.append((leaf, kind, dataclasses.field(default=getattr(part, leaf))))
        groups.append((name, dataclasses.make_dataclass(name, fields, frozen=True)))
    return dataclasses.make_dataclass("Options", groups, frozen=True)


def typed_leaves(words: Sequence[str]) -> list[str]:
    """The leaves whose options are among the words; InputError for one that is set in a
    file.
    """
    given = {
        word.partition("=")[0].replace("_", "-")
        for word in words
        if word.startswith("--")
    }
    typed = [
        leaf for leaf in leaf_homes() if given & {_option(leaf), _option(f"no-{leaf}")}
    ]
    for leaf in typed:
        if leaf not in USUAL + OTHER:
            lines = f"[{leaf_homes()[leaf]}] and {leaf} = …"
            raise InputError(
                f"{_option(leaf)} is set in a file: --config more.toml, with the lines"
                f" {lines}"
            )
    return typed


def changed(start: TrainConfig, parsed: Any, typed: Sequence[str]) -> TrainConfig:
    """``start`` with the typed values of ``options``; as of ``override``, they take the
    place of others.
    """
    values = {
        leaf: value
        for group in vars(parsed).values()
        for leaf, value in vars(group).items()
    }
    return start.override(**{leaf: values[leaf] for leaf in typed})


def _option(leaf: str) -> str:
    return f"--{leaf.replace('_', '-')}"


def _helps() -> dict[str, str]:
    """The docstrings of the fields of a configuration, from the source."""
    helps = {}
    for kind in ast.parse(inspect.getsource(parts)).body:
        for leaf, text in itertools.pairwise(getattr(kind, "body", ())):
            if (
                isinstance(leaf, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                helps[ast.unparse(leaf.target)] = " ".join(
                    str(text.value.value).split()
                )
    members = ". ".join(f"{name}: {member.title}" for name, member in FAMILY.items())
    return helps | {"objective": f"{helps['objective']} {members}."}
