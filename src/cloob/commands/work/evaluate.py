"""Measures models as ``cloob eval`` was asked to, and writes results, tables and the report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from cloob.cache import Cache
from cloob.commands.measuring import EvalArguments
from cloob.commands.steps import columns, say_next
from cloob.commands.work.console import print_table, say_checkpoints, tell
from cloob.commands.work.heldout import open_held_out, say_trained_on
from cloob.commands.work.judge import Comparison, check_writable, measure, write_page
from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.evaluation.embed import EmbedOptions
from cloob.evaluation.measures.probe import ProbeOptions
from cloob.evaluation.sets.captioned import Renamed, open_captioned
from cloob.evaluation.sets.labelled import open_labelled
from cloob.evaluation.sets.suites import SuiteSets, open_suites, training_split
from cloob.evaluation.tables import write_set_files


def run(arguments: EvalArguments) -> int:
    """Evaluates; returns the exit code."""
    sets = _open(arguments)
    named_columns = (arguments.image_column, arguments.caption_column)
    own = {"image_column": arguments.image_column, "caption_column": arguments.caption_column}
    opened = [open_captioned(path, **own) for path in arguments.retrieval]
    names = _told_apart([data.name for data in opened], arguments.retrieval)
    pairs = [*sets.pairs, *map(Renamed, opened, names)]
    if arguments.held_out:
        pairs += open_held_out(arguments.models)
    say_trained_on(arguments.models, arguments.retrieval)
    for line in sets.missing.values():
        print(f"cloob: {line}", file=sys.stderr)
    if not sets.sets and not pairs:
        raise InputError(f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used")
    if arguments.probe and not sets.training and not sets.training_failed:
        raise InputError("--probe: none of the sets has training images (a folder train/ beside test/)")
    check_writable(arguments.out)
    say_checkpoints(arguments.models)
    comparison = Comparison(
        models=named(arguments.models),
        zeroshot=sets.sets,
        retrieval=pairs,
        training=sets.training,
        probe=ProbeOptions(shots=arguments.shots, seeds=arguments.probe_seeds),
        missing=sets.missing,
    )
    options = EmbedOptions(
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        cache=Cache(),
    )
    embeddings, results = measure(comparison, options, arguments.out)
    write_set_files(arguments.out, results, embeddings, comparison.zeroshot)
    write_page(arguments.out / "report.html", comparison, embeddings, results, title="Evaluation")
    print_table(results)
    print(f"{arguments.out / 'results.json'}\n{arguments.out / 'report.html'}")
    of_pairs = ["--pairs", arguments.retrieval[0], *columns(*named_columns)] if arguments.retrieval else []
    code = tell(results)
    if code == 0:
        say_next(["analyze", *arguments.models, *of_pairs, "--out", arguments.out / "analyze"])
    return code


def _open(arguments: EvalArguments) -> SuiteSets:
    """The sets of all suites, then those that are named one by one; a mistake in the latter ends the command."""
    if arguments.root is not None and not arguments.suite:
        raise InputError(f"root is {str(arguments.root)!r}, but no suite is asked for; add --suite, or leave it out")
    sets = open_suites(arguments.suite, arguments.root, probe=arguments.probe)
    opened = [open_labelled(path) for path in arguments.zeroshot]
    names = _told_apart([data.name for data in opened], arguments.zeroshot)
    sets.sets += [dataclasses.replace(data, name=name) for data, name in zip(opened, names, strict=True)]
    for path, name in zip(arguments.zeroshot, names, strict=True) if arguments.probe else ():
        train = training_split(path)
        if train is not None:
            sets.training[name] = train
    return sets


def _told_apart(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """The names of sets, those that several have with as much of the path before them as tells them apart."""
    told: list[str] = []
    for name, source in zip(names, sources, strict=True):
        alike = [other for its_name, other in zip(names, sources, strict=True) if its_name == name]
        longer = {place: label for label, place in named(alike).items()}
        told.append(longer[source] if len(alike) > 1 else name)
    return told


def named(sources: Sequence[str]) -> dict[str, str]:
    """The models by the last parts of where they are: one, or as many as no other model's place ends in."""
    parts = {source: Path(source).parts or (source,) for source in sources}

    def name(source: str) -> str:
        others = [other for place, other in parts.items() if place != source]
        for n in range(1, len(parts[source]) + 1):
            tail = parts[source][-n:]
            if all(other[-n:] != tail for other in others):
                return Path(*tail).as_posix()
        return source  # one place, written in two ways

    return {name(source): source for source in sources}
