"""Trains the members of the demo one after the other, and says who wins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from cloob.commands.work.console import print_table, tell
from cloob.commands.work.judge import Comparison, check_writable, measure, write_page
from cloob.distributed import resolve_device
from cloob.evaluate.embeddings import EmbedOptions
from cloob.evaluate.sets.captioned import open_captioned
from cloob.evaluate.sets.labelled import open_labelled
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.watch.log import ProgressDisplay

_NOTES = (
    "The same towers, data, seed, steps and augmentation; only the objective differs. Trained on pictograms of other"
    " makers than the Noto emoji that are classified here; no Noto picture was trained on. One short run on a CPU"
    " shows how things work; it does not settle which objective is better.",
)


def run(configs: Mapping[str, TrainConfig], out: Path, device_name: str) -> int:
    """Trains, evaluates and reports; returns the exit code."""
    device = resolve_device(device_name)
    check_writable(out)
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
    embeddings, results = measure(comparison, EmbedOptions(device, workers=2), out)
    page = out / "report.html"
    write_page(page, comparison, embeddings, results, title="CLOOB and CLIP side by side", notes=_NOTES)
    print_table(results)
    print(f"{out}/  one run folder per objective, results.json\n{page}")
    return tell(results)
