"""What a run of a study on pictures is made from. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What was tuned.

    Attributes:
        lr: Peak learning rate (AdamW, linear warm-up over a tenth of the run, cosine).
        weight_decay: Of matrices and kernels.
        batch_size: Pairs a step; the number of pairs seen does not depend on it.
        inv_tau: τ⁻¹, or its start where it is learned.
        learnable_inv_tau: Whether τ⁻¹ is trained.
        beta: β; None for methods without retrieval.
        mask_duplicates: Pairs of equal caption are no negatives of each other.
        option: "" for the objective as published; "warm": no retrieval in the first
            half of the run.
        start: "" for the towers as initialised; an attempt had "centred".
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 128
    inv_tau: float = 30.0
    learnable_inv_tau: bool = False
    beta: float | None = None
    mask_duplicates: bool = False
    option: str = ""
    start: str = ""

    @property
    def slug(self) -> str:
        parts = [
            f"lr{self.lr:g}",
            f"wd{self.weight_decay:g}",
            f"n{self.batch_size}",
            f"t{self.inv_tau:.3g}" + "learned" * self.learnable_inv_tau,
        ]
        if self.beta is not None:
            parts.append(f"b{self.beta:g}")
        if self.mask_duplicates:
            parts.append("masked")
        return "_".join([*parts, *filter(None, (self.option, self.start))])


@dataclass(frozen=True)
class TowerCell:
    """Towers trained from scratch.

    Attributes:
        stage: ``cells``, or ``wrong`` with 40 % wrong captions.
        method: A member of the family, or ``cloob-warm``.
        tower: Name of a small model of the library.
        seed: Of the initial towers, the order of the pairs and their augmentation.
        epochs: Passes over the training pairs.
        setting: The rest.
    """

    stage: str
    method: str
    tower: str
    seed: int
    epochs: int
    setting: Setting

    @property
    def id(self) -> str:
        run = f"e{self.epochs}_s{self.seed}"
        return f"{self.method}_{self.tower}_{run}_{self.setting.slug}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TowerCell:
        return cls(**{**config, "setting": Setting(**config["setting"])})


@dataclass(frozen=True)
class Captions:
    """Kind of heads, and the captions that they are trained on.

    Attributes:
        head: ``linear`` or ``mlp``.
        kind: What wrong captions are: ``swap``, ``cut`` or ``name``
            (``captions.wrong_rows``).
        share: How many of the captions.
        pairs: Training pairs.
    """

    head: str
    kind: str
    share: float
    pairs: int

    @property
    def slug(self) -> str:
        return f"{self.head}_{self.kind}{self.share:g}_{self.pairs}"


@dataclass(frozen=True)
class HeadsCell:
    """One pair of heads on frozen encoders; ``world`` says on which captions."""

    stage: str
    method: str
    world: Captions
    seed: int
    epochs: int
    setting: Setting

    @property
    def id(self) -> str:
        run = f"e{self.epochs}_s{self.seed}"
        return f"{self.method}_{self.world.slug}_{run}_{self.setting.slug}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HeadsCell:
        setting = Setting(**config["setting"])
        world = Captions(**config["world"])
        return cls(**{**config, "setting": setting, "world": world})


@dataclass(frozen=True)
class JoinedCell:
    """Members side by side, from the pairs as they are or from those that cleaning
    left.
    """

    members: tuple[str, ...]
    clean: bool
    world: Captions
    seed: int
    stage: str = "claim"

    @property
    def id(self) -> str:
        pairs = "clean" if self.clean else "all"
        return f"{'+'.join(self.members)}_{pairs}_{self.world.slug}_s{self.seed}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> JoinedCell:
        members = tuple(config["members"])
        world = Captions(**config["world"])
        return cls(**{**config, "members": members, "world": world})


def as_config(cell: Any) -> dict[str, Any]:
    """The cell as its record holds it, and as a line of a plan holds it."""
    return dataclasses.asdict(cell)
