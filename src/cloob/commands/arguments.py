"""Command-line arguments from dataclasses, by tyro, whose errors become one line.

tyro finds what is wrong and what may have been meant; it draws both into a box and ends the process, and has no setting
to do otherwise: the sentence is taken out of the box. Ours are what it cannot know: old names, addresses and empty
words where a path of this machine is wanted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloob.cache import use_cache
from cloob.errors import InputError, require
from cloob.renamed import RENAMED

if TYPE_CHECKING:
    import tyro as tyro  # for all commands: annotations of their arguments are read when words are parsed
else:
    tyro = require("tyro", "train")

T = TypeVar("T")
HTML = (".html", ".htm")
"""Of a page."""

_ADDRESS = re.compile(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]+(?=:/)):")


def parse(
    kind: type[T],
    words: Sequence[str],
    prog: str,
    default: T | None = None,
    *,
    usage: str = "",
    description: str | None = None,
) -> T:
    """The dataclass that the words describe; its fields appear by their leaf names.

    Args:
        kind: A dataclass, possibly nested; docstrings under the fields are their help.
        words: The command line after the command.
        prog: How the command is called in its help.
        default: Where the values start that the words do not set.
        usage: What the help shows between the command and its options.
        description: What the help says of the command; the dataclass's docstring when left out.

    Raises:
        InputError: A word is unknown or a value wrong; one line.
        SystemExit: ``--help`` was asked for and printed.
    """
    _check_renamed(words, prog)
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    _refuse_empty_paths(kind, words)
    try:
        with contextlib.redirect_stderr(complaint), _joined_lines():
            parsed: T = tyro.cli(
                kind,
                args=list(words),
                prog=f"{prog} {usage}".rstrip(),
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **extra,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise InputError(f"{_first_paragraph(complaint.getvalue())} ({prog} --help)") from None
    _check_local(parsed)
    return parsed


@contextlib.contextmanager
def _joined_lines() -> Iterator[None]:
    """Gives tyro the docstrings under fields a line a paragraph: where their lines break, its help would break too."""
    import docstring_parser  # tyro's own

    def parse_from_object(kind: type) -> docstring_parser.Docstring:
        docstring = as_written(kind)
        for field in docstring.params:
            field.description = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(field.description or ""))
        return docstring

    as_written = docstring_parser.parse_from_object
    docstring_parser.parse_from_object = parse_from_object  # type: ignore[assignment]
    try:
        yield
    finally:
        docstring_parser.parse_from_object = as_written


def _check_renamed(words: Sequence[str], prog: str) -> None:
    """Answers an option's old name with its new one."""
    new_names = RENAMED.get(prog.removeprefix("cloob "), {})
    for word in words:
        option = word.partition("=")[0]
        old = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and old in new_names:
            raise InputError(f"{option} is called --{new_names[old].replace('_', '-')} now ({prog} --help)")


def _check_local(arguments: object) -> None:
    """Refuses addresses where a local file or folder is wanted: as paths they would make folders called ``https:``."""
    for field in dataclasses.fields(arguments):  # type: ignore[arg-type]
        value = getattr(arguments, field.name)
        if dataclasses.is_dataclass(value):
            _check_local(value)
        elif isinstance(value, Path) and (address := _ADDRESS.match(value.as_posix())):
            mend = "write it as a path" if address[1] == "file" else "a file or folder of this machine is wanted"
            raise InputError(f"--{field.name.replace('_', '-')} is an address ({address[1]}:…); {mend}")


@dataclasses.dataclass(frozen=True)
class CacheArguments:
    """Where what can be made again is kept."""

    cache_dir: Path | None = None
    """Where embeddings, streamed shards and fetched weights are kept for later runs; left out, $CLOOB_CACHE or the
    user's cache folder."""
    cache_gb: float | None = None
    """Room for them in GiB, weights not counted; what was used longest ago goes first. Left out, $CLOOB_CACHE_BYTES or
    50."""

    def use(self) -> None:
        """Makes it the cache of this process and of those that it starts."""
        if self.cache_gb is not None and not 0 < self.cache_gb < math.inf:
            raise InputError(f"--cache-gb is {self.cache_gb}; a positive number of GiB is wanted")
        use_cache(self.cache_dir, self.cache_gb)


def check_amounts(batch_size: int, workers: int) -> None:
    """Raises InputError for options that no embedding can be computed with."""
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; 1 or more is wanted")
    if workers < 0:
        raise InputError(f"--workers is {workers}; 0 or more is wanted")


def check_out(option: str, path: Path, endings: Sequence[str], inputs: Iterable[str] = ()) -> None:
    """Refuses to write over what is no such file.

    Args:
        option: What names the file.
        path: The file.
        endings: One of these is wanted.
        inputs: What is read, and may not be written over.

    Raises:
        InputError: Another ending, a folder, or an input.
    """
    if path.suffix not in endings:
        *others, last = endings
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise InputError(f"{option} {path}: ends in {path.suffix or 'nothing'}; {wanted} is wanted")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; a file is wanted")
    if any(os.path.realpath(path) == os.path.realpath(each) for each in inputs):
        raise InputError(f"{option} {path}: is what is read; name another file")


def _refuse_empty_paths(kind: type, words: Sequence[str]) -> None:
    """An empty path would be read as the folder where one stands."""
    for name in _paths(kind):
        option = f"--{name.replace('_', '-')}"
        for word, value in itertools.zip_longest(words, words[1:]):
            if word.partition("=")[0].replace("_", "-") == option and (
                word.endswith("=") or (word, value) == (option, "")
            ):
                raise InputError(f"{option} is empty; it must be the path of a file or folder")


def _paths(kind: type) -> list[str]:
    """The leaves of a dataclass that hold one path."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            names += _paths(hint)
        elif hint in (Path, Path | None):
            names.append(name)
    return names


def _first_paragraph(box: str) -> str:
    """What tyro says is wrong, and what it thinks was meant, out of the box that it draws around it.

    The box has a title, rules of dashes, the sentence, a rule, and then hints; without UTF-8 its sides are spaces.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    text = [line for line in lines[1:] if line]
    while text and not text[0].strip("─-"):
        text.pop(0)
    rule = next((i for i, line in enumerate(text) if not line.strip("─-")), len(text))
    said = re.sub(r"^Error parsing \w+: ", "", " ".join(text[:rule]))  # a component's own check says it all
    for fault, wanted in ((r"for int\(\) with base 10", "a whole number"), ("convert string to float", "a number")):
        said = re.sub(rf"^Error parsing (--\S+): .*{fault}: ('.*')$", rf"\1 is \2; {wanted} is wanted", said)
    said = said.replace("'None', ", "").replace(", 'None'", "")  # a default that says: left out
    meant = [line.split()[0] for line in text[rule:] if line.startswith("--") and line.strip("-")]
    if said.startswith("Unrecognized options") and meant:
        return f"{said}; did you mean {', '.join(dict.fromkeys(meant))}?"
    return said
