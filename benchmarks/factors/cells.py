"""What a run in the world of factors is made from. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.factors.world import World


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Attributes:
        inv_tau: τ⁻¹; the start where it is learned.
        learned: Whether τ⁻¹ is trained (CLIP only: for the others it would rise without
            end, or the paper fixes it).
        beta: β; None without retrieval.
        lr: Peak learning rate (AdamW, warm-up over a tenth, cosine to zero).
        weight_decay: AdamW's.
        length: Share of the world's ``seen`` pairs that the run trains on.
    """

    inv_tau: float
    learned: bool = False
    beta: float | None = None
    lr: float = 1e-3
    weight_decay: float = 0.1
    length: float = 1.0

    @property
    def slug(self) -> str:
        tau = f"t{self.inv_tau:.3g}" + ("learned" if self.learned else "")
        beta = [f"b{self.beta:.3g}"] if self.beta else []
        return "_".join(
            [
                tau,
                *beta,
                f"lr{self.lr:.3g}",
                f"wd{self.weight_decay:.3g}",
                f"l{self.length:g}",
            ]
        )


@dataclass(frozen=True)
class Run:
    """One run, and the name of its record.

    Attributes:
        stage: ``search`` or ``cells``: also the folder of its record.
        method: One of ``METHODS``.
        world: The world it is drawn from.
        seed: Of the drawing, of the encoders as initialised and of the order of the
            pairs.
        setting: The rest.
    """

    stage: str
    method: str
    world: World
    seed: int
    setting: Setting

    @property
    def id(self) -> str:
        return f"{slug(self.world)}_{self.method}_s{self.seed}_{self.setting.slug}"

    def config(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Run:
        """The inverse of ``config``."""
        return cls(
            **{
                **config,
                "world": World(**config["world"]),
                "setting": Setting(**config["setting"]),
            }
        )


def slug(world: World) -> str:
    """How a world differs from the base, in letters that suit a file name."""
    changed = [
        f.name
        for f in dataclasses.fields(World)
        if getattr(world, f.name) != f.default and f.name != "wrong"
    ]
    return "_".join(
        [
            f"wrong{world.wrong:g}",
            *(f"{name}{getattr(world, name):g}" for name in changed),
        ]
    )
