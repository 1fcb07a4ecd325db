"""``cloob classify``: sorts pictures by names of classes, or by examples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.collection import check_source, opened
from cloob.commands.copies import folder_name, put
from cloob.commands.options import CacheOptions, as_words, check_out, exclusive, goes_with, tyro
from cloob.commands.terminal import hint
from cloob.errors import InputError, printable

if TYPE_CHECKING:
    from cloob.models.encoding import Encoder
    from cloob.search.classify import Head, LabelOptions, Labels
    from cloob.search.index import Index
    from cloob.search.records import Item

_PAGE = 4096


@dataclass(frozen=True)
class Options:
    """Sort pictures by the names of classes, or by a few examples of each."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC|IDX")]
    """An index, or whatever `cloob index` takes: a folder, a table, shards."""
    labels: str | None = None
    """cat,dog,… or FILE.txt with one label a line; lines that begin with # are comments."""
    templates: tuple[str, ...] = ()
    """Prompts with {c} in the place of the label; left out, "a photo of a {c}." and "{c}"."""
    examples: Path | None = None
    """A folder with a folder of pictures for each label: fits a head to them and says how good it is."""
    head: Path | None = None
    """Where a head of --examples is kept, FILE.safetensors; left out, in IDX/heads/ of an index. Without --examples,
    the head to use."""
    multi: bool = False
    """Each label that fits, any number of them."""
    none: bool = False
    """A picture may also be none of these."""
    cutoff: float = 1.75
    """Of --multi and --none: a label fits from so many standard deviations above unrelated texts."""
    inv_tau: float | None = None
    """Inverse temperature of the softmax; left out, the model's own."""
    where: str | None = None
    """Only these pictures of an index."""
    json: bool = False
    """Print one JSON object a line."""
    csv: bool = False
    """Print CSV: path, label, probability, margin."""
    move_to: Path | None = None
    """Move each file into a folder of its label here; nothing is overwritten, and what fits none stays. moved.jsonl
    there lists old and new paths."""
    copy_to: Path | None = None
    """Copy each picture into a folder of its label here instead."""
    model: str | None = None
    """What `cloob eval` takes, for a SRC; for an index the name of one of its models."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int | None = None
    """Threads that read and decode; left out, one per processor."""
    cache: CacheOptions = field(default_factory=CacheOptions)


def check(options: Options) -> None:
    by_head = options.examples is not None or options.head is not None
    if (options.labels is None) is not by_head:
        raise InputError("give --labels cat,dog (or a file of them), or --examples DIR, or --head FILE; one of them")
    goes_with(options, {"cutoff": ("multi", "none")})
    goes_with(options, dict.fromkeys(("multi", "none", "templates", "inv_tau"), "labels"))
    exclusive(options, ("json", "csv"), ("move_to", "copy_to", "multi"))
    if options.examples is not None and not options.examples.is_dir():
        raise InputError(f"--examples {options.examples}: no such folder; one with a folder for each label is wanted")
    if options.examples is not None and options.head is not None:
        check_out("--head", options.head, (".safetensors",))
    check_source(options.source, options.model)
    if options.labels is not None:
        _labels(options.labels, _label_options(options))


def run(options: Options) -> int:
    """Sorts; 1 where a picture could not be read or moved."""
    from cloob.search.classify import is_head, label_by_head

    how, head = _label_options(options), options.head
    if head is not None and options.examples is not None and head.exists() and not is_head(head):
        raise InputError(f"--head {head}: is a file of another kind; name another file")
    with opened(options.source, options.model, options.device, options.workers) as (index, unread):
        if options.labels is not None:
            index.encoder(device=options.device)
            labels = index.classify(_labels(options.labels, how), how, where=options.where)
        else:
            labels = label_by_head(index, _head(options, index), where=options.where)
        _print(index, labels, options)
        counts = ", ".join(f"{printable(name)} {count:,}" for name, count in labels.counts().items() if count)
        left = f"; {unread:,} could not be read (see above)" if unread else ""
        print(f"cloob: {len(labels.ids):,} pictures: {counts}{left}", file=sys.stderr)
        target, copy = options.move_to or options.copy_to, options.copy_to is not None
        failed = put(index, _folders(index, labels, target), target, copy=copy) if target is not None else 0
    if target is None and not options.multi:
        hint(["classify", *as_words(options), "--move-to", "sorted"])
    return 1 if unread or failed else 0


def _label_options(options: Options) -> LabelOptions:
    from cloob.search.classify import TEMPLATES, LabelOptions

    templates = options.templates or TEMPLATES
    return LabelOptions(templates, options.multi, options.none, options.cutoff, options.inv_tau)


def _labels(text: str, how: LabelOptions) -> tuple[str, ...]:
    """The labels: separated by commas; or one per line of a file, which ends in .txt or is written with a slash."""
    from cloob.search.classify import check_labels

    if not (text.endswith(".txt") or ("/" in text and os.path.isfile(text))):  # noqa: PTH113 - of many a Path raises
        return check_labels(text.split(","), how)
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"--labels {text}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {text}: no text file of labels ({type(error).__name__})") from None
    return check_labels([line for line in lines if line.strip() and not line.startswith("#")], how)


def _head(options: Options, index: Index) -> Head:
    """The head of the examples, kept where it was asked for; or one that was kept before."""
    from cloob.search.classify import head_of, load_head, save_head
    from cloob.search.index import is_there

    asked = index.model()
    if options.examples is None:
        assert options.head is not None
        return load_head(options.head, asked.fingerprint)
    model: str | Encoder | None = options.model
    if is_there(options.source):
        model = index.encoder(asked, options.device)  # its vectors have to be of these weights
    with opened(options.examples, model, options.device, options.workers, asked.precision) as (examples, _):
        head, zero_shot = head_of(examples, options.examples)
    said = f"{head.accuracy:.1%} of {head.examples} examples right, each held out once ({head.folds} folds)"
    print(f"cloob: head for {len(head.names)} labels: {said}; by the labels' names {zero_shot:.1%}", file=sys.stderr)
    file = options.head
    if file is None and "://" not in options.source and is_there(options.source):
        file = Path(options.source) / "heads" / f"{folder_name(options.examples.resolve().name)}.safetensors"
    if file is not None:
        save_head(file, head)
        print(f"cloob: kept as {file} (--head {file} takes it again)", file=sys.stderr)
    else:
        print("cloob: the head is not kept; --head FILE keeps it", file=sys.stderr)
    return head


def _rows(index: Index, labels: Labels) -> Iterator[tuple[Item, int]]:
    """Pictures and their places in the labels."""
    for start in range(0, len(labels.ids), _PAGE):
        ids = labels.ids[start : start + _PAGE].tolist()
        row = {id_: start + number for number, id_ in enumerate(ids)}
        for item in index.items(ids):
            yield item, row[item.id]


def _print(index: Index, labels: Labels, options: Options) -> None:
    import csv

    from cloob.search.classify import NONE
    from cloob.search.records import valid

    tau = labels.temperature
    if tau is not None and tau.origin == "default":
        said = f"{tau.inv_tau:g} is taken, and probabilities show an order alone (--inv-tau sets another)"
        print(f"cloob: the model does not say its τ⁻¹: {said}", file=sys.stderr)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if options.csv:
        writer.writerow(("path", "label", "probability", "margin"))
    for item, at in _rows(index, labels):
        chosen = [_entry(labels, at, label) for label in labels.chosen[at]]
        if options.json:
            print(json.dumps({"id": item.id, "path": item.path, "labels": chosen}))
        elif options.csv:
            cells = [list(entry.values()) for entry in chosen] or [["", "", ""]]
            writer.writerows((valid(item.path), *row) for row in cells)
        else:
            shown = ", ".join(f"{printable(str(entry['label']))} {entry['probability']:.2f}" for entry in chosen)
            print(f"{printable(item.path)}\t{shown or NONE}")


def _entry(labels: Labels, row: int, label: int) -> dict[str, str | float | None]:
    margin = None if labels.margins is None else round(float(labels.margins[row, label]), 3)
    probability = round(float(labels.probabilities[row, label]), 6)
    return {"label": labels.names[label], "probability": probability, "margin": margin}


def _folders(index: Index, labels: Labels, root: Path) -> Iterator[tuple[Item, Path | None]]:
    """Each picture with the folder of its best label."""
    folders: list[Path] = []
    for label in labels.names:  # two may differ in what no folder's name can hold
        plain = folder_name(label)
        numbered = [f"{plain}-{number}" for number in range(2, len(labels.names) + 1)]
        folders.append(next(root / name for name in (plain, *numbered) if root / name not in folders))
    for item, row in _rows(index, labels):
        chosen = labels.chosen[row]
        yield item, folders[chosen[0]] if chosen else None
