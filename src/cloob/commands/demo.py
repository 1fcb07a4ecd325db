"""``cloob demo``: train CLIP, InfoLOOB and CLOOB on a set that comes along, and search
its pictures.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloob
from cloob.commands import eval as measure
from cloob.commands.console import refuse, say, say_next
from cloob.commands.data import suspects_of_pictures
from cloob.family import ObjectiveName
from cloob.models.source import check_packages

if TYPE_CHECKING:
    from cloob.evaluation.sets.pictures import CaptionedSet, LabelledSet

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
    from cloob.training.config.checks import preflight

    recipe = "demo-scratch" if options.from_scratch else "demo"
    usual: tuple[ObjectiveName, ...] = (
        ("clip", "cloob") if options.from_scratch else ("clip", "infoloob", "cloob")
    )
    out, objectives = (
        options.out or Path("runs", recipe),
        usual if options.objectives is None else options.objectives,
    )
    message = (
        f"--objectives is {' '.join(objectives) or 'empty'}; it must be one or several"
        " different ones"
    )
    refuse({message: not objectives or len(set(objectives)) < len(objectives)})
    more: dict[str, Any] = {} if options.epochs is None else {"epochs": options.epochs}
    more |= {"seed": options.seed, "device": options.device, "overwrite": True}
    starts = ((name, cloob.get_recipe(recipe, objective=name)) for name in objectives)
    configs: dict[str, cloob.TrainConfig] = {
        name: start.override(**more, out=out / name) for name, start in starts
    }
    if options.objectives is None and not options.from_scratch:
        configs["cca"] = cloob.get_recipe(recipe).override(
            **more, objective="cca", out=out / "cca"
        )
    for config in configs.values():
        check_packages(
            config.align.encoders(), ", and cloob demo --from-scratch needs none"
        )
        preflight(config)
    say(f"{', '.join(configs)} on 6,110 pictures with captions; loading …")
    from cloob.evaluation.sets.pictures import open_captioned, open_labelled

    return present(
        configs,
        options.device,
        open_labelled("demo:noto-emoji"),
        open_captioned("demo:val"),
    )


def present(
    configs: Mapping[str, cloob.TrainConfig],
    device: str,
    noto: LabelledSet,
    held_out: CaptionedSet,
) -> int:
    """Trains runs by their names; classifies and searches ``noto``; retrieves among the
    pairs ``held_out``.
    """
    from cloob.data.open import open_source
    from cloob.distributed import resolve_device
    from cloob.evaluation.analysis import example_queries
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.sets.suites import SuiteSets
    from cloob.search.update import UpdateOptions
    from cloob.training.callbacks import ProgressDisplay

    out = next(iter(configs.values())).save.out.parent
    embedding = EmbedOptions(resolve_device(device), workers=2)
    measure.begin((), out)
    logging.getLogger("cloob.training.align").setLevel(
        logging.INFO
    )  # progress of the frozen encoders
    runs, settings = {}, {}
    for name, config in configs.items():
        runs[name] = cloob.train(config, callbacks=[ProgressDisplay(title=name)])
        if runs[name].stopped:  # after SIGTERM the next training does not begin
            say(f"{name} was stopped by {runs[name].stopped}; nothing is compared")
            return 1
        run, align = config.run, config.align
        dropout = align.head_dropout if align.image_encoder else None
        facts = {
            "epochs": run.epochs,
            "batch_size": run.batch_size,
            "lr": config.optim.lr,
            "head_dropout": dropout,
        }
        settings[name] = {"steps": runs[name].steps, **facts, "seed": run.seed}
    say("embedding the test pictures and the words for them …")
    seconds = {name: result.seconds for name, result in runs.items()}
    folders = {name: result.run for name, result in runs.items()}
    sets = SuiteSets([noto], pairs=[held_out])
    embeddings, results = measure.compare(
        folders, sets, embedding, out, train_seconds=seconds, settings=settings
    )
    # The model that classifies most pictures right: its finds are shown first, and the
    # index is built with it.
    best = max(
        results["rows"],
        key=lambda row: max(
            (of_set["acc1"] for of_set in row["zeroshot"].values()), default=0
        ),
    )
    finder = str(best["model"])
    order = [finder, *(name for name in runs if name != finder)]
    found = example_queries(embeddings, noto, TEXTS, k=8, models=order)
    frozen = all(config.align.image_encoder for config in configs.values())
    closed = (
        " cca is a closed form: it has no steps, and nothing of it was tuned."
        if "cca" in configs
        else ""
    )
    notes = (_NOTES, _SAME.format("frozen encoders" if frozen else "towers") + closed)
    title = (
        f"Five searches among {len(noto):,} pictures that no model here was trained on"
    )
    page = out / "report.html"
    measure.write_page(
        page, embeddings, results, sets, title=title, notes=notes, searches=found
    )
    code = measure.print_results(results)
    if frozen:
        config = next(iter(configs.values()))
        source = open_source(*config.pairs.data)
        print("\nits captions:")
        suspects_of_pictures(
            source, config, out / "suspects.csv", out / "suspects.html", 60
        )
    print(f"\nfound by {finder}:")
    for query in found:
        names = ", ".join(picture.label for picture in query.answers[finder][:4])
        print(f"  {query.query:<{max(map(len, TEXTS))}}  {names}")
    pictures, index = out / "pictures", out / "index"
    pictures.mkdir(exist_ok=True)
    for place, label in enumerate(noto.labels.tolist()):
        name = re.sub(r"[^\w (),.'-]", "_", noto.classnames[label])
        (pictures / f"{name} {place}.webp").write_bytes(noto.read(place)[1])
    shutil.rmtree(index, ignore_errors=True)  # of an earlier demo, with another model
    say("an index of the pictures …")
    with cloob.Index.create(index) as created:
        created.update(
            [pictures], UpdateOptions(model=str(folders[finder]), device=device)
        )
    print(
        f"\n{out}/  one run folder per objective, results.json, pictures/,"
        f" index/\n{page}"
    )
    say_next(["serve", index])
    return code
