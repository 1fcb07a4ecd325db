"""``cloob eval``: zero-shot classification, linear probes, retrieval and geometry of
one or several models.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cloob.commands.console import check_folder, print_table, progress, say, threads
from cloob.commands.held_out import Run, add_held_out, find_runs, note_choices
from cloob.commands.options import Batch, Device, Threads, as_words
from cloob.commands.protocols import title
from cloob.errors import InputError
from cloob.models.runs import (
    checkpoint_step,
    chosen_checkpoint,
    list_checkpoints,
    split_checkpoint,
    with_checkpoint,
)

if TYPE_CHECKING:
    from cloob.evaluation.embed import EmbedOptions
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.protocols import Candidates
    from cloob.evaluation.report.page import ExampleQuery
    from cloob.evaluation.results import Failure, Numbers, Results, Row, Section
    from cloob.evaluation.sets.paper import Sets
    from cloob.evaluation.sets.pictures import CaptionedSet, LabelledSet

PicturesT = TypeVar("PicturesT", "LabelledSet", "CaptionedSet")
RESULTS_FILE = "results.json"
PAGE_FILE = "report.html"
# The numbers that a terminal shows; the report has all.
_SHOWN: dict[Section, str] = {
    "zeroshot": "acc1",
    "probe": "acc1",
    "retrieval": "image_to_text@1|text_to_image@10?",
    "vectors": r".*(@\d+|@1%|_mrr)",
}
_TITLES = {"zeroshot acc1": "zero-shot top-1", "probe acc1": "linear probe top-1"}


@dataclass(frozen=True)
class Options:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several
    models, side by side.
    """

    models: Annotated[tuple[str, ...], "MODEL …"] = ()
    """Run folders (RUN: its best checkpoint, RUN:last), model folders, open_clip
    NAME/TAG, hf-hub:… or local-dir:…
    """
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: of CLIP_benchmark, a sub-folder a class, or demo:noto-emoji."""
    paper: Path | None = None
    """Folder of the paper's eight labelled sets (docs: Evaluation)."""
    retrieval: tuple[str, ...] = ()
    """Pictures with captions, as `cloob train --data` reads."""
    held_out: bool = False
    """Judge by the pairs that a run held out of its training, as by --retrieval."""
    checkpoints: bool = False
    """Also measure the geometry of every checkpoint of runs, on the first pairs with
    pictures.
    """
    a: str | None = None
    """Vectors, for runs of `cloob train vectors`: as --a there."""
    b: str | None = None
    """Vectors that belong to those of --a."""
    ids: str | None = None
    """An id per pair of --a and --b; the rows of an id are one sample."""
    groups: str | None = None
    """A group per row of --a: intervals are over groups."""
    a_ids: str | None = None
    """In place of --ids: an id per row of --a, by which it finds its row of --b."""
    b_ids: str | None = None
    """An id per row of --b."""
    candidates: Path | None = None
    """JSON lines, a list per row of --a of the ids of --b that it is also ranked
    among.
    """
    probe: bool = False
    """Also fit a linear probe per labelled set with training images (train/ next to
    test/).
    """
    out: Path = Path("runs/eval")
    """Folder of results.json and report.html."""
    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Threads = None
    """Decoding threads; left out, one per processor."""
    batch_size: Batch = 256
    """Images or texts a forward pass."""


def run(options: Options) -> int:
    """Evaluates; 1 when a part could not be evaluated, with what there is written."""
    check_options(options)
    sets = open_sets(options)
    models = models_by_name(options.models)
    runs = find_runs(models)
    held_out = add_held_out(sets, runs, options.models) if options.held_out else []
    warn_about_training_data(options, runs)
    check_sets(options, sets)
    candidates = open_candidates(sets, options)
    folders = runs_with_checkpoints(models, sets) if options.checkpoints else {}
    say_best_checkpoints(options.models)

    embedding = embed_options(options)
    embeddings, results = compare(models, sets, embedding, candidates)
    typed = typed_sets(sets, options)
    notes = note_choices(results["rows"], runs, typed, held_out)
    if folders:
        measure_checkpoints(folders, sets, embedding, results)
    write_files(options.out, embeddings, results, sets, notes)
    print_summary(results, sets, notes, options.out)
    return 1 if results.get("failures") else 0


def typed_sets(sets: Sets, options: Options) -> dict[str, str]:
    """What was typed for the pairs of every name."""
    names = [pairs.name for pairs in sets.pairs]
    typed = dict(zip(names, options.retrieval, strict=False))
    if options.a is not None:
        typed[sets.vectors[0].name] = options.a
    return typed


# What options need that have no effect without it.
_NEEDS = {
    "--retrieval": ("image_column", "caption_column"),
    "--retrieval or --held-out": ("checkpoints",),
    "--a and --b": ("ids", "groups", "a_ids", "b_ids", "candidates"),
}
_OF_PICTURES = ("zeroshot", "paper", "retrieval", "held_out", "probe")


def check_options(options: Options) -> None:
    """Raises InputError for options that do not go together, before torch is there."""
    if not options.models:
        raise InputError(
            "no model given: name a run folder, or NAME/TAG of open_clip (see --help)"
        )
    if (options.a is None) != (options.b is None):
        raise InputError("--a and --b are needed together")
    is_there = {
        "--retrieval": bool(options.retrieval),
        "--retrieval or --held-out": bool(options.retrieval or options.held_out),
        "--a and --b": options.a is not None,
    }
    if not any([*is_there.values(), options.zeroshot, options.paper]):
        raise InputError(
            "nothing to evaluate on: give --zeroshot DIR …, --paper DIR,"
            " --retrieval SOURCE … or --held-out, of vectors --a and --b"
        )
    check_needs(options, is_there)
    excluded = as_words(options, *_OF_PICTURES) if options.a else []
    if excluded:
        raise InputError(f"--a and {excluded[0]} exclude each other; give one of them")
    check_ids(options)
    check_folder(options.out, f"{options.out}: results cannot be written here")


def check_needs(options: Options, is_there: Mapping[str, bool]) -> None:
    """Raises InputError for an option without what it needs."""
    for needed, names in _NEEDS.items():
        useless = [] if is_there[needed] else as_words(options, *names)
        if useless:
            raise InputError(f"{useless[0]} needs {needed}")


def check_ids(options: Options) -> None:
    """Raises InputError for ids of vectors that lack or exclude others."""
    if (options.a_ids is None) != (options.b_ids is None):
        raise InputError("--a-ids and --b-ids are needed together")
    if options.a_ids is not None and options.ids is not None:
        raise InputError("--ids and --a-ids exclude each other; give one of them")


def open_sets(options: Options) -> Sets:
    """Opens what was named: labelled sets, captioned pictures, vectors."""
    from cloob.evaluation.sets.paper import Sets, open_paper, training_split
    from cloob.evaluation.sets.pictures import open_captioned, open_labelled

    sets = Sets()
    if options.paper is not None:
        open_paper(sets, options.paper, probe=options.probe)
    labelled = _renamed(options.zeroshot, map(open_labelled, options.zeroshot))
    sets.sets += labelled
    if options.probe:
        for path, data in zip(options.zeroshot, labelled, strict=True):
            train = training_split(path)
            if train is not None:
                sets.training[data.name] = train
    image, caption = options.image_column, options.caption_column
    captioned = (
        open_captioned(path, image_column=image, caption_column=caption)
        for path in options.retrieval
    )
    sets.pairs += _renamed(options.retrieval, captioned)
    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_vector_pairs

        sets.vectors.append(
            open_vector_pairs(
                options.a,
                options.b,
                options.ids,
                options.a_ids,
                options.b_ids,
                groups=options.groups,
            )
        )
    return sets


def open_candidates(sets: Sets, options: Options) -> dict[str, Candidates]:
    """The lists of candidates of the pairs of vectors, by their name."""
    if options.candidates is None:
        return {}
    from cloob.data.matrices import read_ids
    from cloob.data.sources.files import reading
    from cloob.evaluation.protocols import read_candidates

    ids = options.b_ids or options.ids
    if ids is None:
        raise InputError("--candidates needs --ids, or --a-ids and --b-ids")
    pairs = sets.vectors[0]
    with reading(options.candidates):
        listed = read_candidates(options.candidates, pairs, read_ids(ids))
    return {pairs.name: listed}


def models_by_name(typed: Sequence[str]) -> dict[str, str]:
    """Models as they were typed, by a name for each."""
    names = distinct_names([Path(model).name or model for model in typed], typed)
    return dict(zip(names, typed, strict=True))


def _renamed(typed: Sequence[str], opened: Iterable[PicturesT]) -> list[PicturesT]:
    """Sets, by a name for each."""
    sets = list(opened)
    names = distinct_names([data.name for data in sets], typed)
    return [
        dataclasses.replace(data, name=name)
        for data, name in zip(sets, names, strict=True)
    ]


def distinct_names(names: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The names of what was typed; where several have the same one, what was typed."""
    return [
        word if names.count(name) > 1 else name
        for name, word in zip(names, typed, strict=True)
    ]


def warn_about_training_data(options: Options, runs: Mapping[str, Run]) -> None:
    """Says where a run is judged by what it was trained on."""
    specs = [*options.retrieval, *([options.a] if options.a else [])]
    judged = {os.path.realpath(spec) for spec in specs}
    for run in runs.values():
        files = run.training_files()
        shared = [spec for spec in files if os.path.realpath(spec) in judged]
        if not shared:
            continue
        message = f"{run.model}: was trained on {', '.join(shared)}"
        if run.config.holds_out:
            message += "; --held-out judges by pairs that were not"
        say(message)


def check_sets(options: Options, sets: Sets) -> None:
    """Says what cannot be used, and raises InputError where nothing is left."""
    for pairs in sets.vectors:
        for skip in pairs.skipped[:3]:
            say(f"{skip.key}: {skip.detail}")
    for line in sets.missing.values():
        say(line)
    if not sets.sets and not sets.pairs and not sets.vectors:
        raise InputError(
            f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used"
        )
    if options.probe and not sets.training and not sets.missing:
        raise InputError(
            "--probe: none of the sets has training images (a folder train/ next to"
            " test/)"
        )


def say_best_checkpoints(models: Sequence[str]) -> None:
    """Says which runs stand for their best checkpoint."""
    for model in models:
        if with_checkpoint(model) == f"{model}:best":
            step = checkpoint_step(chosen_checkpoint(Path(model)))
            best = f"{model}: its best checkpoint, step {step:,}"
            say(f"{best} ({model}:last is the last)")


def embed_options(options: Options) -> EmbedOptions:
    from cloob.distributed import resolve_device
    from cloob.evaluation.embed import EmbedOptions

    device = resolve_device(options.device)
    return EmbedOptions(device, options.batch_size, threads(options.workers))


def compare(
    models: Mapping[str, str | Path],
    sets: Sets,
    embedding: EmbedOptions,
    candidates: Mapping[str, Candidates],
) -> tuple[Embeddings, Results]:
    """Measures models; a missing set fails no model."""
    from cloob.evaluation.embeddings import Embeddings
    from cloob.evaluation.suite import evaluate

    has_probes = bool(sets.training)
    embeddings = Embeddings(models, embedding, progress=progress(), tower=has_probes)
    results = evaluate(
        embeddings,
        sets.sets,
        sets.pairs,
        vectors=sets.vectors,
        candidates=candidates,
        training=sets.training,
    )
    absent: list[Failure] = [
        {"model": None, "set": name, "error": error}
        for name, error in sets.missing.items()
    ]
    add_failures(results, absent)
    return embeddings, results


def add_failures(results: Results, failures: Sequence[Failure]) -> None:
    if failures:
        results["failures"] = [*failures, *results.get("failures", ())]


def runs_with_checkpoints(models: Mapping[str, str], sets: Sets) -> dict[str, Path]:
    """The run folders among the models, whose checkpoints are measured; one may lack
    its config.json.
    """
    folders: dict[str, Path] = {}
    for name, model in models.items():
        folder = Path(split_checkpoint(model)[0].removeprefix("local-dir:"))
        if list_checkpoints(folder) and folder not in folders.values():
            folders[name] = folder
    if not sets.pairs or not folders:
        raise InputError("--checkpoints: no model here is a run with pictures")
    return folders


def measure_checkpoints(
    folders: Mapping[str, Path],
    sets: Sets,
    embedding: EmbedOptions,
    results: Results,
) -> None:
    """Adds the geometry of all checkpoints of runs to the results."""
    from cloob.evaluation.analysis import geometry_of_checkpoints

    found, failures = geometry_of_checkpoints(
        folders, sets.pairs[0], embedding, progress=progress()
    )
    results["checkpoints"] = {"set": sets.pairs[0].name, "models": found}
    add_failures(results, failures)


def write_files(
    out: Path,
    embeddings: Embeddings,
    results: Results,
    sets: Sets,
    notes: Sequence[str],
) -> None:
    """Writes results.json and the page."""
    from cloob.evaluation.report.page import write_report
    from cloob.evaluation.results import write_results

    write_results(out / RESULTS_FILE, results)
    sentences = [f"{note[0].upper()}{note[1:]}." for note in notes]
    queries = [
        *_queries(embeddings, results["rows"], sets.sets, "zeroshot", 8),
        *_queries(embeddings, results["rows"], sets.pairs, "retrieval", 4),
    ]
    page = out / PAGE_FILE
    write_report(page, results, title="Evaluation", notes=sentences, queries=queries)


def _queries(
    embeddings: Embeddings,
    rows: Sequence[Row],
    sets: Sequence[LabelledSet | CaptionedSet],
    section: Literal["zeroshot", "retrieval"],
    n: int,
) -> list[ExampleQuery]:
    """Example queries on the first set that every model was measured on."""
    from cloob.evaluation.analysis import example_queries

    for data in sets:
        if all(data.name in row[section] for row in rows):
            models = [row["model"] for row in rows]
            return example_queries(embeddings, data, n=n, models=models)
    return []


def print_summary(
    results: Results, sets: Sets, notes: Sequence[str], out: Path
) -> None:
    """Prints the numbers and where the rest is, and says what has none."""
    print_accuracies(results["rows"])
    say_problems(results)
    for note in notes:
        print(f"* {note}")
    for pairs in sets.vectors:
        print(f"{pairs.name}: intervals over {pairs.counted_units()}")
    for entry in results["differences"] if sets.vectors else ():
        mean, low, high = (
            100 * end for end in (entry["difference"], entry["low"], entry["high"])
        )
        print(
            f"{entry['model']} − {entry['baseline']}, {entry['metric']}: {mean:+.1f}"
            f" ({low:+.1f} … {high:+.1f})"
        )
    print(out / RESULTS_FILE, out / PAGE_FILE, sep="\n")


def print_accuracies(rows: Sequence[Row]) -> None:
    """Prints a line per accuracy, with a column per model."""
    lines = list(_table_rows(rows))
    if lines:
        head = ("%, ± half the 95 % CI", [row["model"] for row in rows])
        print_table([head, *lines])


def _table_rows(
    rows: Sequence[Row],
) -> Iterator[tuple[str, list[str]]]:
    """Title and a cell per model, of every number that a terminal shows."""
    from cloob.evaluation.report.tables import set_names

    for section in _SHOWN:
        names = set_names(rows, section)
        for name in names:
            numbers = [row.get(section, {}).get(name, {}) for row in rows]
            for key in _shown_keys(section, numbers):
                words = _TITLES.get(f"{section} {key}") or title(key)
                if len(names) > 1:
                    words = f"{name}: {words}"
                yield words, [_cell(model_numbers, key) for model_numbers in numbers]


def _shown_keys(section: Section, numbers: Sequence[Numbers]) -> list[str]:
    keys = dict.fromkeys(key for model_numbers in numbers for key in model_numbers)
    return [key for key in keys if re.fullmatch(_SHOWN[section], key)]


def _cell(numbers: Numbers, key: str) -> str:
    """A number with half its interval; a star where its pairs chose the model."""
    if numbers.get(key) is None:
        return "–"
    text = f"{100 * numbers[key]:.1f}"
    interval = numbers.get(f"{key}_interval")
    if interval is None:  # what chance reaches
        return text
    low, high = interval
    star = "*" if numbers.get("chose") else ""
    return f"{text}{star} ± {50 * (high - low):.1f}"


_SAID = {
    "unreadable": "{set}: {message}",
    "unloaded": "{model} could not be loaded: {message}",
    "failed": "{model} on {set}: {message}",
}


def say_problems(results: Results) -> None:
    """Says what could not be read, loaded or measured, missing sets apart."""
    from cloob.evaluation.report.tables import problems

    found = problems(results)
    for kind, sentence in _SAID.items():
        for problem in found[kind]:
            say(sentence.format(**problem._asdict()))
