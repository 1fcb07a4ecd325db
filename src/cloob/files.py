"""Files and folders that appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from cloob.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path, refused: str | None = None) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` after the block; nothing
    is left if it fails. ``refused`` is the InputError before its reason.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{refused or f'{path}: cannot be written'} ({error.strerror or error})"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink()


def write_whole(path: Path, content: str | bytes, refused: str | None = None) -> None:
    """Writes a file and its folder at once, as ``whole_file``; text is UTF-8."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with whole_file(path, refused) as temporary:
        temporary.write_bytes(content)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Writes a table at once; its first row is the header."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue())


class TooLarge(Exception):  # noqa: N818
    """A file has more bytes than may be read of it; the message has the numbers."""


def read_at_most(path: Path | str, most: int) -> bytes:
    """The bytes of a file; OSError for a pipe or a device, which would keep us waiting,
    TooLarge before any is read.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    with FileIO(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise TooLarge(f"{size:,} bytes, the limit is {most:,}")
        return file.readall()


def check_replaceable(target: Path) -> None:
    """Refuses a folder whose place no other can take: a mounted one, or the current
    one.
    """
    place = target.resolve()
    reason = ""
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
        if Path.cwd().is_relative_to(place):
            reason = "is where you are"
    if os.path.ismount(place):
        reason = "a file system is mounted here"
    if reason:
        raise InputError(
            f"{target}: {reason}, which cannot be replaced; give another place"
        )


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the target's place after the block;
    nothing is left if it fails.
    """
    check_replaceable(target)
    place = target.resolve()
    temporary = place.with_name(f".tmp-{place.name}-{uuid.uuid4().hex[:8]}")
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if place.is_dir():
            place.rename(old)
        temporary.rename(place)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error})"
        ) from error
    finally:
        if old.exists() and not place.exists():  # by Ctrl-C as well
            old.rename(place)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def flush(*paths: Path) -> None:
    """Flushes files, and the names that folders hold, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
