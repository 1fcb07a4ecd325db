"""``cloob classify``: sort pictures by the names of classes, or by a few examples per
class.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cloob
from cloob.commands.console import (
    DecodeOptions,
    Positional,
    arg,
    check,
    check_out,
    refuse,
    say,
    say_next,
)
from cloob.commands.copies import copy
from cloob.commands.index import folder_name, opened
from cloob.errors import InputError, printable

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder
    from cloob.search.classify import LabelHead, Labels


@dataclass(frozen=True)
class Options:
    """Sort pictures by the names of classes, or by a few examples per class."""

    source: Annotated[Positional[str], arg(metavar="SRC|IDX")]
    """An index, or with --model what `cloob index` takes."""
    labels: str | None = None
    """cat,dog,… or FILE.txt with one label a line; lines that begin with # are
    comments.
    """
    templates: tuple[str, ...] = ()
    """Prompts with {c} for the label; left out, "a photo of a {c}." and "{c}"."""
    examples: Path | None = None
    """A folder of pictures per label, in this folder: fits a head, and measures it."""
    head: Path | None = None
    """FILE.safetensors: the head, or with --examples where to keep it; else IDX/heads/.
    """
    multi: bool = False
    """All labels that fit, any number of them."""
    none: bool = False
    """A picture may also be none of these."""
    cutoff: float = 1.75
    """Of --multi and --none: a label fits from so many standard deviations above
    unrelated texts.
    """
    inv_tau: float | None = None
    """Inverse temperature of the softmax; left out, that of the model."""
    where: str | None = None
    """Only these pictures of an index."""
    json: bool = False
    """Print one JSON object a line."""
    csv: bool = False
    """Print CSV: path, label, probability, margin."""
    copy_to: Path | None = None
    """Copy every picture into a folder of its label here; nothing is overwritten."""
    move_to: Path | None = None
    """Move shots (RAW, JPEG, captions, edits) likewise; moved.jsonl lists them."""
    model: str | None = None
    """What `cloob eval` takes, for a SRC; for an index the name of one of its models.
    """
    machine: DecodeOptions = field(default_factory=DecodeOptions)


def run(options: Options) -> int:
    """Sorts; 1 where a picture could not be read or copied."""
    by_head = options.examples is not None or options.head is not None
    one = "give --labels cat,dog (or a file of them), or --examples DIR, or --head FILE; one of them"
    refuse({one: (options.labels is None) is not by_head})
    of_labels = [
        f"{name} needs labels" for name in ("multi", "none", "templates", "inv_tau")
    ]
    copies = ("copy_to excludes multi move_to", "move_to excludes multi")
    check(
        options,
        "cutoff needs multi or none",
        *of_labels,
        "json excludes csv",
        *copies,
        inv_tau=(0.001, 1_000_000),
    )
    place = options.copy_to or options.move_to
    refuse(
        {f"{place}: is a file; name a folder": place is not None and place.is_file()}
    )
    kept, examples = options.head if options.examples else None, options.examples
    refuse(
        {
            f"--examples {examples}: no such folder; give one folder a label": examples
            and not examples.is_dir()
        }
    )
    if kept is not None:
        check_out("--head", kept, (".safetensors",))
    from cloob.search.address import find_index, is_there

    if options.model is None:
        address, folder = find_index(options.source)
        where = (
            " and ".join(f"({clause})" for clause in (options.where, folder) if clause)
            or None
        )
        options = dataclasses.replace(options, source=address, where=where)
    from cloob.search.classify import (
        TEMPLATES,
        LabelOptions,
        check_labels,
        label_by_head,
        read_head,
    )

    templates = options.templates or TEMPLATES
    how = LabelOptions(
        templates, options.multi, options.none, options.cutoff, options.inv_tau
    )
    text, names = options.labels, tuple[str, ...]()
    # separated by commas; or one per line of a file, which ends in .txt or has a slash
    if text is not None:
        lines = text.split(",")
        if text.endswith(".txt") or ("/" in text and os.path.isfile(text)):  # noqa: PTH113 - of many a Path raises
            try:
                read = Path(text).read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise InputError(f"--labels {text}: is no text in UTF-8") from None
            lines = [line for line in read if line.strip() and not line.startswith("#")]
        names = check_labels(lines, how)
    refuse(
        {
            f"--head {kept}: is a file of another kind; name another": kept
            and kept.exists()
            and not read_head(kept)
        }
    )
    with opened(options.source, options.model, options.machine) as (index, unread):
        if names:
            index.encoder(device=options.machine.device)
            labels = index.classify(names, how, where=options.where)
        else:
            labels = label_by_head(index.view(options.where), _head(options, index))
        if options.json or options.csv or place is None:
            _print(index, labels, options)
        counts = ", ".join(
            f"{printable(name)} {count:,}"
            for name, count in labels.counts().items()
            if count
        )
        left = f"; {unread:,} could not be read (see above)" if unread else ""
        say(f"{len(labels.ids):,} pictures: {counts}{left}")
        failed = 0
        if place is not None:
            best = dict(zip(labels.ids.tolist(), labels.chosen, strict=True))
            folders = {
                id_: folder_name(labels.names[chosen[0]]) if chosen else None
                for id_, chosen in best.items()
            }
            failed = copy(
                index,
                index.items(list(folders)),
                place,
                folders,
                move=options.move_to is not None,
            )
        if options.move_to is not None and is_there(
            options.source
        ):  # or its vectors would go with the old paths
            say_next(
                [
                    "index",
                    *index.store.sources(),
                    options.move_to.absolute(),
                    "--out",
                    index.store.address,
                ]
            )
    return 1 if unread or failed else 0


def _head(options: Options, index: cloob.Index) -> LabelHead:
    """The head of the examples, saved; or one that was saved before."""
    from cloob.search.address import is_there
    from cloob.search.classify import head_of, load_head, save_head

    of, file = index.model(), options.head
    if options.examples is None:
        assert file is not None
        return load_head(file, of.fingerprint)
    model: str | DualEncoder | None = options.model
    if is_there(options.source):
        model = index.encoder(
            of, options.machine.device
        )  # its vectors have to be of these weights
        if file is None and "://" not in options.source:
            file = (
                Path(options.source)
                / "heads"
                / f"{folder_name(options.examples.resolve().name)}.safetensors"
            )
    with opened(str(options.examples), model, options.machine, of.precision) as (
        examples,
        _,
    ):
        refuse(
            {
                f"--examples {options.examples}: no pictures in it; give one folder a label": not len(
                    examples
                )
            }
        )
        head, zero_shot = head_of(examples.view(), options.examples)
    right = f"{head.accuracy:.1%} of {head.examples} examples right, each held out once ({head.folds} folds)"
    say(
        f"head for {len(head.names)} labels: {right}; by the labels' names {zero_shot:.1%}"
    )
    if file is not None:
        save_head(file, head)
    say(
        "the head is not kept; --head FILE keeps it"
        if file is None
        else f"kept as {file}, which --head takes again"
    )
    return head


def _print(index: cloob.Index, labels: Labels, options: Options) -> None:
    """Prints the labels of every picture."""
    from cloob.search.classify import NONE

    if labels.by_default:
        taken = f"{labels.inv_tau:g} is taken, and probabilities show an order alone (--inv-tau sets another)"
        say(f"the model does not say its τ⁻¹: {taken}")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        writer.writerow(("path", "label", "probability", "margin"))
    ids = labels.ids.tolist()
    rows = {id_: row for row, id_ in enumerate(ids)}
    for item in index.items(ids):
        row, chosen = rows[item.id], []
        for label in labels.chosen[row]:
            margin = (
                None
                if labels.margins is None
                else round(float(labels.margins[row, label]), 3)
            )
            probability = round(float(labels.probabilities[row, label]), 6)
            chosen.append(
                {
                    "label": labels.names[label],
                    "probability": probability,
                    "margin": margin,
                }
            )
        if options.json:
            print(json.dumps({"id": item.id, "path": item.path, "labels": chosen}))
        elif options.csv:
            cells = [list(entry.values()) for entry in chosen] or [["", "", ""]]
            writer.writerows((item.path, *of_label) for of_label in cells)
        else:
            shown = ", ".join(
                f"{printable(str(entry['label']))} {entry['probability']:.2f}"
                for entry in chosen
            )
            print(f"{printable(item.path)}\t{shown or NONE}")
