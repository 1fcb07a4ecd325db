"""Options of commands: dataclasses whose docstrings under the fields are the help, parsed by tyro, checked by tables.

tyro draws what is wrong into a box and ends the process, and cannot be told otherwise: the sentence is taken out of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro as tyro  # for all commands: annotations of their options are read when words are parsed
else:
    tyro = require("tyro", "train")

T = TypeVar("T")
HTML = (".html", ".htm")

_ADDRESS = re.compile(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]+(?=:/)):")
_SMALLEST = {"batch_size": 1, "workers": 0}  # of all commands
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """Where what can be made again is kept."""

    cache_dir: Path | None = None
    """Where embeddings, streamed shards and fetched weights are kept for later runs; left out, $CLOOB_CACHE or the
    user's cache folder."""
    cache_gb: float | None = None
    """Room for them in GiB, weights not counted; what was used longest ago goes first. Left out, $CLOOB_CACHE_BYTES or
    50."""

    def use(self) -> None:
        """Makes it the cache of this process and of those that it starts."""
        from cloob.cache import use_cache

        if self.cache_gb is not None and not 0 < self.cache_gb < math.inf:
            raise InputError(f"--cache-gb is {self.cache_gb}; a positive number of GiB is wanted")
        use_cache(self.cache_dir, self.cache_gb)


def parse(
    kind: type[T],
    words: Sequence[str],
    prog: str,
    default: T | None = None,
    *,
    usage: str = "",
    description: str | None = None,
) -> T:
    """The dataclass that the words describe; a mistake is one line, ``--help`` a SystemExit."""
    complaint = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint), _joined_lines():
            parsed: T = tyro.cli(
                kind,
                args=list(words),
                prog=f"{prog} {usage}".rstrip(),
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_local_paths(),
                **extra,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise InputError(f"{_first_paragraph(complaint.getvalue())} ({prog} --help)") from None
    at_least(parsed, {name: least for name, least in _SMALLEST.items() if hasattr(parsed, name)})
    device = getattr(parsed, "device", "auto")  # whether the machine has it, torch knows
    if not _DEVICE.fullmatch(device):
        raise InputError(f"device is {device!r}; it must be auto, cpu, cuda, cuda:N or mps")
    return parsed


def given(options: object, name: str) -> bool:
    """Whether an option has another value than its default."""
    return bool(getattr(options, name) != _default(_fields(options)[name]))


def goes_with(options: object, table: Mapping[str, str | tuple[str, ...]]) -> None:
    """Refuses options without the option that they need, or one of several."""
    for name, needed in table.items():
        choices = (needed,) if isinstance(needed, str) else needed
        if given(options, name) and not any(given(options, each) for each in choices):
            raise InputError(f"{_spelled(options, name)} needs {' or '.join(_spelled(options, c) for c in choices)}")


def exclusive(options: object, *groups: Sequence[str]) -> None:
    """Refuses options that exclude each other: of each group one may be given."""
    for group in groups:
        both = [_spelled(options, name) for name in group if given(options, name)]
        if len(both) > 1:
            raise InputError(f"{both[0]} and {both[1]} exclude each other; give one of them")


def at_least(options: object, table: Mapping[str, float]) -> None:
    """Refuses numbers below the smallest that makes sense; None says left out."""
    for name, least in table.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"{_spelled(options, name)} is {value}; {least} or more is wanted")


def as_words(options: object, *names: str) -> list[str]:
    """The options that were given, as words of a command line; of some names alone if there are any."""
    words: list[str] = []
    for name, field in _fields(options).items():
        value, option = getattr(options, name), _spelled(options, name)
        if dataclasses.is_dataclass(value):
            words += as_words(value, *names)
        elif (not names or name in names) and value != _default(field):
            words += [option] if option.startswith("--") else []
            words += [] if value is True else map(str, value if isinstance(value, tuple) else [value])
    return words


def check_there(source: str) -> None:
    """Refuses pictures or pairs at a path where nothing is."""
    from cloob.data.shards.spec import is_remote, local_path

    if is_remote(source) or source.partition(":")[0] == "demo":
        return
    path = local_path(source)
    if not Path(path).exists() and not any(mark in path for mark in "{*?["):
        raise InputError(f"{source}: no such file or folder")


def check_out(option: str, path: Path, endings: Sequence[str], inputs: Iterable[str] = ()) -> None:
    """Refuses an output file with another ending, a folder in its place, or one that is also an input."""
    if path.suffix not in endings:
        *others, last = endings
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise InputError(f"{option} {path}: ends in {path.suffix or 'nothing'}; {wanted} is wanted")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; a file is wanted")
    if any(os.path.realpath(path) == os.path.realpath(each) for each in inputs):
        raise InputError(f"{option} {path}: is what is read; name another file")


def _fields(options: object) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _spelled(options: object, name: str) -> str:
    """An option as its help calls it."""
    return name.upper() if "Positional" in str(_fields(options)[name].type) else f"--{name.replace('_', '-')}"


def _local_paths() -> tyro.constructors.ConstructorRegistry:
    """Paths that are neither empty nor addresses, which would make folders called ``https:``."""

    def read(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("is empty; it must be the path of a file or folder")
        if address := _ADDRESS.match(words[0]):
            fix = "write it as a path" if address[1] == "file" else "a file or folder of this machine is wanted"
            raise ValueError(f"is an address ({address[1]}:…); {fix}")
        return Path(words[0])

    paths = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(lambda info: paths if info.type is Path else None)
    return registry


@contextlib.contextmanager
def _joined_lines() -> Iterator[None]:
    """Gives tyro the docstrings under fields one line per paragraph: its help would break where their lines do."""
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


def _first_paragraph(box: str) -> str:
    """What tyro says is wrong, and what may have been meant, out of its box.

    The box has a title, rules of dashes, the sentence, a rule, and then hints; without UTF-8 its sides are spaces.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    text = [line for line in lines[1:] if line]
    while text and not text[0].strip("─-"):
        text.pop(0)
    rule = next((i for i, line in enumerate(text) if not line.strip("─-")), len(text))
    said = re.sub(r"^Error parsing \w+: ", "", " ".join(text[:rule]))  # a component's own check says it all
    said = re.sub(r"^Error parsing (--\S+): (.*<class 'pathlib.Path'>: )?(?=is an? |is empty)", r"\1 ", said)
    for fault, wanted in ((r"for int\(\) with base 10", "a whole number"), ("convert string to float", "a number")):
        said = re.sub(rf"^Error parsing (--\S+): .*{fault}: ('.*')$", rf"\1 is \2; {wanted} is wanted", said)
    said = said.replace("'None', ", "").replace(", 'None'", "")  # a default that says: left out
    meant = [line.split()[0] for line in text[rule:] if line.startswith("--") and line.strip("-")]
    if said.startswith("Unrecognized options") and meant:
        return f"{said}; did you mean {', '.join(dict.fromkeys(meant))}?"
    return said
