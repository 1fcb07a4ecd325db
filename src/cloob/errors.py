"""Errors meant for the person who runs the command, and the small help that goes into
their one line.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """A user's mistake: one line with what is wrong, where, and the fix.

    Exit code 2.
    """


class Stopped(KeyboardInterrupt):
    """SIGTERM ended a training, after its checkpoint was written: a script that trains
    in a loop ends, too.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(
            f"{result.run}: stopped by {result.stopped} after step {result.steps:,};"
            " go on with resume='auto'"
        )
        self.result = result


class TrainingFailed(RuntimeError):  # noqa: N818
    """Training cannot go on: one line with the step and its samples. Exit code 1."""


def counted(number: int, things: str) -> str:
    """A number with what is counted: ``1 pair``, ``2,000 pairs``."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def printable(text: str) -> str:
    """Text on one line, without what a terminal would obey or turn around (U+202E
    …).
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def message(error: Exception) -> str:
    """An error as a user reads it; of the system's errors file and fault."""
    if (
        isinstance(error, OSError)
        and error.filename is not None
        and not isinstance(error, InputError)
    ):
        return printable(f"{error.filename}: {error.strerror}")
    return printable(" ".join(str(error).split()))


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message on one line of ``limit`` characters, without advice to run
    a file's code; or its type.
    """
    text = printable(" ".join(str(error).split())) or type(error).__name__
    if "weights_only" in text or "allow_pickle" in text:
        named = re.search(r"GLOBAL ([\w.]+)", text)
        global_name = f" ({named[1]})" if named else ""
        text = (
            f"holds something else than tensors and plain values{global_name}, or is"
            " damaged, and is not read"
        )
    text = re.sub(r"[^.;]*trust_remote_code=True[^.;]*[.;]?", "", text).strip()
    text = text or "asks for Python code"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of the machine or of a GPU."""
    words_of_torch = (
        "out of memory",
        "DefaultCPUAllocator",
        "could not create a memory object",
    )
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in words_of_torch
    )


def nearest(name: str, options: Iterable[str]) -> str:
    """A clause with the options nearest to a name: ``did you mean a, b?``, or ``known:
    a, b, …`` when none is near.
    """
    choices = sorted(set(options))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {first_of(choices, 24)}"


def first_of(names: Sequence[str], most: int = 30) -> str:
    """The first names of a list that may be long, with an ellipsis for the others."""
    return f"{', '.join(names[:most])}{', …' if len(names) > most else ''}"


def install(extra: str) -> str:
    """The command that brings an extra of this package, in a clone or after a wheel."""
    import json  # these two would cost every start 50 ms
    from importlib import metadata

    try:
        origin = json.loads(
            metadata.distribution("cloob").read_text("direct_url.json") or "{}"
        )
        clone = origin.get("dir_info", {}).get("editable", False)
    except metadata.PackageNotFoundError:  # its source is on the path
        clone = True
    if clone:
        return f'pip install -e ".[{extra}]" in a clone of cloob'
    return f'pip install "cloob[{extra}]"'


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Inside, a package that is not installed is an InputError that names the extra
    which brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cloob"):
            raise
        raise InputError(
            f"{package} is not installed; {install(extra)} brings it"
        ) from error


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency; an InputError names the extra of this package
    that brings it.
    """
    with needs(extra):
        return importlib.import_module(module)


@contextlib.contextmanager
def command_line(module: str) -> Iterator[None]:
    """Makes an InputError one line and exit code 2 where ``python -m`` runs the module
    of this ``__name__``.
    """
    try:
        yield
    except InputError as error:
        if module != "__main__":
            raise
        print(f"cloob: {message(error)}", file=sys.stderr)
        sys.exit(2)
