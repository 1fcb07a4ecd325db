"""``cloob demo``: train CLIP, InfoLOOB, CLOOB and a closed form on bundled pictures,
and search others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cloob
from cloob.commands import eval as evaluation
from cloob.commands.console import progress, say, say_next
from cloob.commands.suspects import judge_pictures, report
from cloob.errors import InputError
from cloob.heads.config import HeadsConfig, check_config
from cloob.models.runs import find_run
from cloob.models.source import check_packages
from cloob.recipes import HeadObjective

if TYPE_CHECKING:
    from cloob.evaluation.report.page import ExampleQuery
    from cloob.evaluation.results import Results, Row
    from cloob.evaluation.sets.pictures import CaptionedSet, LabelledSet
    from cloob.heads.fitted import EpochLine
    from cloob.heads.run import HeadsResult

INDEX_FOLDER = "index"
PICTURES_FOLDER = "pictures"
SUSPECTS_FILE = "suspects.csv"
SUSPECTS_PAGE = "suspects.html"
OBJECTIVES: tuple[HeadObjective, ...] = ("clip", "infoloob", "cloob", "cca")
WRITTEN = {
    *OBJECTIVES,
    INDEX_FOLDER,
    PICTURES_FOLDER,
    SUSPECTS_FILE,
    SUSPECTS_PAGE,
    evaluation.RESULTS_FILE,
    evaluation.PAGE_FILE,
}
TEXTS = ("red heart", "animal with a trunk", "an insect", "yellow flower", "a clock")
N_SUSPECTS = 60  # on their page
NOTES = (
    "Trained on pictograms of other makers than the Noto emoji that are searched and"
    " classified here; no Noto picture was trained on. The texts were picked by hand"
    " from 32 that were tried; abstract ones, such as “something to eat”, find little."
    " One short run on a CPU shows how things work; it does not settle which objective"
    " is better.",
    "The same frozen encoders, data, seed and number of steps; the objective and its"
    " tuned settings differ. cca is a closed form: it has no steps, and nothing of it"
    " was tuned.",
)


@dataclass(frozen=True)
class Options:
    """Train CLIP, InfoLOOB, CLOOB and a closed form on bundled pictures, then
    search others; no network.
    """

    epochs: int | None = None
    """Passes over the 6,110 pairs; the recipe's when left out."""
    out: Path = Path("runs/demo")
    """Folder of all this; an earlier demo in it is replaced."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def run(options: Options) -> int:
    """Trains, compares and searches."""
    configs = make_configs(options)
    check_place(options.out)
    for config in configs.values():
        check_packages([str(config.image_encoder), str(config.text_encoder)])
        check_config(config)
    say(f"{', '.join(configs)} on 6,110 pictures with captions; loading …")
    from cloob.evaluation.sets.pictures import open_captioned, open_labelled

    noto, pairs = open_labelled("demo:noto-emoji"), open_captioned("demo:val")
    return present(configs, options.device, noto, pairs)


def make_configs(options: Options) -> dict[str, HeadsConfig]:
    """The configuration of a run by the name of its objective."""
    configs: dict[str, HeadsConfig] = {}
    for name in OBJECTIVES:
        config = cloob.get_recipe("demo", objective=name)
        if options.epochs is not None and name != "cca":  # which has no loop
            config = config.override(epochs=options.epochs)
        configs[name] = config.override(
            device=options.device, overwrite=True, out=options.out / name
        )
    return configs


def check_place(out: Path) -> None:
    """Raises InputError for a folder that holds something else than an earlier demo."""
    first = OBJECTIVES[0]
    written = WRITTEN if find_run(out / first) else {first}
    others = sorted({path.name for path in out.glob("[!.]*")} - written)
    if others:
        raise InputError(
            f"{out}: holds {others[0]}, which no earlier demo wrote; give another --out"
        )


def present(
    configs: Mapping[str, HeadsConfig],
    device: str,
    noto: LabelledSet,
    held_out: CaptionedSet,
) -> int:
    """Trains runs by their names; classifies and searches ``noto``; retrieves among the
    pairs ``held_out``.
    """
    first = next(iter(configs.values()))
    out = first.out.parent
    evaluation.begin((), out)
    runs = train_all(configs)
    results, found = compare(configs, runs, device, noto, held_out)
    finder = best_classifier(results["rows"])
    write_index(out, noto, runs[finder].run, device)

    print_suspects(first, out)
    print_found(found, finder)
    print()
    code = evaluation.print_results(results)
    print(
        f"\n{out}/  one run folder per objective, results.json,"
        f" {PICTURES_FOLDER}/, {INDEX_FOLDER}/\n{out / evaluation.PAGE_FILE}"
    )
    index = out / INDEX_FOLDER
    say_next(
        ["serve", index],
        ["search", index, "an insect"],
        ["data", "demo", "--suspects", SUSPECTS_FILE, "--out", SUSPECTS_PAGE],
    )
    return code


def train_all(configs: Mapping[str, HeadsConfig]) -> dict[str, HeadsResult]:
    """Trains all runs, by their names."""
    # progress of the frozen encoders
    logging.getLogger("cloob.heads.features").setLevel(logging.INFO)
    return {name: train(name, config) for name, config in configs.items()}


def train(name: str, config: HeadsConfig) -> HeadsResult:
    """Trains a run, and says how its loss went."""
    from cloob.heads.run import train_heads

    losses = []
    say(f"training {name} …")
    update = progress()

    def note(line: EpochLine) -> None:
        losses.append(line["loss"])
        update(f"training {name}", line["epoch"], config.epochs)

    result = train_heads(config, on_epoch=note)
    done = "solved"
    if losses[0] is not None:
        done = f"mean loss {losses[0]:.2f} in epoch 1, {losses[-1]:.2f} in the last"
    say(f"{name}: {done}; {result.seconds:.0f} s")
    return result


def compare(
    configs: Mapping[str, HeadsConfig],
    runs: Mapping[str, HeadsResult],
    device: str,
    noto: LabelledSet,
    held_out: CaptionedSet,
) -> tuple[Results, Sequence[ExampleQuery]]:
    """Measures the runs, and writes the report."""
    from cloob.distributed import resolve_device
    from cloob.evaluation.analysis import search_pictures
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.results import write_results
    from cloob.evaluation.sets.paper import Sets
    from cloob.evaluation.suite import evaluate

    say("embedding the test pictures and the words for them …")
    sets = Sets([noto], pairs=[held_out])
    embeddings = Embeddings(
        {name: result.run for name, result in runs.items()},
        EmbedOptions(resolve_device(device), workers=2),
        progress=progress(),
    )
    results = evaluate(embeddings, sets.sets, sets.pairs)
    say("searching, and writing the report …")
    finder = best_classifier(results["rows"])
    order = sorted(runs, key=lambda name: name != finder)
    found = search_pictures(embeddings, noto, TEXTS, k=8, models=order)
    out = next(iter(configs.values())).out.parent
    write_results(out / evaluation.RESULTS_FILE, results)
    evaluation.write_page(
        out / evaluation.PAGE_FILE,
        embeddings,
        results,
        sets,
        title=f"Five searches among {len(noto):,} pictures that no model here was"
        " trained on",
        notes=NOTES,
        searches=found,
    )
    return results, found


def best_classifier(rows: Sequence[Row]) -> str:
    """The model that classifies most pictures right: its finds are shown first, and the
    index is built with it.
    """

    def accuracy(row: Row) -> float:
        return max((numbers["acc1"] for numbers in row["zeroshot"].values()), default=0)

    return max(rows, key=accuracy)["model"]


def print_suspects(config: HeadsConfig, out: Path) -> None:
    """Prints and lists the training captions that least seem to belong."""
    from cloob.data.open import open_source

    say("looking for captions that do not belong to their pictures …")
    judged = judge_pictures(open_source(*config.sources), config)
    print("its captions:")
    report(judged, out / SUSPECTS_FILE, out / SUSPECTS_PAGE, N_SUSPECTS)


def print_found(found: Sequence[ExampleQuery], finder: str) -> None:
    """Prints the classes of the pictures that a model finds for each text."""
    print(f"\nfound by {finder}:")
    width = max(map(len, TEXTS))
    for query in found:
        names = ", ".join(picture.label for picture in query.answers[finder][:4])
        print(f"  {query.query:<{width}}  {names}")


def write_index(out: Path, noto: LabelledSet, model: Path, device: str) -> None:
    """Writes the pictures as files, and an index of them."""
    from cloob.search import database
    from cloob.search.update import UpdateOptions

    say("an index of the pictures …")
    pictures = out / PICTURES_FOLDER
    pictures.mkdir(exist_ok=True)
    for place, label in enumerate(noto.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", noto.classnames[label])
        (pictures / f"{name} {place}.webp").write_bytes(noto.read(place)[1])
    index = out / INDEX_FOLDER
    if database.is_there(index):
        database.remove(index)  # of an earlier demo, with another model
    with cloob.Index.create(index) as created:
        created.update([pictures], UpdateOptions(model=str(model), device=device))
