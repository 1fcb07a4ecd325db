"""What the caller of ``train`` hands over in the place of what the configuration
names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cloob.data.sampler import SamplerOrder
from cloob.errors import InputError
from cloob.objective import ContrastiveObjective
from cloob.settings import SCALES
from cloob.training.callbacks import Metrics
from cloob.training.config import TrainConfig
from cloob.training.optim import GivenOptimizer
from cloob.training.pairs import GivenPairs, is_source

_REPLACED: dict[str, dict[str, Any]] = {
    "pairs": {"data": ()},
    "held_out": {"val_split": 0.0, "val_data": ()},
    "towers": {"model": None},
    "objective": {"objective": "cloob"},
    "optimizer": {"optimizer": "adamw"},
}
"""What a part takes the place of, at its default."""


@dataclass(frozen=True)
class CustomParts:
    """The caller's parts; None for the rest."""

    pairs: GivenPairs | None = None
    held_out: GivenPairs | None = None
    towers: nn.Module | None = None
    objective: nn.Module | None = None
    optimizer: GivenOptimizer | None = None
    sampler: Iterable[int] | None = None
    batch_sampler: Iterable[Sequence[int]] | None = None
    metrics: Metrics | None = None

    def named(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the class of every part that is not None, and without
        what the part takes the place of.
        """
        names: dict[str, str | None] = {}
        for name, part in vars(self).items():
            before = getattr(config, f"given_{name}")
            if before is not None and part is None:
                raise InputError(
                    f"the configuration has {name} of the class {before!r}, which"
                    f" Python code gave; give them to cloob.train(config, {name}=…)"
                )
            names[f"given_{name}"] = None if part is None else _name_of(part)
        self._check(config)
        for name, settings in _REPLACED.items():
            if getattr(self, name) is not None:
                config = replace(config, **settings)
        return config.override(**names)

    def _check(self, config: TrainConfig) -> None:
        """InputError for parts that do not go together, and for a setting that a given
        part leaves without effect.
        """
        self._check_samplers(config)
        if self.metrics is not None and not config.holds_out and self.held_out is None:
            raise InputError(
                "metrics= judges held-out pairs, and there are none; give held_out="
            )
        if self.objective is not None:
            config.refuse((*SCALES, "retrieval_from"), "objective=")
            if not is_family(self.objective):
                config.refuse(["mask_duplicates"], "objective=")
        if self.optimizer is not None:
            config.refuse(("lr", "weight_decay", "beta1", "beta2", "eps"), "optimizer=")
        if self.pairs is not None:
            self._check_pairs(config, is_dataset=not is_source(self.pairs))

    def _check_pairs(self, config: TrainConfig, *, is_dataset: bool) -> None:
        """Refuses settings that pairs of the caller leave without effect."""
        if is_dataset:
            config.refuse(("shuffle_buffer", "crop_scale", "flip"), "pairs=")
        if not config.val_data:  # else files are read
            config.refuse(("image_column", "caption_column"), "pairs=")
            if is_dataset and self.towers is not None:
                config.refuse(["image_size"], "pairs= and towers=")

    def _check_samplers(self, config: TrainConfig) -> None:
        """Refuses samplers that exclude each other, or have nothing to order."""
        if self.sampler is None and self.batch_sampler is None:
            return
        if self.sampler is not None and self.batch_sampler is not None:
            raise InputError("sampler= and batch_sampler= exclude each other")
        if self.pairs is None or is_source(self.pairs):
            raise InputError(
                "a sampler orders the rows of a Dataset: give one as pairs="
            )
        if self.batch_sampler is not None and not config.batch_size:
            raise InputError(
                "batch_sampler= needs batch_size, the size of its largest batch"
            )

    def order(self, rows: int, config: TrainConfig) -> SamplerOrder | None:
        """The order that a sampler of the caller makes; None without one."""
        if self.batch_sampler is not None:
            size = config.batch_size
            return SamplerOrder(self.batch_sampler, rows, config.seed, size)
        if self.sampler is not None:
            return SamplerOrder(self.sampler, rows, config.seed)
        return None


def is_family(objective: nn.Module) -> bool:
    """Whether a loss is one of the family; one that extends the class may compute
    something else.
    """
    return type(objective) is ContrastiveObjective


def _name_of(part: object) -> str:
    """The name of a part's class or function, wherever it was defined."""
    if isinstance(part, Sequence):  # optimisers with their predicates
        return ", ".join(_name_of(make) for _, make in part)
    while isinstance(part, functools.partial):
        part = part.func
    name = str(getattr(part, "__qualname__", type(part).__qualname__))
    return name.rpartition("<locals>.")[2]
