"""What a training run is made of: frozen dataclasses, checked as they are made, nested in ``TrainConfig``.

Here they are changed by leaf, written as JSON and read back. Leaf names are unique across the parts: on the
command line and in ``override`` a leaf goes by its own name (``--lr``, not ``--optim.lr``). No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.data.shards.spec import is_remote
from cloob.errors import InputError, nearest, one_line
from cloob.family import ALIASES
from cloob.models.importing import read_json
from cloob.training.config.parts import (
    LENGTHS,
    SCALES,
    VAL_SPLIT,
    AlignConfig,
    GivenConfig,
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
    """A full training run.

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
    given: GivenConfig = field(default_factory=GivenConfig)

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.pairs.val_data or self.pairs.val_split or self.vectors.val_a or self.given.given_held_out)

    @property
    def has_vectors(self) -> bool:
        """Whether the pairs are vectors, in files or in memory."""
        return any(vars(self.vectors).values()) or self.given.given_pairs == "VectorPairs"

    def override(self, **leaves: Any) -> TrainConfig:
        """A copy with some leaves changed, wherever they sit: ``config.override(lr=1e-4, epochs=3)``.

        Some leaves take the place of others, unless these are given, too: a length of the run (``epochs``, ``samples``
        or ``steps``) that of the length before; another objective begins with its own τ⁻¹, β and scale, another model
        with its own picture size; held-out pairs (``val_data``, ``val_a``) and ``val_split`` replace each other. In
        place of the demo's held-out pairs, a tenth of other ``data`` is held out.

        Raises:
            InputError: No part has such a leaf (the nearest is named), or the value is not right for it.
        """
        if "objective" in leaves:
            leaves["objective"] = ALIASES.get(leaves["objective"], leaves["objective"])
        homes = leaf_homes()
        changes: dict[str, dict[str, Any]] = {}
        for name, value in {**self._replaced(leaves), **leaves}.items():
            if name not in homes:
                raise InputError(f"unknown key {name!r}; {nearest(name, homes)}")
            changes.setdefault(homes[name], {})[name] = value
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
        if "val_split" in leaves:
            replaced |= {"val_data": (), **dict.fromkeys(("val_a", "val_b", "val_ids"))}
        elif "val_data" in leaves or leaves.get("val_a"):
            replaced["val_split"] = 0.0
        elif "data" in leaves and dataclasses.replace(self.pairs, data=tuple(leaves["data"])).judged_by_demo:
            # The demo's held-out pairs judge no others: of those a share is held out, of streamed ones none.
            replaced |= {"val_data": (), "val_split": 0.0 if any(map(is_remote, leaves["data"])) else VAL_SPLIT}
        return replaced

    def merge(self, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """As ``override``, of nested values as ``to_dict`` gives them; ``source`` is what errors call them."""
        leaves: dict[str, Any] = {}
        for name, value in values.items():  # names of leaves are unique, so it does not matter in which part they stand
            leaves |= value if isinstance(value, Mapping) else {name: value}
        try:
            return self.override(**leaves)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def merge_file(self, path: Path | str) -> TrainConfig:
        """As ``merge``, of a JSON or TOML file, such as the ``config.json`` of a run."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text("utf-8")) if path.suffix == ".toml" else read_json(path)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path}: is not TOML, or cannot be read ({one_line(error)})") from None
        return self.merge(values, source=str(path))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON: ``{"optim": {"lr": 0.001, …}, …}``."""
        values: dict[str, dict[str, Any]] = json.loads(self.to_json())
        return values

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """The inverse of ``to_dict``; what is left out takes its default."""
        return cls().merge(values, source=source)

    @classmethod
    def from_json(cls, path: Path | str) -> TrainConfig:
        """Reads a ``config.json``."""
        return cls().merge_file(path)


@functools.cache
def hints(part: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, without their rules."""
    return typing.get_type_hints(part)


@functools.cache
def leaf_homes() -> dict[str, str]:
    """The part in which each leaf sits: ``{"lr": "optim", …}``."""
    return {leaf: part for part, kind in hints(TrainConfig).items() for leaf in hints(kind)}
