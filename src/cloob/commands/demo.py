"""``cloob demo``: the same two towers trained once as CLIP and once as CLOOB, and who wins."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloob.commands.arguments import parse
from cloob.errors import InputError
from cloob.train.config.components import ObjectiveName

_NOTES = (
    "The same towers, data, seed, steps and augmentation; only the objective differs. Trained on pictograms of other"
    " makers than the Noto emoji that are classified here; no Noto picture was trained on. One short run on a CPU"
    " shows how things work; it does not settle which objective is better.",
)


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
    from cloob.recipes import get_recipe

    configs = {
        objective: get_recipe(f"demo-{objective}").override(
            seed=arguments.seed,
            out=arguments.out / objective,
            device=arguments.device,
            overwrite=True,
            **({} if arguments.epochs is None else {"epochs": arguments.epochs}),
        )
        for objective in arguments.objectives
    }

    from cloob.commands.console import print_table, tell
    from cloob.commands.judge import Comparison, check_writable, measure, write_page
    from cloob.distributed import resolve_device
    from cloob.evaluate.embeddings import EmbedOptions
    from cloob.evaluate.sets.captioned import open_captioned
    from cloob.evaluate.sets.labelled import open_labelled
    from cloob.train.loop import train
    from cloob.train.watch.log import ProgressDisplay

    device = resolve_device(arguments.device)
    check_writable(arguments.out)
    runs = {}
    for name, config in configs.items():
        runs[name] = train(config, callbacks=[ProgressDisplay(title=name)])
        if runs[name].stopped:  # what is asked to end does not begin the next training
            print(f"cloob: {name} was stopped by {runs[name].stopped}; nothing is compared", file=sys.stderr)
            return 1
    comparison = Comparison(
        models={name: result.run for name, result in runs.items()},
        zeroshot=[open_labelled("demo:noto-emoji")],
        retrieval=[open_captioned("demo:val")],
        train_seconds={name: result.seconds for name, result in runs.items()},
        settings={
            name: {
                "steps": runs[name].steps,
                "epochs": config.run.epochs,
                "batch_size": config.run.batch_size,
                "lr": config.optim.lr,
                "seed": config.run.seed,
            }
            for name, config in configs.items()
        },
    )
    embeddings, results = measure(comparison, EmbedOptions(device, workers=2), arguments.out)
    page = arguments.out / "report.html"
    write_page(page, comparison, embeddings, results, title="CLOOB and CLIP side by side", notes=_NOTES)
    print_table(results)
    print(f"{arguments.out}/  one run folder per objective, results.json\n{page}")
    return tell(results)
