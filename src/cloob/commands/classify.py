"""``cloob classify``: sort pictures by the names of classes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import cloob
from cloob.commands.console import say
from cloob.commands.index import opened
from cloob.commands.options import Device, Threads
from cloob.commands.search import print_paths
from cloob.errors import InputError, nearest, printable

if TYPE_CHECKING:
    from cloob.search.classify import LabelOptions, Labels
    from cloob.search.records import Item


@dataclass(frozen=True)
class Options:
    """Sort pictures by the names of classes."""

    source: Annotated[str, "SRC|IDX"]
    """An index, or with --model what `cloob index` takes."""
    labels: str = ""
    """cat,dog,… or FILE.txt with one label a line; lines that begin with # are
    comments.
    """
    templates: tuple[str, ...] = ()
    """Prompts with {c} for the label; left out, "a photo of a {c}." and "{c}"."""
    multi: bool = False
    """All labels that fit, any number of them."""
    none: bool = False
    """A picture may also be none of these."""
    cutoff: float | None = None
    """Of --multi and --none: a label fits from so many standard deviations above
    unrelated texts; left out, 1.75.
    """
    where: str | None = None
    """Only these pictures of an index."""
    json: bool = False
    """Print one JSON object a line."""
    paths: Annotated[str | None, "LABEL"] = None
    """Print the paths of the pictures with this label alone."""
    model: str | None = None
    """What `cloob eval` takes, for a SRC."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: Threads = None
    """Decoding threads; left out, one per processor."""


@dataclass(frozen=True)
class ChosenLabel:
    label: str
    probability: float
    margin: float | None


Classified: TypeAlias = "tuple[Item, list[ChosenLabel]]"
"""A picture with the labels that were chosen for it, best first; none where none of
them fits.
"""


def run(options: Options) -> int:
    """Sorts; 1 where a picture could not be read."""
    from cloob.search.classify import check_labels

    check(options)
    rules = label_options(options)
    names = check_labels(read_labels(options.labels), rules)
    if options.paths is not None:
        check_label(options.paths, names)
    options = within_index(options)
    source = opened(options.source, options.model, options.device, options.workers)
    with source as (index, unread):
        index.embedder(device=options.device)
        labels = index.classify(names, rules, where=options.where)
        print_labels(index, labels, options)
        counts = ", ".join(
            f"{printable(name)} {count:,}"
            for name, count in labels.counts().items()
            if count
        )
        lost = f"; {unread:,} could not be read (see above)" if unread else ""
        say(f"{len(labels.ids):,} pictures: {counts}{lost}")
    return 1 if unread else 0


def check(options: Options) -> None:
    """Refuses options that exclude each other, lack another, or are out of range."""
    if not options.labels:
        raise InputError("--labels is missing; give cat,dog,… or a file of them")
    if options.cutoff is not None and not (options.multi or options.none):
        raise InputError("--cutoff needs --multi or --none")
    if options.json and options.paths is not None:
        raise InputError("--json and --paths exclude each other; give one of them")


def label_options(options: Options) -> LabelOptions:
    from cloob.search.classify import LABEL_CUTOFF, TEMPLATES, LabelOptions

    return LabelOptions(
        templates=options.templates or TEMPLATES,
        multi=options.multi,
        none=options.none,
        cutoff=LABEL_CUTOFF if options.cutoff is None else options.cutoff,
    )


def read_labels(text: str) -> list[str]:
    """Labels between commas, or one per line of a file, which ends in .txt or has a
    slash in its name.
    """
    is_file = "/" in text and os.path.isfile(text)  # noqa: PTH113 - of many a Path raises
    if not text.endswith(".txt") and not is_file:
        return text.split(",")
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--labels {text}: is no text in UTF-8") from None
    return [line for line in lines if line.strip() and not line.startswith("#")]


def check_label(label: str, names: tuple[str, ...]) -> None:
    from cloob.search.classify import NONE

    if label not in (*names, NONE):
        raise InputError(f"--paths {label}: no such label; {nearest(label, names)}")


def within_index(options: Options) -> Options:
    """The options with the index of a folder in its place."""
    from cloob.search.address import find_index
    from cloob.search.database import is_there

    if options.model is None:
        options = dataclasses.replace(options, source=find_index(options.source))
    if options.where is not None and not is_there(options.source):
        raise InputError("--where is for an index; these pictures are in none yet")
    return options


def print_labels(index: cloob.Index, labels: Labels, options: Options) -> None:
    """Prints the labels of every picture, or the pictures of a label."""
    if labels.by_default:
        say(
            f"the model stores no temperature; with {labels.inv_tau:g} in its place,"
            " probabilities only rank"
        )
    pictures = classified(index, labels)
    if options.paths is not None:
        print_paths([item for item, chosen in pictures if fits(options.paths, chosen)])
        return
    for item, chosen in pictures:
        if options.json:
            entries = [vars(label) for label in chosen]
            print(json.dumps({"id": item.id, "path": item.path, "labels": entries}))
        else:
            print(f"{printable(item.path)}\t{describe(chosen)}")


def classified(index: cloob.Index, labels: Labels) -> Iterator[Classified]:
    """Every picture with its labels."""
    rows = {id_: row for row, id_ in enumerate(labels.ids.tolist())}
    for item in index.items(list(rows)):
        row = rows[item.id]
        chosen = []
        for label in labels.chosen[row]:
            margin = None
            if labels.margins is not None:
                margin = round(float(labels.margins[row, label]), 3)
            probability = round(float(labels.probabilities[row, label]), 6)
            chosen.append(ChosenLabel(labels.names[label], probability, margin))
        yield item, chosen


def fits(name: str, chosen: list[ChosenLabel]) -> bool:
    """Whether a label was chosen for a picture; "none of these" if no other was."""
    from cloob.search.classify import NONE

    return name in [label.label for label in chosen] or (name == NONE and not chosen)


def describe(chosen: list[ChosenLabel]) -> str:
    """The labels of a picture in a line."""
    from cloob.search.classify import NONE

    texts = [f"{printable(label.label)} {label.probability:.2f}" for label in chosen]
    return ", ".join(texts) or NONE
