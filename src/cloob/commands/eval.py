"""``cloob eval``: zero-shot classification, linear probes, retrieval and geometry of
one or several models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cloob
from cloob.commands.console import (
    MeasureOptions,
    Positional,
    arg,
    as_words,
    check,
    progress,
    say,
    say_next,
)
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError, refuse
from cloob.models.runs import RUN_CONFIG_FILE, curve, read_validation, run_of

if TYPE_CHECKING:
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.sets.suites import SuiteSets

# The numbers that a terminal shows; the report has all.
_SHOWN = {
    "zeroshot": "acc1",
    "probe": "acc1",
    "retrieval": "image_to_text@1|text_to_image@10?",
    "vectors": r".*@\d+",
}
Runs = Sequence[
    tuple[str, Path, "cloob.TrainConfig"]
]  # models of runs, folders, configurations
NO_MODEL = "no model given: name a run folder, or NAME/TAG of open_clip (see --help)"
_TITLES = {"zeroshot acc1": "zero-shot top-1", "probe acc1": "linear probe top-1"}


@dataclass(frozen=True)
class Options:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several
    models, side by side.
    """

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL …")]
    """Run folders (RUN: its best checkpoint, RUN:last), model folders, open_clip
    NAME/TAG, hf-hub:… or local-dir:…
    """
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: of CLIP_benchmark, a sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many sets: paper, pictograms or vtab+, with their folders unless --root is given.
    """
    root: Path | None = None
    """Folder of the suites that are named without one."""
    retrieval: tuple[str, ...] = ()
    """Pictures with captions, as `cloob train --data` reads, or of CLIP_benchmark."""
    held_out: bool = False
    """Judge by the pairs that a run held out of its training, as by --retrieval."""
    a: str | None = None
    """Vectors, for runs of `cloob train vectors`: as --a there."""
    b: str | None = None
    """Vectors that belong to those of --a."""
    ids: str | None = None
    """An id per pair of --a and --b; the rows of an id are one sample."""
    a_ids: str | None = None
    """In place of --ids: an id per row of --a, by which it finds its row of --b."""
    b_ids: str | None = None
    """An id per row of --b."""
    probe: bool = False
    """Also fit a linear probe per labelled set with training images (train/ next to
    test/).
    """
    shots: int | None = None
    """Training images a class of a probe; all when left out."""
    probe_seeds: tuple[int, ...] = (0,)
    """One probe a seed, which draws its shots and its validation images."""
    out: Path = Path("runs/eval")
    """Folder of results.json, report.html and per_class/."""
    machine: MeasureOptions = field(default_factory=MeasureOptions)


def run(options: Options) -> int:
    """Evaluates; 1 when a part could not be evaluated, with what there is written."""
    rules = ["root needs suite", "shots needs probe", "probe_seeds needs probe"]
    rules += ["image_column needs retrieval", "caption_column needs retrieval"]
    rules += [
        "a needs b",
        "b needs a",
        "ids needs a",
        "a_ids needs b_ids",
        "b_ids needs a_ids",
    ]
    rules += [
        "a excludes zeroshot suite retrieval held_out probe",
        "ids excludes a_ids",
    ]
    check(options, *rules, shots=(1, 1_000_000))
    on = (
        options.zeroshot
        or options.retrieval
        or options.suite
        or options.held_out
        or options.a
    )
    choice = "--zeroshot DIR …, --suite NAME DIR, --retrieval SOURCE … or --held-out, of vectors --a and --b"
    refuse(
        {NO_MODEL: not options.models, f"nothing to evaluate on: give {choice}": not on}
    )
    from cloob.evaluation.sets.pictures import open_captioned, open_labelled
    from cloob.evaluation.sets.suites import open_suites, training_split

    sets, out = (
        open_suites(options.suite, options.root, probe=options.probe),
        options.out,
    )
    labelled = _named(options.zeroshot, map(open_labelled, options.zeroshot))
    sets.sets += labelled
    for path, data in zip(options.zeroshot, labelled, strict=True):
        if options.probe and (train := training_split(path)) is not None:
            sets.training[data.name] = train
    captioned = (
        open_captioned(path, **options.machine.columns) for path in options.retrieval
    )
    sets.pairs += _named(options.retrieval, captioned)
    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_pairs

        sets.vectors.append(
            open_pairs(options.a, options.b, options.ids, options.a_ids, options.b_ids)
        )
    from cloob.models.load import find_model_folder  # torch

    runs = []
    for model in options.models:
        with contextlib.suppress(InputError):  # loading it will report that
            folder = find_model_folder(model)
            if folder is not None and (run := run_of(folder)) is not None:
                runs.append(
                    (model, folder, cloob.TrainConfig.from_json(run / RUN_CONFIG_FILE))
                )
    if options.held_out:
        _add_held_out(sets, runs)
    judged = {
        os.path.realpath(spec)
        for spec in (*options.retrieval, *filter(None, [options.a]))
    }
    for model, _, config in runs:
        trained = [
            spec
            for spec in (*config.pairs.data, config.vectors.a)
            if spec and os.path.realpath(spec) in judged
        ]
        if trained:
            advice = (
                "; --held-out judges by pairs that were not" if config.holds_out else ""
            )
            say(f"{model}: was trained on {', '.join(trained)}{advice}")
    skipped = [
        f"{skip.key}: {skip.detail}"
        for pairs in sets.vectors
        for skip in pairs.skipped[:3]
    ]
    for line in (*skipped, *sets.missing.values()):
        say(line)
    given = sets.pairs or sets.vectors
    untrained = options.probe and not sets.training and not sets.training_failed
    refuse(
        {
            f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used": not sets.sets
            and not given,
            "--probe: none of the sets has training images (a folder train/ next to test/)": untrained,
        }
    )
    models = begin(options.models, out)

    from cloob.evaluation.probe import ProbeOptions
    from cloob.evaluation.suite import seed_lines, write_per_class

    probe = ProbeOptions(shots=options.shots, seeds=options.probe_seeds)
    embeddings, results = compare(
        models, sets, options.machine.embedding(), out, runs, probe=probe
    )
    per_class = "Recall per class, and what it is mostly taken for: per_class/*.csv next to this page."
    notes = (
        [per_class]
        if write_per_class(out / "per_class", results, embeddings, sets.sets)
        else []
    )
    write_page(
        out / "report.html", embeddings, results, sets, title="Evaluation", notes=notes
    )
    code = print_results(results)
    for entry in results["differences"] if sets.vectors else ():
        mean, low, high = (100 * entry[key] for key in ("difference", "low", "high"))
        print(
            f"{entry['model']} − {entry['baseline']}, {entry['metric']}: {mean:+.1f} ({low:+.1f} … {high:+.1f})"
        )
    print(
        *seed_lines(results.get("seeds", ())),
        out / "results.json",
        out / "report.html",
        sep="\n",
    )
    if code == 0 and not sets.vectors:
        columns = as_words(options, "image_column", "caption_column")
        of_pairs = (
            ["--pairs", options.retrieval[0], *columns] if options.retrieval else []
        )
        say_next(["analyze", *options.models, *of_pairs, "--out", out / "analyze"])
    return code


def _add_held_out(sets: SuiteSets, runs: Runs) -> None:
    """Adds the held-out pairs of runs, which must be the same for all of them."""
    from cloob.data.source import digest
    from cloob.evaluation.sets.pictures import by_picture, open_captioned
    from cloob.training.given import open_pairs

    refuse(
        {
            "--held-out: no model here is a run of `cloob train`; name one, or pairs by --retrieval": not runs
        }
    )
    splits: dict[object, str] = {}  # by what chooses the held-out pairs
    for name, _, its in runs:
        columns = {
            "image_column": its.pairs.image_column,
            "caption_column": its.pairs.caption_column,
        }
        split = its.pairs.val_data or (its.pairs.data, its.pairs.val_split)
        splits.setdefault((split, its.vectors, *columns.values()), name)
    model, folder, config = runs[0]
    pairs, other = config.pairs, next(iter([*splits.values()][1:]), None)
    specs = pairs.val_data or pairs.data
    named = "--a and --b" if config.has_vectors else "--retrieval"
    # A run folder may come from a stranger: nothing is fetched or run that nobody
    # typed.
    streamed = f"{model}: its held-out pairs are streamed; type them: --retrieval {' '.join(specs)}"
    refuse(
        {
            f"{model}: held no pairs out of its training; name pairs by {named}": not config.holds_out,
            f"{model} and {other} held different pairs out; evaluate one at a time": other,
            streamed: any(map(is_remote, specs)),
        }
    )
    held_out: Any
    try:
        if pairs.val_data:
            opened = [open_captioned(spec, **columns) for spec in pairs.val_data]
            sets.pairs += [
                dataclasses.replace(item, name=f"{item.name} (held out)")
                for item in opened
            ]
            return
        _, held_out = open_pairs(
            config if config.vectors.a else cloob.TrainConfig(pairs), train=False
        )
    except InputError as error:
        raise InputError(
            f"{model}: its held-out pairs cannot be read; {error}"
        ) from None
    known = (read_validation(folder.parent) or {}).get("held_out")
    result = digest([json.dumps(held_out.fingerprint(), sort_keys=True)])
    changed = f"{model}: its pairs have changed since the training, so nobody knows which were held out"
    refuse({changed: known not in (None, result)})
    if config.vectors.a:
        sets.vectors.append(held_out)
        return
    name = f"{', '.join(Path(spec).name for spec in pairs.data)} (held out)"
    sets.pairs.append(by_picture(name, held_out))


def begin(models: Sequence[str], out: Path) -> dict[str, str]:
    """Models by name; refuses an unwritable folder, and reports which runs stand for
    their best checkpoint.
    """
    from cloob.models.runs import checkpoint_step, chosen_checkpoint, with_checkpoint

    place = next(
        path for path in (out, *out.parents) if path.exists()
    )  # a folder made here would outlive an error
    refuse(
        {
            f"{out}: results cannot be written here": not (
                place.is_dir() and os.access(place, os.W_OK)
            )
        }
    )
    for model in models:
        if with_checkpoint(model) == f"{model}:best":
            step = checkpoint_step(chosen_checkpoint(Path(model)))
            say(
                f"{model}: its best checkpoint, step {step:,} ({model}:last is the last)"
            )
    names = [Path(model).name or model for model in models]
    return {
        model if names.count(name) > 1 else name: model
        for model, name in zip(models, names, strict=True)
    }


def _named(typed: Sequence[str], opened: Iterable[Any]) -> list[Any]:
    """Sets; those of equal names are called as they were typed."""
    sets = list(opened)
    names = [data.name for data in sets]
    pairs = zip(typed, sets, strict=True)
    return [
        dataclasses.replace(data, name=path) if names.count(data.name) > 1 else data
        for path, data in pairs
    ]


def compare(
    models: Mapping[str, str | Path],
    sets: SuiteSets,
    options: EmbedOptions,
    out: Path,
    runs: Runs = (),
    **more: Any,
) -> tuple[Embeddings, dict[str, Any]]:
    """Measures models and writes results.json; a missing set fails no model.

    Of ``runs`` whose configurations differ by seed (and folder) alone it has means.
    """
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.suite import evaluate, over_seeds, write_results

    with progress() as update:
        embeddings = Embeddings(
            models, options, progress=update, tower=bool(sets.training)
        )
        results = evaluate(
            embeddings,
            sets.sets,
            sets.pairs,
            vectors=sets.vectors,
            training=sets.training,
            **more,
        )
    if sets.missing:
        absent = [
            {"model": None, "set": name, "error": error}
            for name, error in sets.missing.items()
        ]
        results["failures"] = [*absent, *results.get("failures", ())]
    alike: dict[str, dict[int, str]] = {}  # names by seed
    names = {model: name for name, model in models.items()}
    for model, _, config in runs:
        of_seed = alike.setdefault(
            config.override(seed=0, out=Path("runs/train")).to_json(), {}
        )
        of_seed[config.run.seed] = names[model]
    groups = {}
    for i, group in enumerate((group for group in alike.values() if len(group) > 1), 1):
        start = os.path.commonprefix(list(group.values()))  # noqa: RUF071 - letter by letter
        groups[start.rstrip("-_0123456789") or f"group {i}"] = group
    if groups:
        results["seeds"] = over_seeds(results["rows"], groups)
    write_results(out / "results.json", results)
    return embeddings, results


def write_page(
    path: Path,
    embeddings: Embeddings,
    results: Mapping[str, Any],
    sets: SuiteSets,
    **more: Any,
) -> None:
    """Writes the report: the numbers, curves of the runs, example queries, and what
    ``write_report`` takes besides.
    """
    from cloob.evaluation.analysis import example_queries
    from cloob.evaluation.report.page import write_report
    from cloob.evaluation.suite import of_sides

    rows, queries = results["rows"], []
    models = [row["model"] for row in rows]
    for some, key, n in ((sets.sets, "zeroshot", 8), (sets.pairs, "retrieval", 4)):
        measured = [data for data in some if all(data.name in row[key] for row in rows)]
        queries += (
            example_queries(embeddings, measured[0], n=n, models=models)
            if measured
            else []
        )
    curves = {
        model: lines
        for model in models
        if (lines := curve(str(embeddings.models[model])))
    }
    if sets.vectors:
        curves = {model: list(map(of_sides, lines)) for model, lines in curves.items()}
    write_report(path, results, curves=curves, queries=queries, **more)


def print_results(results: Mapping[str, Any], *, geometry: bool = False) -> int:
    """Prints a row per accuracy, or number of the geometry, and a column per model;
    returns the exit code.

    Reports what could not be read, loaded or measured, missing sets apart.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cloob.evaluation.report.tables import problems

    rows, table = results["rows"], Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("" if geometry else "%, ± half the 95 % CI", no_wrap=True)
    for row in rows:
        table.add_column(escape(row["model"]), justify="right")
    for section, pattern in {"geometry": ".*"}.items() if geometry else _SHOWN.items():
        names = dict.fromkeys(name for row in rows for name in row.get(section, ()))
        for name in names:
            of_models = [row.get(section, {}).get(name, {}) for row in rows]
            keys = (
                key
                for numbers in of_models
                for key, value in numbers.items()
                if isinstance(value, int | float)
            )
            for key in dict.fromkeys(key for key in keys if re.fullmatch(pattern, key)):
                title = _TITLES.get(f"{section} {key}") or key.replace(
                    "_to_", " → "
                ).replace("@", " recall@")
                title = (
                    f"{name}: {title}" if len(names) > 1 else title.replace("_", " ")
                )
                cells = []
                for value, interval in (
                    (numbers.get(key), numbers.get(f"{key}_interval"))
                    for numbers in of_models
                ):
                    if value is None:
                        cells.append("–")
                    elif interval:
                        cells.append(
                            f"{100 * value:.1f} ± {50 * (interval[1] - interval[0]):.1f}"
                        )
                    elif "@" in key:
                        cells.append(f"{100 * value:.1f}")
                    else:
                        cells.append(
                            f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
                        )
                table.add_row(escape(title), *cells)
    seconds = [row.get("train_seconds") for row in rows]
    if any(item is not None for item in seconds):
        table.add_row(
            "training, seconds",
            *("–" if item is None else f"{item:,.0f}" for item in seconds),
        )
    if table.row_count:
        Console().print(table)
    templates = {
        "unreadable": "{0.set}",
        "unloaded": "{0.model} could not be loaded",
        "failed": "{0.model} on {0.set}",
    }
    for kind, what in templates.items():
        for problem in problems(results)[kind]:
            say(f"{what.format(problem)}: {problem.message}")
    return 1 if results.get("failures") else 0
