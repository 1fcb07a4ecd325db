"""Sorts pictures as ``cloob classify`` was asked to, and says or moves what there is."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloob.commands.finding import ClassifyArguments, read_labels
from cloob.commands.work.collection import opened
from cloob.commands.work.showing import folder_name, free_name, hint, name_of
from cloob.data.source import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS
from cloob.errors import InputError, message, printable
from cloob.models.encoding import Encoder
from cloob.search.classify import NONE, TEMPLATES, LabelOptions, Labels, check_labels
from cloob.search.head import Head, head_of, is_head, label_by_head, load_head, save_head
from cloob.search.identity import Making
from cloob.search.index import Index
from cloob.search.open import is_there
from cloob.search.records import Item, valid

_PAGE = 4096
_BELONGING = (*CAPTION_EXTENSIONS, "xmp", "aae", "mov")
"""Captions, edits, and the film of a live photo."""
_MOVED = "moved.jsonl"


def run(arguments: ClassifyArguments, words: Sequence[str]) -> int:
    """Sorts, as the words after ``cloob classify`` ask; returns the exit code."""
    arguments.cache.use()
    templates = arguments.templates or TEMPLATES
    options = LabelOptions(templates, arguments.multi, arguments.none, arguments.cutoff, arguments.inv_tau)
    names = None if arguments.labels is None else check_labels(read_labels(arguments.labels), options)
    head = arguments.head
    if head is not None and arguments.examples is not None and head.exists() and not is_head(head):
        raise InputError(f"--head {head}: is a file of another kind; name another file")
    with opened(arguments.source, arguments.model, arguments.device, arguments.workers) as (index, unread):
        if names is not None:
            index.encoder(device=arguments.device)
            labels = index.classify(names, options, where=arguments.where)
            _say_temperature(labels)
        else:
            labels = label_by_head(index, _head(arguments, index), where=arguments.where)
        _print(index, labels, arguments)
        counts = ", ".join(f"{printable(name)} {count:,}" for name, count in labels.counts().items() if count)
        left = f"; {unread:,} could not be read (see above)" if unread else ""
        print(f"cloob: {len(labels.ids):,} pictures: {counts}{left}", file=sys.stderr)
        target, copy = arguments.move_to or arguments.copy_to, arguments.copy_to is not None
        failed = _sort(index, labels, target, copy=copy) if target is not None else 0
    if target is None and not arguments.multi:
        hint(["classify", *words, "--move-to", "sorted"])
    return 1 if unread or failed else 0


def _say_temperature(labels: Labels) -> None:
    tau = labels.temperature
    if tau is not None and tau.origin == "default":
        print(
            f"cloob: the model does not say its τ⁻¹: {tau.inv_tau:g} is taken, and probabilities show an order alone "
            "(--inv-tau sets another)",
            file=sys.stderr,
        )


def _head(arguments: ClassifyArguments, index: Index) -> Head:
    """The head of the examples, kept where it was asked for; or one that was kept before."""
    asked = index.model()
    if arguments.examples is None:
        assert arguments.head is not None
        return load_head(arguments.head, asked.fingerprint, asked.dim)
    model: str | Encoder | None = arguments.model
    if is_there(arguments.source):
        model = index.encoder(asked, arguments.device)  # its vectors have to be of these weights
    making = Making.of(asked.fingerprint)
    with opened(arguments.examples, model, arguments.device, arguments.workers, making) as (examples, _):
        head, zero_shot = head_of(examples, arguments.examples)
    judged = head.judged
    said = f"{judged.accuracy:.1%} of {judged.examples} examples right, each held out once ({judged.folds} folds)"
    print(f"cloob: head for {len(head.names)} labels: {said}; by the labels' names {zero_shot:.1%}", file=sys.stderr)
    place = arguments.head
    if place is None and "://" not in arguments.source and is_there(arguments.source):
        place = Path(arguments.source) / "heads" / f"{folder_name(arguments.examples.resolve().name)}.safetensors"
    if place is not None:
        save_head(place, head)
        print(f"cloob: kept as {place} (--head {place} takes it again)", file=sys.stderr)
    else:
        print("cloob: the head is not kept; --head FILE keeps it", file=sys.stderr)
    return head


def _rows(index: Index, labels: Labels) -> Iterator[tuple[Item, int]]:
    """Pictures and their places in the labels."""
    for start in range(0, len(labels.ids), _PAGE):
        ids = labels.ids[start : start + _PAGE].tolist()
        place = {id_: start + number for number, id_ in enumerate(ids)}
        for item in index.items(ids):
            yield item, place[item.id]


def _print(index: Index, labels: Labels, arguments: ClassifyArguments) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.csv:
        writer.writerow(("path", "label", "probability", "margin"))
    for item, row in _rows(index, labels):
        chosen = [_entry(labels, row, label) for label in labels.chosen[row]]
        if arguments.json:
            print(json.dumps({"id": item.id, "path": item.path, "labels": chosen}))
        elif arguments.csv:
            path = valid(item.path)
            for entry in chosen or [{"label": "", "probability": "", "margin": ""}]:
                writer.writerow((path, entry["label"], entry["probability"], entry["margin"]))
        else:
            shown = ", ".join(f"{printable(str(entry['label']))} {entry['probability']:.2f}" for entry in chosen)
            print(f"{printable(item.path)}\t{shown or NONE}")


def _entry(labels: Labels, row: int, label: int) -> dict[str, str | float | None]:
    margin = None if labels.margins is None else round(float(labels.margins[row, label]), 3)
    probability = round(float(labels.probabilities[row, label]), 6)
    return {"label": labels.names[label], "probability": probability, "margin": margin}


def _sort(index: Index, labels: Labels, folder: Path, *, copy: bool) -> int:
    """Moves or copies each file into a folder of its label; returns how many could not be."""
    done = failed = stayed = there = 0
    past = "copied" if copy else "moved"
    folders: list[str] = []
    for label in labels.names:  # two may differ in what no folder's name can hold
        plain = folder_name(label)
        numbered = [f"{plain}-{number}" for number in range(2, len(labels.names) + 1)]
        folders.append(next(name for name in (plain, *numbered) if name not in folders))
    for item, row in _rows(index, labels):
        if not labels.chosen[row]:
            stayed += 1
            continue
        try:
            pairs = _place(index, item, folder / folders[labels.chosen[row][0]], copy=copy)
            done, there = done + bool(pairs), there + (not pairs)
            if pairs and not copy:
                with (folder / _MOVED).open("a") as log:
                    log.writelines(json.dumps({"old": str(old), "new": str(new)}) + "\n" for old, new in pairs)
        except (OSError, InputError) as error:
            said = error.strerror if isinstance(error, OSError) else message(error).removeprefix(f"{item.path}: ")
            print(f"cloob: {printable(item.path)} is not {past}: {said}", file=sys.stderr)
            failed += 1
    also = f", {there} were there" if there else ""
    also += f", {stayed} fit no label and stay" if stayed else ""
    also += f", {failed} could not be {past}" if failed else ""
    also += f"; {folder / _MOVED} lists old and new paths" if done and not copy else ""
    print(f"cloob: {done} {past} to {folder}{also}", file=sys.stderr)
    return failed


def _place(index: Index, item: Item, folder: Path, *, copy: bool) -> list[tuple[Path, Path]]:
    """Moves or copies one file as it was indexed, with what belongs to it, to names that are free.

    Returns:
        Old and new paths; none where it is there already.
    """
    source, folder = Path(item.path).absolute(), folder.absolute()
    own = source.is_file() and not source.is_symlink()
    if not own and not copy:
        raise InputError("it is no file of its own (in a container, a link, or gone)")
    data = index.picture(item.id)  # the index may be a stranger's: other bytes stay where they are
    if own and source.resolve().is_relative_to(folder.resolve()):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    beside = {os.stat(file).st_ino: file for file in _belonging(source) if file.is_file()}  # noqa: PTH116
    shared = any(file.is_file() for file in _beside(source, IMAGE_EXTENSIONS) if file != source)
    for number in range(1, 10_000):
        target = free_name(folder, source.name if own else name_of(item.path), number)
        if copy and target.is_file() and target.read_bytes() == data:
            return []
        belonging = _belonging(target)
        if any(map(os.path.lexists, belonging)):  # of another picture
            continue
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # the name is ours from here on
        except FileExistsError:
            continue
        pairs = [pair for pair in zip(_belonging(source), belonging, strict=True) if pair[0] in beside.values()]
        pairs.append((source, target))
        try:
            for old, new in pairs[:-1]:
                its_own = not shared or old.name.startswith(source.name)
                (shutil.move if its_own and not copy else shutil.copy2)(old, new)
            if copy:
                target.write_bytes(data)
            else:
                shutil.move(source, target)
        except BaseException:
            for old, new in pairs:
                if copy or old.exists():
                    new.unlink(missing_ok=True)
                elif new.exists():
                    shutil.move(new, old)
            raise
        if copy and own:
            shutil.copystat(source, target)
        return pairs
    raise InputError("10,000 files of this name are there")


def _belonging(picture: Path) -> list[Path]:
    """What belongs to a picture if it lies beside it."""
    return _beside(picture, _BELONGING) + [picture.with_name(f"{picture.name}{ending}") for ending in (".xmp", ".XMP")]


def _beside(file: Path, endings: Sequence[str]) -> list[Path]:
    """The files of the same stem with some endings, in small letters and in capitals."""
    stem = os.path.splitext(file)[0]  # noqa: PTH122
    return [Path(f"{stem}.{each}") for ending in endings for each in (ending, ending.upper())]
