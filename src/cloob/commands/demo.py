"""``cloob demo``: three methods on a set that comes along; what they find, and who is ahead."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.models.names import check_packages
from cloob.recipes import get_recipe
from cloob.training.config import TrainConfig
from cloob.training.config.checks import preflight
from cloob.training.config.parts import ObjectiveName

_SCRATCH: tuple[ObjectiveName, ...] = ("clip", "cloob")
_FROZEN: tuple[ObjectiveName, ...] = ("clip", "infoloob", "cloob")


@dataclass(frozen=True)
class DemoArguments:
    """Train CLIP, InfoLOOB and CLOOB side by side on a set that comes along, search its pictures; no network needed."""

    objectives: tuple[ObjectiveName, ...] | None = None
    """Members of the family to train: clip, infoloob, infonce-hopfield, cloob, siglip, siglip-hopfield. Left out, clip,
    infoloob and cloob; from scratch clip and cloob."""
    from_scratch: bool = False
    """Train both towers from random weights, in place of heads on two frozen encoders (the extra align)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    epochs: int | None = None
    """Passes over the 6,110 pairs; the recipe's when left out."""
    out: Path | None = None
    """Folder of one run per objective, results.json and report.html; an earlier demo there is replaced. Left out,
    runs/demo, from scratch runs/demo-scratch."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(words: Sequence[str]) -> int:
    """Trains, evaluates, searches and reports."""
    arguments = parse(DemoArguments, words, "cloob demo")
    scratch = arguments.from_scratch
    objectives = (_SCRATCH if scratch else _FROZEN) if arguments.objectives is None else arguments.objectives
    if not objectives or len(set(objectives)) < len(objectives):
        raise InputError(f"objectives is {objectives}; it must be one or several different members")
    out = arguments.out or Path("runs/demo-scratch" if scratch else "runs/demo")
    configs: dict[str, TrainConfig] = {
        objective: get_recipe("demo-scratch" if scratch else "demo", objective=objective).override(
            seed=arguments.seed,
            out=out / objective,
            device=arguments.device,
            overwrite=True,
            **({} if arguments.epochs is None else {"epochs": arguments.epochs}),
        )
        for objective in objectives
    }
    for config in configs.values():
        check_packages(config.align.encoders(), ", and cloob demo --from-scratch needs none")
        preflight(config)
    print(f"cloob: {', '.join(objectives)} on 6,110 pictures with captions; loading …", file=sys.stderr, flush=True)
    from cloob.commands.work.demo import run  # torch: only for words that are right

    return run(configs, out, arguments.device)
