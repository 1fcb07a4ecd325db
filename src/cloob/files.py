"""Whole files and folders or none: written, they appear under their names in one go; no pipe is read for a file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from cloob.errors import InputError

_MORE = 1 << 16


def write_whole(path: Path, content: str | bytes, refused: str | None = None) -> None:
    """Writes a file, and its folder where that is missing; who reads it sees all of it or what was there before.

    Args:
        path: The file.
        content: Bytes, or text that is written as UTF-8 with line feeds as they are; what UTF-8 does not have (the
            bytes of a file name that is not UTF-8) as an escape, which JSON reads back.
        refused: What the error says before the reason; left out, that the file cannot be written.

    Raises:
        InputError: The file or its folder cannot be written.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink()
        raise InputError(f"{refused or f'{path}: cannot be written'} ({error.strerror or error})") from error


class TooLarge(Exception):  # noqa: N818 - the file is at fault, not the program
    """A file has more bytes than are read of it.

    Attributes:
        size: How many there are, or were found.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def open_regular(path: Path | str) -> FileIO:
    """Opens a file to be read; none is waited for that is a pipe or a device.

    Raises:
        OSError, ValueError: There is no such file, or it cannot be read, or is none (ValueError: a NUL in the path).
    """
    file = FileIO(path, "r", opener=_at_once)
    try:
        _refuse_others(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def read_at_most(path: Path | str, most: int) -> bytes:
    """The bytes of a file. Of a pipe or a device, which may have no end, none is read, nor is one waited for.

    Args:
        path: The file, or a link to it.
        most: The largest number of bytes.

    Raises:
        OSError, ValueError: There is no such file, or it cannot be read (ValueError: a NUL in the path).
        TooLarge: It has more, which is seen before any is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise TooLarge(size)
        content = file.read(size + 1) or b""
        # Another length than that of the file: it is changed meanwhile, or is one of /proc, whose lengths are all 0.
        while len(content) != size and (more := file.read(len(content) + _MORE)):
            content += more
            if len(content) > most:
                raise TooLarge(len(content))
        return content


def check_regular(path: Path | str) -> None:
    """Refuses what is no file, before who opens it waits for its bytes.

    Raises:
        OSError: There is no such file, or it is a pipe or a device.
    """
    _refuse_others(os.stat(path), path)  # noqa: PTH116


def _refuse_others(found: os.stat_result, path: Path | str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe too without waiting for who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_replaceable(target: Path) -> None:
    """Refuses a folder whose place no other one can take.

    Raises:
        InputError: A file system is mounted there, or this process stands in it.
    """
    place = target.resolve()
    if os.path.ismount(place):
        raise InputError(f"{target}: a file system is mounted here, which cannot be replaced; give a folder in it")
    with contextlib.suppress(FileNotFoundError):  # who stands in a folder that is gone stands in none
        if Path.cwd().is_relative_to(place):
            raise InputError(f"{target}: is where you are, which cannot be replaced; give another place")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the target's place once the block is done; nothing is left if it fails.

    Of a link the folder that it names is replaced. What is there before stays until the new one has its place.

    Raises:
        InputError: It cannot be written, or the target not be replaced (``check_replaceable``).
    """
    check_replaceable(target)
    place = target.resolve()
    temporary = place.with_name(f".tmp-{place.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(place, temporary)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(place: Path, new: Path) -> None:
    """Gives a folder the place of another one, which is only then removed, and put back if that fails."""
    old = place.with_name(f"{new.name}-old")
    if place.is_dir():
        place.rename(old)
    try:
        new.rename(place)
    except BaseException:  # Ctrl-C as well
        if old.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)  # the new one has its place, whatever of the old one cannot be removed


def flush(folder: Path) -> None:
    """Flushes every file and folder below a folder to the disk, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            flush_entries(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def flush_entries(folder: Path) -> None:
    """Flushes the names that a folder holds, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
