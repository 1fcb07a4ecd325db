"""Trains the members of the demo one after the other; shows what they find, and says who is ahead."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloob.commands.steps import say_next
from cloob.commands.work.console import print_table, tell
from cloob.commands.work.judge import Comparison, check_writable, measure, write_page
from cloob.distributed import resolve_device
from cloob.evaluation.embed import EmbedOptions
from cloob.evaluation.examples import searches
from cloob.evaluation.report import ExampleQuery
from cloob.evaluation.sets.captioned import open_captioned
from cloob.evaluation.sets.labelled import LabelledSet, open_labelled
from cloob.files import write_whole
from cloob.search.index import Index
from cloob.search.sqlite.file import FILE
from cloob.search.update import UpdateOptions
from cloob.training.callbacks import RunResult
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.watch.log import ProgressDisplay

TEXTS = ("red heart", "animal with a trunk", "an insect", "yellow flower", "a clock")
_SAME = "The same {what}, data, seed and number of steps; the objective and its tuned settings differ."
_NOTES = (
    "Trained on pictograms of other makers than the Noto emoji that are searched and classified here; no Noto picture"
    " was trained on. The texts were picked by hand from 32 that were tried; abstract ones, such as “something to"
    " eat”, find little. One short run on a CPU shows how things work; it does not settle which objective is better."
)


def run(configs: Mapping[str, TrainConfig], out: Path, device_name: str) -> int:
    """Trains, evaluates, searches and reports; returns the exit code."""
    device = resolve_device(device_name)
    check_writable(out)
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.training.align").setLevel(logging.INFO)  # says how far the frozen encoders are
    runs = {}
    for name, config in configs.items():
        runs[name] = train(config, callbacks=[ProgressDisplay(title=name)])
        if runs[name].stopped:  # what is asked to end does not begin the next training
            print(f"cloob: {name} was stopped by {runs[name].stopped}; nothing is compared", file=sys.stderr)
            return 1
    print("cloob: embedding the test pictures and the words for them …", file=sys.stderr, flush=True)
    noto = open_labelled("demo:noto-emoji")
    comparison = Comparison(
        models={name: result.run for name, result in runs.items()},
        zeroshot=[noto],
        retrieval=[open_captioned("demo:val")],
        train_seconds={name: result.seconds for name, result in runs.items()},
        settings={name: _settings(config, runs[name]) for name, config in configs.items()},
    )
    embeddings, results = measure(comparison, EmbedOptions(device, workers=2), out)
    finder = _finder(results)
    found = searches(embeddings, noto, TEXTS, models=[finder, *(name for name in runs if name != finder)])
    page = out / "report.html"
    what = "frozen encoders" if all(config.align.image_encoder for config in configs.values()) else "towers"
    title = f"Five searches among {len(noto):,} pictures that no model here was trained on"
    notes = (_NOTES, _SAME.format(what=what))
    write_page(page, comparison, embeddings, results, title=title, notes=notes, searches=found)
    print_table(results)
    _print_found(found, finder)
    index = _build_index(runs[finder].run, noto, out, device_name)
    print(f"{out}/  one run folder per objective, results.json, pictures/, index/\n{page}")
    say_next(["serve", index], ["search", index, "something red"])
    return tell(results)


def _finder(results: Mapping[str, Any]) -> str:
    """The model whose pictures are shown first and whose index is built: the one that classifies most of them right."""
    best = max(results["rows"], key=lambda row: max((of_set["acc1"] for of_set in row["zeroshot"].values()), default=0))
    return str(best["model"])


def _settings(config: TrainConfig, result: RunResult) -> dict[str, Any]:
    """What the report says of a run beside its objective."""
    return {
        "steps": result.steps,
        "epochs": config.run.epochs,
        "batch_size": config.run.batch_size,
        "lr": config.optim.lr,
        "head_dropout": config.align.head_dropout if config.align.image_encoder else None,
        "seed": config.run.seed,
    }


def _build_index(model: Path, data: LabelledSet, out: Path, device: str) -> Path:
    """Writes the searched pictures as files, named by what they show, and an index of them for ``cloob serve``."""
    pictures, index = out / "pictures", out / "index"
    pictures.mkdir(exist_ok=True)
    taken: set[str] = set()
    for place, label in enumerate(data.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", data.classnames[label])
        if name.casefold() in taken:
            name = f"{name} {place}"
        taken.add(name.casefold())
        write_whole(pictures / f"{name}.webp", data.read(place)[1])
    if (index / FILE).is_file():  # of an earlier demo, with another model
        shutil.rmtree(index)
    print("cloob: an index of the pictures …", file=sys.stderr, flush=True)
    with Index.create(index) as created:
        created.update([pictures], UpdateOptions(model=str(model), device=device))
    return index


def _print_found(found: Sequence[ExampleQuery], model: str) -> None:
    """The searches on a terminal: the names of the first pictures of each."""
    print(f"\nfound by {model}:")
    width = max(len(query.query) for query in found)
    for query in found:
        names = ", ".join(picture.label for picture in query.answers[model][:4])
        print(f"  {query.query:<{width}}  {names}")
    print()
