"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cloob
from cloob.commands import compare
from cloob.commands.compare import MeasureOptions
from cloob.commands.console import as_words, exclusive, goes_with, refuse, say, say_next, tyro, within
from cloob.errors import InputError

if TYPE_CHECKING:
    from cloob.evaluation.sets.suites import SuiteSets


@dataclass(frozen=True)
class Options:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several models, side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run folders (RUN: its best checkpoint, RUN:last), model folders, open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: folders of CLIP_benchmark, folders with one sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many labelled sets: paper, pictograms or vtab+, each followed by its folder unless --root is given."""
    root: Path | None = None  # Folder of the suites that have no folder of their own.
    retrieval: tuple[str, ...] = ()
    """Pictures and captions, one or several each: what `cloob train --data` reads, or folders of CLIP_benchmark."""
    held_out: bool = False  # Judge by the pairs that a run held out of its training, as by --retrieval.
    a: str | None = None  # Vectors, for runs of `cloob train vectors`: as --a there.
    b: str | None = None  # Vectors that belong to those of --a.
    ids: str | None = None  # An id for each pair of --a and --b; the rows of an id are one sample.
    a_ids: str | None = None  # In place of --ids: an id for each row of --a, by which it finds its row of --b.
    b_ids: str | None = None  # An id for each row of --b.
    probe: bool = False  # Also fit a linear probe for each labelled set that has training images (train/ beside test/).
    shots: int | None = None  # Training images a class of a probe; all when left out.
    probe_seeds: tuple[int, ...] = (0,)  # One probe a seed, which draws its shots and its validation images.
    out: Path = Path("runs/eval")  # Folder of results.json, report.html and per_class/.
    machine: MeasureOptions = field(default_factory=MeasureOptions)


def run(options: Options) -> int:
    """Evaluates; 1 when a part could not be evaluated, with what there is written."""
    compare.check_models(options.models)
    goes_with(options, root="suite", shots="probe", probe_seeds="probe")
    goes_with(options, image_column="retrieval", caption_column="retrieval")
    goes_with(options, a="b", b="a", ids="a", a_ids="b_ids", b_ids="a_ids")
    exclusive(options, "a zeroshot", "a suite", "a retrieval", "a held_out", "a probe", "ids a_ids")
    within(options, shots=(1, 1_000_000))
    on = options.zeroshot or options.retrieval or options.suite or options.held_out or options.a
    asked = "--zeroshot DIR …, --suite NAME DIR, --retrieval SOURCE … or --held-out, of vectors --a and --b"
    refuse({f"nothing to evaluate on: give {asked}": not on})
    from cloob.evaluation.sets.captioned import open_captioned
    from cloob.evaluation.sets.labelled import open_labelled
    from cloob.evaluation.sets.suites import open_suites, training_split

    sets, out = open_suites(options.suite, options.root, probe=options.probe), options.out
    labelled = [open_labelled(path) for path in options.zeroshot]
    names = compare.distinct([data.name for data in labelled], options.zeroshot)
    for path, data, name in zip(options.zeroshot, labelled, names, strict=True):
        sets.sets.append(dataclasses.replace(data, name=name))
        if options.probe and (train := training_split(path)) is not None:
            sets.training[name] = train
    captioned = [open_captioned(path, **options.machine.columns) for path in options.retrieval]
    names = compare.distinct([data.name for data in captioned], options.retrieval)
    sets.pairs += [dataclasses.replace(data, name=name) for data, name in zip(captioned, names, strict=True)]
    if options.a is not None and options.b is not None:
        from cloob.data.vectors import open_pairs  # torch

        sets.vectors.append(open_pairs(options.a, options.b, options.ids, options.a_ids, options.b_ids))
    if options.held_out:
        _add_held_out(sets, options.models)
    _say_trained_on(options)
    for skip in (skip for pairs in sets.vectors for skip in pairs.skipped[:3]):
        say(f"{skip.key}: {skip.detail}")
    for line in sets.missing.values():
        say(line)
    given = sets.pairs or sets.vectors
    untrained = options.probe and not sets.training and not sets.training_failed
    refuse(
        {
            f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used": not sets.sets and not given,
            "--probe: none of the sets has training images (a folder train/ beside test/)": untrained,
        }
    )
    models = compare.begin(options.models, out)

    from cloob.evaluation.probe import ProbeOptions
    from cloob.evaluation.suite import seed_lines, write_per_class

    probe = ProbeOptions(shots=options.shots, seeds=options.probe_seeds)
    seeds = _seeds(models)
    embeddings, results = compare.compare(models, sets, options.machine.embedding(), out, seeds=seeds, probe=probe)
    tables = write_per_class(out / "per_class", results, embeddings, sets.sets)
    per_class = "Recall of each class, and what it is mostly taken for: per_class/*.csv beside this page."
    notes = [per_class] if tables else []
    compare.write_page(out / "report.html", embeddings, results, sets, title="Evaluation", notes=notes)
    compare.print_results(results["rows"])
    for entry in results["differences"] if sets.vectors else ():
        mean, low, high = (100 * entry[key] for key in ("difference", "low", "high"))
        print(f"{entry['model']} − {entry['baseline']}, {entry['metric']}: {mean:+.1f} ({low:+.1f} … {high:+.1f})")
    for line in seed_lines(results.get("seeds", ())):
        print(line)
    print(f"{out / 'results.json'}\n{out / 'report.html'}")
    code = compare.report_problems(results)
    if code == 0 and not sets.vectors:
        columns = as_words(options, "image_column", "caption_column")
        of_pairs = ["--pairs", options.retrieval[0], *columns] if options.retrieval else []
        say_next(["analyze", *options.models, *of_pairs, "--out", out / "analyze"])
    return code


def _add_held_out(sets: SuiteSets, models: Sequence[str]) -> None:
    """Adds the pairs that the runs among the models held out, which must be the same for all of them."""
    from cloob.data.shards.spec import is_remote
    from cloob.data.source import digest
    from cloob.evaluation.sets.captioned import by_picture, open_captioned
    from cloob.models.runs import read_validation
    from cloob.training.align import open_vectors
    from cloob.training.pairs import open_both

    runs = list(_runs(models))
    refuse({"--held-out: no model here is a run of `cloob train`; name one, or pairs by --retrieval": not runs})
    model, folder, config = runs[0]
    pairs, split = config.pairs, _split(config)
    specs = pairs.val_data or pairs.data
    other = next((other for other, _, its_config in runs if _split(its_config) != split), None)
    # A run folder may come from a stranger: nothing is fetched or run that nobody typed.
    streamed = f"{model}: its held-out pairs are streamed; type them: --retrieval {' '.join(specs)}"
    refuse(
        {
            f"{model}: held no pairs out of its training; name pairs by --retrieval": not config.holds_out,
            f"{model} and {other} held different pairs out; evaluate one at a time": other,
            streamed: any(map(is_remote, specs)),
        }
    )
    columns = {"image_column": pairs.image_column, "caption_column": pairs.caption_column}
    held_out: Any
    try:
        if pairs.val_data:
            opened = [open_captioned(spec, **columns) for spec in pairs.val_data]
            sets.pairs += [dataclasses.replace(each, name=f"{each.name} (held out)") for each in opened]
            return
        held_out = open_vectors(config)[1] if config.vectors.a else open_both(cloob.TrainConfig(pairs))[1]
    except InputError as error:
        raise InputError(f"{model}: its held-out pairs cannot be read; {error}") from None
    known = (read_validation(folder.parent) or {}).get("held_out")
    found = digest([json.dumps(held_out.fingerprint(), sort_keys=True)])
    changed = f"{model}: its pairs have changed since the training, so nobody knows which were held out"
    refuse({changed: known not in (None, found)})
    if config.vectors.a:
        sets.vectors.append(held_out)
        return
    name = f"{', '.join(Path(spec).name for spec in pairs.data)} (held out)"
    sets.pairs.append(by_picture(name, held_out))


def _split(config: cloob.TrainConfig) -> tuple[object, ...]:
    """What decides over the held-out pairs."""
    pairs = config.pairs
    split = pairs.val_data or (pairs.data, pairs.val_split)
    return split, config.vectors, pairs.image_column, pairs.caption_column


def _say_trained_on(options: Options) -> None:
    judged = {os.path.realpath(spec) for spec in (*options.retrieval, *filter(None, [options.a]))}
    for model, _, config in _runs(options.models) if judged else ():
        trained = [spec for spec in (*config.pairs.data, config.vectors.a) if spec and os.path.realpath(spec) in judged]
        if trained:
            advice = "; --held-out judges by pairs that were not" if config.holds_out else ""
            say(f"{model}: was trained on {', '.join(trained)}{advice}")


def _seeds(models: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """The models of runs whose configurations differ by seed (and folder) alone: by group, then by seed."""
    groups: dict[str, dict[int, str]] = {}
    names = {model: name for name, model in models.items()}
    for model, _, config in _runs(list(names)):
        alike = config.override(seed=0, out=Path("runs/train")).to_json()
        groups.setdefault(alike, {})[config.run.seed] = names[model]
    found = {}
    for i, group in enumerate((group for group in groups.values() if len(group) > 1), 1):
        start = os.path.commonprefix(list(group.values()))  # noqa: RUF071 - letter by letter
        found[start.rstrip("-_0123456789") or f"group {i}"] = group
    return found


def _runs(models: Sequence[str]) -> Iterator[tuple[str, Path, cloob.TrainConfig]]:
    """The models that are of a run: each with its model folder and the configuration of the run."""
    from cloob.models.load import find_model_folder
    from cloob.models.runs import RUN_CONFIG_FILE, run_of

    for model in models:
        with contextlib.suppress(InputError):  # which loading it says
            folder = find_model_folder(model)
            if folder is not None and (run := run_of(folder)) is not None:
                yield model, folder, cloob.TrainConfig.from_json(run / RUN_CONFIG_FILE)
