"""``cloob demo``: the same two towers trained once as CLIP and once as CLOOB, and who wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.recipes import get_recipe
from cloob.train.config import TrainConfig
from cloob.train.config.components import ObjectiveName


@dataclass(frozen=True)
class DemoArguments:
    """Train CLIP and CLOOB side by side on a set that comes along, and show who wins; no network needed."""

    objectives: tuple[ObjectiveName, ...] = ("clip", "cloob")
    """Members of the family to train: clip, infoloob, infonce-hopfield, cloob."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    epochs: int | None = None
    """Passes over the 6,110 pairs; the recipe's when left out."""
    out: Path = Path("runs/demo")
    """Folder of one run per objective, results.json and report.html; an earlier demo there is replaced."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(words: Sequence[str]) -> int:
    """Trains, evaluates and reports."""
    arguments = parse(DemoArguments, words, "cloob demo")
    if not arguments.objectives or len(set(arguments.objectives)) < len(arguments.objectives):
        raise InputError(f"objectives is {arguments.objectives}; it must be one or several different members")
    configs: dict[str, TrainConfig] = {
        objective: get_recipe(f"demo-{objective}").override(
            seed=arguments.seed,
            out=arguments.out / objective,
            device=arguments.device,
            overwrite=True,
            **({} if arguments.epochs is None else {"epochs": arguments.epochs}),
        )
        for objective in arguments.objectives
    }
    from cloob.commands.work.demo import run  # torch: only for words that are right

    return run(configs, arguments.out, arguments.device)
