"""``cloob demo``: three objectives on a set that comes along; the pictures they find, and who is ahead."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cloob.commands import compare
from cloob.commands.terminal import say_next
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.content import Reader
    from cloob.evaluation.report import ExampleQuery
    from cloob.evaluation.sets.labelled import LabelledSet
    from cloob.training.callbacks import RunResult
    from cloob.training.config import TrainConfig
    from cloob.training.config.parts import ObjectiveName

TEXTS = ("red heart", "animal with a trunk", "an insect", "yellow flower", "a clock")
_SAME = "The same {what}, data, seed and number of steps; the objective and its tuned settings differ."
_NOTES = (
    "Trained on pictograms of other makers than the Noto emoji that are searched and classified here; no Noto picture"
    " was trained on. The texts were picked by hand from 32 that were tried; abstract ones, such as “something to"
    " eat”, find little. One short run on a CPU shows how things work; it does not settle which objective is better."
)


@dataclass(frozen=True)
class Options:
    """Train CLIP, InfoLOOB and CLOOB side by side on a set that comes along, search its pictures; no network needed."""

    objectives: (
        tuple[Literal["clip", "infoloob", "infonce-hopfield", "cloob", "siglip", "siglip-hopfield"], ...] | None
    ) = None
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


def check(options: Options) -> None:
    from cloob.models.source import check_packages
    from cloob.training.config.checks import preflight

    for config in _configs(options).values():
        check_packages(config.align.encoders(), ", and cloob demo --from-scratch needs none")
        preflight(config)


def run(options: Options) -> int:
    """Trains, evaluates, searches and reports."""
    configs = _configs(options)
    print(f"cloob: {', '.join(configs)} on 6,110 pictures with captions; loading …", file=sys.stderr, flush=True)
    from cloob.evaluation.sets.captioned import open_captioned
    from cloob.evaluation.sets.labelled import open_labelled

    return present(configs, _out(options), options.device, open_labelled("demo:noto-emoji"), open_captioned("demo:val"))


def _out(options: Options) -> Path:
    return options.out or Path("runs/demo-scratch" if options.from_scratch else "runs/demo")


def _configs(options: Options) -> dict[str, TrainConfig]:
    from cloob.recipes import get_recipe

    usual: tuple[ObjectiveName, ...] = ("clip", "cloob") if options.from_scratch else ("clip", "infoloob", "cloob")
    objectives = usual if options.objectives is None else options.objectives
    if not objectives or len(set(objectives)) < len(objectives):
        raise InputError(f"--objectives is {' '.join(objectives) or 'empty'}; one or several different ones are wanted")
    epochs = {} if options.epochs is None else {"epochs": options.epochs}
    return {
        objective: get_recipe("demo-scratch" if options.from_scratch else "demo", objective=objective).override(
            seed=options.seed, out=_out(options) / objective, device=options.device, overwrite=True, **epochs
        )
        for objective in objectives
    }


def present(
    configs: Mapping[str, TrainConfig], out: Path, device_name: str, noto: LabelledSet, held_out: Reader
) -> int:
    """Trains runs by their names; classifies and searches ``noto``; retrieves among the pairs ``held_out``."""
    import logging

    from cloob.distributed import resolve_device
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.examples import searches
    from cloob.training.log import ProgressDisplay
    from cloob.training.loop import train

    device = resolve_device(device_name)
    compare.check_writable(out)
    logging.basicConfig(level=logging.WARNING, format="cloob: %(message)s")
    logging.getLogger("cloob.training.align").setLevel(logging.INFO)  # says how far the frozen encoders are
    runs = {}
    for name, config in configs.items():
        runs[name] = train(config, callbacks=[ProgressDisplay(title=name)])
        if runs[name].stopped:  # what is asked to end does not begin the next training
            print(f"cloob: {name} was stopped by {runs[name].stopped}; nothing is compared", file=sys.stderr)
            return 1
    print("cloob: embedding the test pictures and the words for them …", file=sys.stderr, flush=True)
    compared = compare.compare(
        {name: result.run for name, result in runs.items()},
        [noto],
        [held_out],
        EmbedOptions(device, workers=2),
        out,
        train_seconds={name: result.seconds for name, result in runs.items()},
        settings={name: _settings(config, runs[name]) for name, config in configs.items()},
    )
    finder = _most_accurate(compared.results)
    order = [finder, *(name for name in runs if name != finder)]
    found = searches(compared.embeddings, noto, TEXTS, models=order)
    frozen = all(config.align.image_encoder for config in configs.values())
    notes = (_NOTES, _SAME.format(what="frozen encoders" if frozen else "towers"))
    title = f"Five searches among {len(noto):,} pictures that no model here was trained on"
    compare.write_page(out / "report.html", compared, title=title, notes=notes, searches=found)
    compare.print_results(compared.results)
    _print_found(found, finder)
    index = _build_index(runs[finder].run, noto, out, device_name)
    print(f"{out}/  one run folder per objective, results.json, pictures/, index/\n{out / 'report.html'}")
    say_next(["serve", index], ["search", index, "something red"])
    return compare.report_problems(compared.results)


def _most_accurate(results: Mapping[str, Any]) -> str:
    """The model that classifies most pictures right: its finds are shown first, and the index is built with it."""
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
    import shutil

    from cloob.commands.collection import INDEX_FILE
    from cloob.files import write_whole
    from cloob.search.index import Index
    from cloob.search.update import UpdateOptions

    pictures, index = out / "pictures", out / "index"
    pictures.mkdir(exist_ok=True)
    taken: set[str] = set()
    for place, label in enumerate(data.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", data.classnames[label])
        if name.casefold() in taken:
            name = f"{name} {place}"
        taken.add(name.casefold())
        write_whole(pictures / f"{name}.webp", data.read(place)[1])
    if (index / INDEX_FILE).is_file():  # of an earlier demo, with another model
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
