"""Copies and moves pictures out of an index.

The files of one shot stay together, and nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cloob
from cloob.commands.console import say
from cloob.commands.index import folder_name
from cloob.errors import InputError, message, printable
from cloob.files import flush, write_whole
from cloob.search.records import Item

Stems = dict[str, list[Path]]
Folders = Mapping[int, str | None]  # by the id of a picture; None: it stays where it is
_BELONGING = (  # captions, edits, the film of a live photo
    r"\.(txt|caption|xmp|aae|mov|mp4)"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def copy(
    index: cloob.Index,
    items: Iterable[Item],
    root: Path | None,
    below: Folders | None = None,
    *,
    move: bool = False,
) -> int:
    """Copies pictures into a folder, or into those ``below`` it; 1 where one could not
    be copied.

    A shot goes where its first picture that is no RAW goes. With ``move`` its files are
    moved, and ``root/moved.jsonl`` lists old and new paths before that. The first full
    disk ends it.
    """
    from cloob.search.alike import is_raw, shot_of

    if root is None:
        return 0
    past, listed, counts, full = (
        "moved" if move else "copied",
        dict[Path, Stems](),
        Counter[str](),
        False,
    )
    moved, earlier = root / "moved.jsonl", set()  # the old paths in it
    for line in moved.read_text().splitlines() if move and moved.exists() else ():
        with contextlib.suppress(ValueError):  # the last line may be cut off
            earlier.add(str(json.loads(line)["old"]))
    shots: dict[str, list[Item]] = {}
    for item in items:
        shots.setdefault(shot_of(item.path), []).append(item)
    for shot in shots.values():
        first = min(shot, key=lambda item: (is_raw(item.path), item.path))
        folder = "" if below is None else below[first.id]
        left = [
            item
            for item in shot
            if item.path not in earlier or os.path.lexists(item.path)
        ]
        counts["before"] += len(shot) - len(left)
        if folder is None or not left:
            continue
        try:
            pairs = _planned(index, left, (root / folder).absolute(), listed, move=move)
            if pairs and move:  # the list has all of them or, on a full disk, none
                root.mkdir(parents=True, exist_ok=True)
                with moved.open("a") as file:
                    size = file.tell()
                    try:
                        file.writelines(
                            json.dumps({"old": str(old), "new": str(new)}) + "\n"
                            for old, new in pairs
                        )
                        file.flush()
                    except OSError:
                        os.truncate(moved, size)
                        raise
            for source, target in pairs:
                _place(source, target, move=move)
            counts["done" if pairs else "there"] += len(left)
        except (OSError, InputError) as error:
            counts["failed"] += len(left)
            say(
                f"{printable(left[0].path)} is not {past}:"
                f" {message(error).removeprefix(f'{left[0].path}: ')}"
            )
            cause = error.__cause__ if isinstance(error, InputError) else error
            if full := isinstance(cause, OSError) and cause.errno in _FULL:
                break
    ends = {
        "done": f"{past} to {root}",
        "there": "were there",
        "before": f"were moved before ({moved})",
        "failed": f"could not be {past}",
    }
    say(
        ", ".join(
            f"{counts[kind]} {end}"
            for kind, end in ends.items()
            if counts[kind] or kind == "done"
        )
    )
    if full:
        say(
            "the disk is full, so nothing more was tried; make room and call again,"
            " which goes on from here"
        )
    return 1 if counts["failed"] else 0


def _planned(
    index: cloob.Index,
    shot: Sequence[Item],
    folder: Path,
    listed: dict[Path, Stems],
    *,
    move: bool,
) -> list[tuple[Path | bytes, Path]]:
    """The files of a shot, or bytes out of a container, with their new paths; none
    where they are there already.
    """
    from cloob.data.source import PICTURE_SUFFIXES
    from cloob.search.alike import is_raw
    from cloob.search.metadata import TAKEOUT

    contents = {
        Path(item.path).absolute(): index.picture(item.id) for item in shot
    }  # InputError: one has changed
    first, data = next(iter(contents.items()))
    files: dict[Path | bytes, str] = {}  # and what comes after the stem
    if not first.is_file():
        member = Path(folder_name(re.split(r"/|\\|::", shot[0].path)[-1][-200:]))
        stem, files[data] = member.stem, member.suffix
    else:
        if first.parent not in listed:  # by stem: `a` of a.jpg, a.xmp and a.jpg.xmp
            picture = "|".join(map(re.escape, PICTURE_SUFFIXES))
            ending = (
                rf"(?:(?:{picture})?{_BELONGING}|(?:{picture}){TAKEOUT}|(?:{picture}))$"
            )
            listed[first.parent] = {}
            for path in sorted(first.parent.iterdir()):
                if match := re.search(ending, path.name, re.IGNORECASE):
                    listed[first.parent].setdefault(
                        path.name[: match.start()], []
                    ).append(path)
        stem = first.stem
        others = [
            path
            for path in listed[first.parent].get(stem, ())
            if path.is_file() and not path.is_symlink()
        ]
        files |= {path: path.name.removeprefix(stem) for path in (*others, *contents)}
    if move and any(path.is_symlink() or path not in files for path in contents):
        raise InputError("it is in a container, or a link")
    if move and first.is_relative_to(folder):
        return []
    marks = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    for start in (f"{stem}{mark}" for mark in marks):
        pairs = [(source, folder / f"{start}{rest}") for source, rest in files.items()]
        pictures = [
            (new, source if isinstance(source, bytes) else contents.get(source))
            for source, new in pairs
        ]
        if not move and all(
            new.is_file() and new.read_bytes() == old
            for new, old in pictures
            if old is not None
        ):
            return []
        if not any(os.path.lexists(new) for _, new in pairs):
            break
    # Pictures last, RAW before others: after a kill in between the next call finds one,
    # with the label that counts.
    return sorted(
        pairs, key=lambda pair: (pair[0] in contents, not is_raw(str(pair[1])))
    )


def _place(source: Path | bytes, target: Path, *, move: bool) -> None:
    """Copies or moves one file; under its name a target is complete, and the source
    goes only after that.
    """
    if isinstance(source, bytes):
        write_whole(target, source)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if move:
        with contextlib.suppress(OSError):  # another file system
            source.rename(target)
            return
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        shutil.copy2(source, temporary)
        flush(temporary)
        temporary.rename(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if move:
        source.unlink()
