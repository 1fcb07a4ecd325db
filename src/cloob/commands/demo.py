"""``cloob demo``: train CLIP, InfoLOOB and CLOOB on a set that comes along, and search
its pictures.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloob
from cloob.commands import eval as evaluation
from cloob.commands.console import progress, say, say_next
from cloob.commands.suspects import judge_pictures, report
from cloob.commands.train import train_to_the_signal
from cloob.commands.train_heads import show_epoch
from cloob.errors import InputError
from cloob.family import ObjectiveName
from cloob.heads.config import check_config
from cloob.models.source import check_packages
from cloob.search.records import INDEX_FILE

if TYPE_CHECKING:
    from cloob.evaluation.report.page import ExampleQuery
    from cloob.evaluation.sets.pictures import CaptionedSet, LabelledSet
    from cloob.heads.run import HeadsResult
    from cloob.training.callbacks import RunResult

Config = cloob.TrainConfig | cloob.HeadsConfig
INDEX_FOLDER = "index"
_OBJECTIVES: tuple[ObjectiveName, ...] = ("clip", "infoloob", "cloob")
TEXTS = ("red heart", "animal with a trunk", "an insect", "yellow flower", "a clock")
_SAME = (
    "The same {}, data, seed and number of steps; the objective and its tuned settings"
    " differ."
)
_NOTES = (
    "Trained on pictograms of other makers than the Noto emoji that are searched and"
    " classified here; no Noto picture was trained on. The texts were picked by hand"
    " from 32 that were tried; abstract ones, such as “something to eat”, find little."
    " One short run on a CPU shows how things work; it does not settle which objective"
    " is better."
)


@dataclass(frozen=True)
class Options:
    """Train CLIP, InfoLOOB, CLOOB and a closed form on pictures that come along, then
    search others; no network.
    """

    objectives: tuple[ObjectiveName, ...] | None = None
    """Left out: clip, infoloob, cloob, cca; from scratch two."""
    from_scratch: bool = False
    """Train both towers from random weights; else heads on frozen encoders (extra
    align).
    """
    seed: int = 0
    """Seed of weights, order and augmentation."""
    epochs: int | None = None
    """Passes over the 6,110 pairs; the recipe's when left out."""
    out: Path | None = None
    """Folder of all this, replaced if there; left out, runs/demo or runs/demo-scratch.
    """
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(options: Options) -> int:
    """Trains, compares and searches; 1 where a training was stopped."""
    configs = make_configs(options)
    check_index_place(folder_of(configs) / INDEX_FOLDER)
    for config in configs.values():
        check_run(config)
    say(f"{', '.join(configs)} on 6,110 pictures with captions; loading …")
    from cloob.evaluation.sets.pictures import open_captioned, open_labelled

    return present(
        configs,
        options.device,
        open_labelled("demo:noto-emoji"),
        open_captioned("demo:val"),
    )


def check_run(config: Config) -> None:
    """Refuses a run that cannot begin."""
    if isinstance(config, cloob.HeadsConfig):
        encoders = [str(config.image_encoder), str(config.text_encoder)]
        check_packages(encoders, ", and cloob demo --from-scratch needs none")
        check_config(config)
        return
    from cloob.training.checks import preflight

    preflight(config)


def make_configs(options: Options) -> dict[str, Config]:
    """The configuration of a run by the name of its objective."""
    recipe = "demo-scratch" if options.from_scratch else "demo"
    names = options.objectives
    if names is None:
        names = ("clip", "cloob") if options.from_scratch else _OBJECTIVES
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"--objectives is {' '.join(names) or 'empty'}; it must be one or several"
            " different ones"
        )
    out = options.out or Path("runs", recipe)
    leaves: dict[str, Any] = {"seed": options.seed}
    if options.epochs is not None:
        leaves["epochs"] = options.epochs
    runs: list[str] = list(names)
    if options.objectives is None and not options.from_scratch:
        runs.append("cca")
    configs: dict[str, Config] = {}
    for name in runs:
        objective: Any = name
        config = cloob.get_recipe(recipe, objective=objective)
        if name != "cca":  # which has no loop
            config = config.override(**leaves)
        configs[name] = config.override(
            device=options.device, overwrite=True, out=out / name
        )
    return configs


def folder_of(configs: Mapping[str, Config]) -> Path:
    """The folder of all runs."""
    return next(iter(configs.values())).out.parent


def check_index_place(index: Path) -> None:
    """Raises InputError where the index of the pictures would take the place of
    somebody's files.
    """
    is_index = (index / INDEX_FILE).is_file()
    if index.is_dir() and not is_index and any(index.iterdir()):
        raise InputError(
            f"{index}: holds other files, and no index of an earlier demo; give another"
            " --out"
        )


def present(
    configs: Mapping[str, Config],
    device: str,
    noto: LabelledSet,
    held_out: CaptionedSet,
) -> int:
    """Trains runs by their names; classifies and searches ``noto``; retrieves among the
    pairs ``held_out``.
    """
    from cloob.distributed import resolve_device
    from cloob.evaluation.analysis import search_pictures
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.sets.suites import SuiteSets
    from cloob.evaluation.suite import evaluate, write_results

    out = folder_of(configs)
    evaluation.begin((), out)
    runs = train_all(configs)
    if runs is None:
        return 1
    say("embedding the test pictures and the words for them …")
    folders = {name: result.run for name, result in runs.items()}
    sets = SuiteSets([noto], pairs=[held_out])
    options = EmbedOptions(resolve_device(device), workers=2)
    with progress() as update:
        embeddings = Embeddings(folders, options, progress=update)
        results = evaluate(
            embeddings,
            sets.sets,
            sets.pairs,
            train_seconds={name: result.seconds for name, result in runs.items()},
            settings={
                name: settings_of(config, runs[name])
                for name, config in configs.items()
            },
        )
    write_results(out / evaluation.RESULTS_FILE, results)
    finder = best_classifier(results["rows"])
    order = [finder, *(name for name in runs if name != finder)]
    found = search_pictures(embeddings, noto, TEXTS, k=8, models=order)
    frozen = isinstance(next(iter(configs.values())), cloob.HeadsConfig)
    page = out / evaluation.PAGE_FILE
    evaluation.write_page(
        page,
        embeddings,
        results,
        sets,
        title=f"Five searches among {len(noto):,} pictures that no model here was"
        " trained on",
        notes=notes_of(configs, frozen=frozen),
        searches=found,
    )
    code = evaluation.print_results(results)
    if frozen:
        print_suspects(next(iter(configs.values())), out)
    print_found(found, finder)
    write_index(out, noto, folders[finder], device)
    print(
        f"\n{out}/  one run folder per objective, results.json, pictures/,"
        f" {INDEX_FOLDER}/\n{page}"
    )
    say_next(["serve", out / INDEX_FOLDER])
    return code


def train_all(
    configs: Mapping[str, Config],
) -> dict[str, RunResult | HeadsResult] | None:
    """Trains all runs; None where one was stopped, as by SIGTERM."""
    # progress of the frozen encoders
    logging.getLogger("cloob.heads.features").setLevel(logging.INFO)
    runs: dict[str, RunResult | HeadsResult] = {}
    for name, config in configs.items():
        result = train(name, config)
        if getattr(result, "stopped", None):
            say(f"{name} was stopped; nothing is compared")
            return None
        runs[name] = result
    return runs


def train(name: str, config: Config) -> RunResult | HeadsResult:
    """Trains towers or heads."""
    if isinstance(config, cloob.HeadsConfig):
        from cloob.heads.run import train_heads

        return train_heads(config, on_epoch=show_epoch(name))
    return train_to_the_signal(config, name)


def settings_of(config: Config, result: Any) -> dict[str, Any]:
    """What the report says of a training."""
    names = ["epochs", "batch_size", "lr", "dropout", "seed"]
    if not isinstance(config, cloob.HeadsConfig):
        names.remove("dropout")
    return {"steps": result.steps, **{name: vars(config)[name] for name in names}}


def best_classifier(rows: Sequence[Mapping[str, Any]]) -> str:
    """The model that classifies most pictures right: its finds are shown first, and the
    index is built with it.
    """

    def accuracy(row: Mapping[str, Any]) -> float:
        return max((numbers["acc1"] for numbers in row["zeroshot"].values()), default=0)

    return str(max(rows, key=accuracy)["model"])


def notes_of(configs: Mapping[str, Config], *, frozen: bool) -> tuple[str, str]:
    """The paragraphs under the title of the page."""
    same = _SAME.format("frozen encoders" if frozen else "towers")
    if "cca" in configs:
        same += " cca is a closed form: it has no steps, and nothing of it was tuned."
    return _NOTES, same


def print_suspects(config: Config, out: Path) -> None:
    """Prints and lists the training captions that least seem to belong."""
    from cloob.data.open import open_source

    print("\nits captions:")
    assert isinstance(config, cloob.HeadsConfig)
    source = open_source(*config.sources)
    judged = judge_pictures(source, config)
    report(judged, out / "suspects.csv", out / "suspects.html", 60)


def print_found(found: Sequence[ExampleQuery], finder: str) -> None:
    """Prints the classes of the pictures that a model finds for each text."""
    print(f"\nfound by {finder}:")
    width = max(map(len, TEXTS))
    for query in found:
        names = ", ".join(picture.label for picture in query.answers[finder][:4])
        print(f"  {query.query:<{width}}  {names}")


def write_index(out: Path, noto: LabelledSet, model: Path, device: str) -> None:
    """Writes the pictures as files, and an index of them."""
    from cloob.search import address
    from cloob.search.update import UpdateOptions

    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for place, label in enumerate(noto.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", noto.classnames[label])
        (pictures / f"{name} {place}.webp").write_bytes(noto.read(place)[1])
    index = out / INDEX_FOLDER
    check_index_place(index)
    if address.is_there(index):
        address.remove(str(index))  # of an earlier demo, with another model
    say("an index of the pictures …")
    with cloob.Index.create(index) as created:
        created.update([pictures], UpdateOptions(model=str(model), device=device))
