"""What a training run is made of: frozen dataclasses, checked as they are made, nested in ``TrainConfig``.

Here they are changed by leaf, written as JSON and read back, strictly. On the command line the fields appear by their
leaf names (``--lr``, not ``--optim.lr``), so leaf names are unique across them. No torch is imported here.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.errors import InputError, nearest
from cloob.models.untrusted import read_json
from cloob.training.config.model import SCALES, AlignConfig, LossConfig, TowersConfig
from cloob.training.config.pairs import PairsConfig
from cloob.training.config.run import LENGTHS, LogConfig, OptimConfig, RunConfig, SaveConfig
from cloob.training.config.strict import build, convert, hints, leaf_homes, plain


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

    def override(self, **leaves: Any) -> TrainConfig:
        """A copy with some leaves changed, wherever they sit: ``config.override(lr=1e-4, epochs=3)``.

        A length of the run (``epochs``, ``samples`` or ``steps``) takes the place of the one before. Another objective
        begins with its own τ⁻¹, β and scale, not with those that were set for the one before, and another model with
        its own picture size. ``init_image`` takes the place of ``init`` and of the average with it, and ``init`` that
        of ``init_image``.

        Raises:
            InputError: No component has such a leaf, or the value is not right for it.
        """
        homes = leaf_homes(TrainConfig)
        changes: dict[str, dict[str, Any]] = {}
        if any(leaves.get(name) is not None for name in LENGTHS):
            leaves = dict.fromkeys(LENGTHS) | leaves
        if leaves.get("objective", self.loss.objective) != self.loss.objective:
            leaves = dict.fromkeys(SCALES) | leaves
        if leaves.get("model", self.towers.model) != self.towers.model is not None:
            leaves = {"image_size": None} | leaves
        if leaves.get("init_image") is not None:
            leaves = {"init": None, "average_with_start": None} | leaves
        elif leaves.get("init") is not None:
            leaves = {"init_image": None} | leaves
        for name, value in leaves.items():
            if name not in homes:
                raise InputError(f"config: unknown key {name!r}; {nearest(name, homes)}")
            part = homes[name]
            changes.setdefault(part, {})[name] = convert(value, hints(type(getattr(self, part)))[name], name)
        parts = {part: dataclasses.replace(getattr(self, part), **values) for part, values in changes.items()}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values, ready for JSON: ``{"optim": {"lr": 0.001, …}, …}``."""
        return typing.cast("dict[str, dict[str, Any]]", plain(self))

    def to_json(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
        """The inverse of ``to_dict``; what is left out takes its default.

        Args:
            values: Nested values, e.g. read from JSON.
            source: What to call them in an error, e.g. the file's name.

        Raises:
            InputError: A key is unknown (the nearest is named), or a value has a wrong type or range.
        """
        try:
            return typing.cast(TrainConfig, build(cls, values))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_json(cls, path: Path | str) -> TrainConfig:
        """Reads a ``config.json``.

        Raises:
            InputError: The file cannot be read or is not JSON, or as ``from_dict``.
        """
        return cls.from_dict(read_json(Path(path)), source=str(path))  # a run folder may come from a stranger
