"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands import compare
from cloob.commands.options import CacheOptions, as_words, at_least, exclusive, goes_with, tyro
from cloob.commands.terminal import say_next
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.data.content import Reader
    from cloob.data.source import Source
    from cloob.data.vectors import VectorPairs
    from cloob.evaluation.sets.suites import SuiteSets
    from cloob.training.config import TrainConfig
    from cloob.training.config.parts import PairsConfig


@dataclass(frozen=True)
class Options:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several models, side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (their best checkpoint; RUN:last is the last), checkpoint folders, open_clip NAME/TAG, hf-hub:… or
    local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: CLIP_benchmark WebDataset folders, folders with one sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many labelled sets: paper, pictograms or vtab+, each followed by its folder unless --root is given."""
    root: Path | None = None
    """Folder of the suites that have no folder of their own."""
    retrieval: tuple[str, ...] = ()
    """Pictures and captions: whatever `cloob train --data` reads, CLIP_benchmark's retrieval folders, or demo:val.
    Several captions of a picture are rows of one path, or a list in JSON lines."""
    image_column: str = "filepath"
    """Column of a table of --retrieval with the path of the picture."""
    caption_column: str = "title"
    """Column of a table of --retrieval with the caption."""
    held_out: bool = False
    """Judge by the pairs that a run held out of its training (--val-split, --val-data), as by --retrieval."""
    a: str | None = None
    """Vectors, for runs of `cloob train vectors`: as --a there."""
    b: str | None = None
    """Vectors that belong to those of --a."""
    ids: str | None = None
    """An id for each pair of --a and --b; the rows of an id are one sample."""
    a_ids: str | None = None
    """In place of --ids: an id for each row of --a, by which it finds its row of --b."""
    b_ids: str | None = None
    """An id for each row of --b."""
    probe: bool = False
    """Also fit a linear probe for each labelled set that has training images (train/ beside test/)."""
    shots: int | None = None
    """Training images a class of a probe; all when left out."""
    probe_seeds: tuple[int, ...] = (0,)
    """One probe a seed, which draws its shots and its validation images."""
    out: Path = Path("runs/eval")
    """Folder of results.json, report.html, clip_benchmark/ and per_class/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    if not options.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob eval --help)")
    goes_with(options, {"root": "suite", "shots": "probe", "probe_seeds": "probe"})
    goes_with(options, {"image_column": "retrieval", "caption_column": "retrieval"})
    goes_with(options, {"a": "b", "b": "a", "ids": "a", "a_ids": "b_ids", "b_ids": "a_ids"})
    for other in ("zeroshot", "suite", "retrieval", "held_out", "probe"):
        exclusive(options, ("a", other))
    exclusive(options, ("ids", "a_ids"))
    if not (options.zeroshot or options.retrieval or options.suite or options.held_out or options.a):
        raise InputError(
            "nothing to evaluate on: give --zeroshot DIR …, --suite NAME DIR, --retrieval SOURCE … or --held-out, of "
            "vectors --a and --b"
        )
    at_least(options, {"shots": 1})


def run(options: Options) -> int:
    """Evaluates; 1 when a part could not be evaluated, with what there is written."""
    if (vectors := _open_vectors(options)) is not None:
        return _judge_vectors(options, vectors)
    sets = _open_labelled(options)
    pairs = [*sets.pairs, *_open_pairs(options)]
    _say_trained_on(options.models, options.retrieval)
    for line in sets.missing.values():
        print(f"cloob: {line}", file=sys.stderr)
    if not sets.sets and not pairs:
        raise InputError(f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used")
    if options.probe and not sets.training and not sets.training_failed:
        raise InputError("--probe: none of the sets has training images (a folder train/ beside test/)")
    compare.check_writable(options.out)
    compare.say_checkpoints(options.models)

    from cloob.evaluation.measures.probe import ProbeOptions
    from cloob.evaluation.tables import write_set_files

    compared = compare.compare(
        compare.names(options.models),
        sets.sets,
        pairs,
        compare.embed_options(options.device, options.batch_size, options.workers),
        options.out,
        missing=sets.missing,
        training=sets.training,
        probe=ProbeOptions(shots=options.shots, seeds=options.probe_seeds),
    )
    folders = write_set_files(options.out, compared.results, compared.embeddings, compared.zeroshot)
    per_class = "Recall of each class, and what it is mostly taken for: per_class/*.csv beside this page."
    notes = [per_class] if options.out / "per_class" in folders else []
    compare.write_page(options.out / "report.html", compared, title="Evaluation", notes=notes)
    compare.print_results(compared.results)
    print(f"{options.out / 'results.json'}\n{options.out / 'report.html'}")
    code = compare.report_problems(compared.results)
    if code == 0:
        columns = as_words(options, "image_column", "caption_column")
        of_pairs = ["--pairs", options.retrieval[0], *columns] if options.retrieval else []
        say_next(["analyze", *options.models, *of_pairs, "--out", options.out / "analyze"])
    return code


def _open_vectors(options: Options) -> VectorPairs | None:
    """The pairs of --a and --b, or those that the first model held out, if it is one of vectors."""
    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_pairs

        for model, _, config in _runs(options.models):
            if config.vectors.a is not None and os.path.realpath(options.a) == os.path.realpath(config.vectors.a):
                advice = "; --held-out judges by pairs that were not" if config.pairs.holds_out else ""
                print(f"cloob: {model}: was trained on {options.a}{advice}", file=sys.stderr)
        return open_pairs(options.a, options.b, options.ids, options.a_ids, options.b_ids)
    runs = list(_runs(options.models)) if options.held_out else []
    if not any(config.vectors.a for _, _, config in runs):
        return None
    model, folder, config = runs[0]
    for other, _, its_config in runs:
        if (its_config.vectors, its_config.pairs.val_split) != (config.vectors, config.pairs.val_split):
            raise InputError(f"{model} and {other} held different pairs out; evaluate one at a time, or by --a and --b")
    from cloob.training.vectors import open_vectors

    held_out = open_vectors(config)[1]
    if held_out is None:
        raise InputError(f"{model}: held no pairs out of its training; name pairs by --a and --b")
    _check_unchanged(model, folder, held_out)
    return held_out


def _judge_vectors(options: Options, pairs: VectorPairs) -> int:
    from cloob.evaluation.suite import write_results
    from cloob.evaluation.vectors import evaluate_vectors

    compare.check_writable(options.out)
    compare.say_checkpoints(options.models)
    for skip in pairs.skipped[:3]:
        print(f"cloob: {skip.key}: {skip.detail}", file=sys.stderr)
    if len(pairs.skipped) > 3:
        print(f"cloob: {len(pairs.skipped) - 3:,} more cannot be used", file=sys.stderr)
    results = evaluate_vectors(compare.names(options.models), pairs, device=options.device)
    write_results(options.out / "results.json", results)
    compare.print_results(results)
    compare.print_differences(results)
    print(options.out / "results.json")
    return 0


def _open_labelled(options: Options) -> SuiteSets:
    """The sets of all suites, then those that are named one by one; a mistake in the latter ends the command."""
    from cloob.evaluation.sets.labelled import open_labelled
    from cloob.evaluation.sets.suites import open_suites, training_split

    sets = open_suites(options.suite, options.root, probe=options.probe)
    opened = [open_labelled(path) for path in options.zeroshot]
    names = _distinct([data.name for data in opened], options.zeroshot)
    sets.sets += [dataclasses.replace(data, name=name) for data, name in zip(opened, names, strict=True)]
    for path, name in zip(options.zeroshot, names, strict=True) if options.probe else ():
        train = training_split(path)
        if train is not None:
            sets.training[name] = train
    return sets


def _open_pairs(options: Options) -> list[Reader]:
    from cloob.evaluation.sets.captioned import Renamed, open_captioned

    columns = {"image_column": options.image_column, "caption_column": options.caption_column}
    opened = [open_captioned(path, **columns) for path in options.retrieval]
    pairs = map(Renamed, opened, _distinct([data.name for data in opened], options.retrieval))
    return [*pairs, *(_open_held_out(options.models) if options.held_out else ())]


def _distinct(set_names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """The names of sets; equal ones with as much of the path as tells them apart."""
    distinct: list[str] = []
    for name, source in zip(set_names, sources, strict=True):
        alike = [other for its_name, other in zip(set_names, sources, strict=True) if its_name == name]
        longer = {place: label for label, place in compare.names(alike).items()}
        distinct.append(longer[source] if len(alike) > 1 else name)
    return distinct


def _open_held_out(models: Sequence[str]) -> list[Reader]:
    """The held-out pairs of the runs among the models, which must be the same for all of them."""
    from cloob.data.shards.spec import is_remote
    from cloob.evaluation.sets.captioned import ByPicture, Renamed, open_captioned
    from cloob.training.build import open_both
    from cloob.training.config import TrainConfig

    runs = [(model, folder, config.pairs) for model, folder, config in _runs(models)]
    if not runs:
        raise InputError("--held-out: no model here is a run of `cloob train`; name one, or pairs by --retrieval")
    model, folder, pairs = runs[0]
    for other, _, its_pairs in runs:
        if not its_pairs.holds_out:
            raise InputError(f"{other}: held no pairs out of its training; name pairs by --retrieval")
        if _split(its_pairs) != _split(pairs):
            raise InputError(f"{model} and {other} held different pairs out; evaluate one at a time")
    specs = pairs.val_data or pairs.data
    if any(map(is_remote, specs)):  # a run folder may come from a stranger: nothing is fetched or run that nobody typed
        raise InputError(f"{model}: its held-out pairs are streamed; type them: --retrieval {' '.join(specs)}")
    columns = {"image_column": pairs.image_column, "caption_column": pairs.caption_column}
    try:
        if pairs.val_data:
            opened = [open_captioned(spec, **columns) for spec in pairs.val_data]
            return [Renamed(each, f"{each.name} (held out)") for each in opened]
        held_out = open_both(TrainConfig(pairs))[1]
    except InputError as error:
        raise InputError(f"{model}: its held-out pairs cannot be read; {error}") from None
    assert held_out is not None
    _check_unchanged(model, folder, held_out)
    return [ByPicture(f"{', '.join(Path(spec).name for spec in pairs.data)} (held out)", held_out)]


def _check_unchanged(model: str, folder: Path, held_out: Source | VectorPairs) -> None:
    """Refuses pairs that are not those which the run of a model folder held out."""
    from cloob.data.fingerprint import digest
    from cloob.models.runs import read_validation

    known = (read_validation(folder.parent) or {}).get("held_out")
    if known not in (None, digest([json.dumps(held_out.fingerprint(), sort_keys=True)])):
        raise InputError(f"{model}: its pairs have changed since the training, so nobody knows which were held out")


def _say_trained_on(models: Sequence[str], sources: Sequence[str]) -> None:
    """Says on stderr which models were trained on pairs that they are to be judged by."""
    from cloob.data.shards.spec import is_remote
    from cloob.training.build import open_both
    from cloob.training.config import TrainConfig

    places = [os.path.realpath(spec) for spec in sources if not is_remote(spec)]
    for model, _, config in _runs(models) if places else ():
        pairs = config.pairs
        same = any(place in map(os.path.realpath, pairs.data) for place in places)
        if not same or any(map(is_remote, (*pairs.data, *pairs.val_data))):
            continue
        with contextlib.suppress(InputError):  # other pairs of the run may be gone
            trained, held_out = open_both(TrainConfig(pairs))
            total = len(trained) + (len(held_out) if pairs.val_split and held_out is not None else 0)
            advice = "; --held-out judges by pairs that were not" if pairs.holds_out else ""
            of = f"{len(trained):,} of {total:,} pairs of {', '.join(pairs.data)}"
            print(f"cloob: {model}: {of} were trained on{advice}", file=sys.stderr)


def _runs(models: Sequence[str]) -> Iterator[tuple[str, Path, TrainConfig]]:
    """The models that are of a run: each with its model folder and the configuration of the run."""
    from cloob.models.load import find_model_folder
    from cloob.models.runs import RUN_CONFIG_FILE, run_of
    from cloob.training.config import TrainConfig

    for model in models:
        with contextlib.suppress(InputError):  # which loading it says
            folder = find_model_folder(model)
            if folder is not None and (run := run_of(folder)) is not None:
                yield model, folder, TrainConfig.from_json(run / RUN_CONFIG_FILE)


def _split(pairs: PairsConfig) -> tuple[object, ...]:
    """What decides over the held-out pairs."""
    columns = pairs.image_column, pairs.caption_column
    return (pairs.val_data, columns) if pairs.val_data else (pairs.data, pairs.val_split, columns)
