"""What a training run is made of: frozen dataclasses, checked as they are made, nested in ``TrainConfig``.

Here they are changed by leaf, written as JSON and read back, strictly. Leaf names are unique across the parts: on the
command line and in ``override`` a leaf goes by its own name (``--lr``, not ``--optim.lr``). No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cloob.errors import InputError, nearest
from cloob.models.untrusted import read_json
from cloob.training.config.parts import (
    LENGTHS,
    SCALES,
    AlignConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    PairsConfig,
    RunConfig,
    SaveConfig,
    TowersConfig,
    VectorsConfig,
)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Example:
        >>> from cloob import TrainConfig
        >>> config = TrainConfig().override(data=["demo"], model="tiny-vit", lr=5e-4, epochs=3)
        >>> config.optim.lr, config.run.epochs, config.pairs.data
        (0.0005, 3, ('demo',))
        >>> TrainConfig.from_dict(config.to_dict()) == config
        True
    """

    pairs: PairsConfig = field(default_factory=PairsConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)

    def override(self, **leaves: Any) -> TrainConfig:
        """A copy with some leaves changed, wherever they sit: ``config.override(lr=1e-4, epochs=3)``.

        Some leaves take the place of others, unless these are given, too: a length of the run (``epochs``, ``samples``
        or ``steps``) that of the length before; another objective begins with its own τ⁻¹, β and scale, another model
        with its own picture size; ``init_image`` replaces ``init`` and the average with it, ``init`` replaces
        ``init_image``; ``val_data`` and ``val_split`` replace each other.

        Raises:
            InputError: No part has such a leaf, or the value is not right for it.
        """
        homes = leaf_homes()
        for name in leaves:
            if name not in homes:
                raise InputError(f"config: unknown key {name!r}; {nearest(name, homes)}")
        leaves = self._replaced(leaves) | leaves
        changes: dict[str, dict[str, Any]] = {}
        for name, value in leaves.items():
            kind = hints(type(getattr(self, homes[name])))[name]
            changes.setdefault(homes[name], {})[name] = convert(value, kind, name)
        parts = {part: dataclasses.replace(getattr(self, part), **values) for part, values in changes.items()}
        return dataclasses.replace(self, **parts)

    def _replaced(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves whose place others take, with what becomes of them."""
        replaced: dict[str, Any] = {}
        if any(leaves.get(name) is not None for name in LENGTHS):
            replaced |= dict.fromkeys(LENGTHS)
        if leaves.get("objective", self.loss.objective) != self.loss.objective:
            replaced |= dict.fromkeys(SCALES)
        if self.towers.model is not None and leaves.get("model", self.towers.model) != self.towers.model:
            replaced["image_size"] = None
        if leaves.get("init_image") is not None:
            replaced |= {"init": None, "average_with_start": None}
        elif leaves.get("init") is not None:
            replaced["init_image"] = None
        if "val_split" in leaves:
            replaced["val_data"] = ()
        elif "val_data" in leaves:
            replaced["val_split"] = 0.0
        return replaced

    def merge(self, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """As ``override``, of nested values as ``to_dict`` gives them: ``{"optim": {"lr": 0.001}}``.

        Args:
            values: Nested values, e.g. read from JSON.
            source: What to call them in an error, e.g. the file's name.

        Raises:
            InputError: A key is unknown (the nearest is named), or a value has a wrong type or range.
        """
        try:
            return self.override(**_leaves(values))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def merge_file(self, path: Path | str) -> TrainConfig:
        """As ``merge``, of a JSON or TOML file, such as the ``config.json`` of a run.

        Raises:
            InputError: The file cannot be read or is no JSON or TOML, or as ``merge``.
        """
        path = Path(path)
        if path.suffix != ".toml":
            return self.merge(read_json(path), source=str(path))
        try:
            return self.merge(tomllib.loads(path.read_text(encoding="utf-8")), source=str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: is not TOML ({error})") from None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON: ``{"optim": {"lr": 0.001, …}, …}``."""
        return {
            part.name: {name: _plain(value) for name, value in vars(getattr(self, part.name)).items()}
            for part in dataclasses.fields(self)
        }

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """The inverse of ``to_dict``; what is left out takes its default. Arguments and errors as of ``merge``."""
        return cls().merge(values, source=source)

    @classmethod
    def from_json(cls, path: Path | str) -> TrainConfig:
        """Reads a ``config.json``; errors as of ``merge_file``."""
        return cls().merge_file(path)


_type_hints = functools.cache(typing.get_type_hints)


def hints(part: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, without their rules."""
    return _type_hints(part)


@functools.cache
def leaf_homes() -> dict[str, str]:
    """The part in which each leaf sits: ``{"lr": "optim", …}``."""
    return {leaf: part for part, kind in hints(TrainConfig).items() for leaf in hints(kind)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _leaves(values: Any) -> dict[str, Any]:
    """The leaves of nested values, each of the type that its field wants."""
    parts, homes = hints(TrainConfig), leaf_homes()
    leaves = {}
    for part, inner in _object(values, "the whole").items():
        if part not in parts:
            where = f"it belongs in {homes[part]!r}" if part in homes else nearest(str(part), [*parts, *homes])
            raise InputError(f"unknown key {part!r}; {where}")
        known = hints(parts[part])
        for name, value in _object(inner, part).items():
            if name not in known:
                raise InputError(f"unknown key '{part}.{name}'; {nearest(str(name), known)}")
            leaves[name] = convert(value, known[name], f"{part}.{name}")
    return leaves


def _object(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is {values!r}; it must be an object of keys")
    return values


def convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotation wants it, or an InputError that names the key."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        return convert(value, next(arg for arg in args if arg is not type(None)), key)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if Ellipsis in args else args
        if len(kinds) != len(value):
            raise InputError(f"{key} is {value!r}; it must be a list of {len(kinds)}")
        return tuple(convert(item, kind, key) for item, kind in zip(value, kinds, strict=True))
    if hint is Path and isinstance(value, str | Path) and value != "":
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is Literal and value in args:
        return value
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list"}
    wanted = (
        f"one of {', '.join(args)}" if origin is Literal else names.get(origin or hint, "the path of a file or folder")
    )
    raise InputError(f"{key} is {value!r}; it must be {wanted}")
