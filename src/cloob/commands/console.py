"""What commands share: their options, and what they print.

Options are dataclasses, parsed by tyro and checked by tables; a comment or text at a
field is its help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional as Positional
from tyro.conf import arg as arg

from cloob.cache import Cache
from cloob.data.shards.spec import is_pattern, is_remote, local_path
from cloob.errors import InputError
from cloob.errors import refuse as refuse
from cloob.machine import decoders

if TYPE_CHECKING:
    from cloob.evaluation.embed import EmbedOptions

T = TypeVar("T")
_ADDRESS = re.compile(r"(pipe|file|[A-Za-z][A-Za-z0-9+.-]+(?=:/)):")
_A_PATH = "it must be the path of a file or folder"
_PLAIN = (  # words of tyro, and ours
    (r"^Error parsing (\w+: )?", ""),
    (r"invalid literal for int\(\) with base 10:", "needs an integer, not"),
    (r"could not convert string to float:", "needs a number, not"),
    (r"'None', |, 'None'", ""),  # a default that means: left out
    (r"\. Got errors: .*", ""),
    (
        r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.",
        r"\2 is \1; it must be one of \3",
    ),
    (r"^Unrecognized options: ", "not taken: "),
)


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where the model runs."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def check(self) -> None:
        """Raises InputError for what no machine has; what this one has, torch knows."""
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise InputError(
                f"device is {self.device!r}; it must be auto, cpu, cuda, cuda:N or mps"
            )


@dataclasses.dataclass(frozen=True)
class DecodeOptions(DeviceOptions):
    """How pictures are read, and where the model runs."""

    workers: int = dataclasses.field(default_factory=decoders)
    """Decoding threads; left out, one per processor."""

    def check(self) -> None:
        super().check()
        check_range("--workers", self.workers, 0, 1024)


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """Rows for a run of `cloob train vectors`, or for what ContrastiveHeads.save wrote."""

    a: str | None = None
    """Rows for head a, as --a of `cloob train vectors`."""
    b: str | None = None
    """Rows for head b."""

    @property
    def given(self) -> tuple[Literal["a", "b"], str] | None:
        check(self, "a excludes b")
        if self.a is not None:
            return "a", self.a
        return None if self.b is None else ("b", self.b)


@dataclasses.dataclass(frozen=True)
class ColumnOptions:
    """The columns of a table."""

    image_column: str = "filepath"
    """Column of a table with the path of the picture."""
    caption_column: str = "title"
    """Column of a table with the caption."""

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "image_column": self.image_column,
            "caption_column": self.caption_column,
        }


@dataclasses.dataclass(frozen=True)
class MeasureOptions(ColumnOptions, DecodeOptions):
    """How pairs are read, and where the model runs."""

    batch_size: int = 256
    """Images or texts a forward pass."""

    def check(self) -> None:
        super().check()
        check_range("--batch-size", self.batch_size, 1, 2**20)

    def embedding(self) -> EmbedOptions:
        from cloob.distributed import resolve_device
        from cloob.evaluation.embed import EmbedOptions

        return EmbedOptions(
            resolve_device(self.device), self.batch_size, self.workers, Cache()
        )


def parse(
    kind: type[T],
    words: Sequence[str],
    prog: str,
    *,
    usage: str = "",
    description: str | None = None,
) -> T:
    """Options from words; of a mistake the sentence of tyro's box, and the options that
    it takes to be meant.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config, named = (tyro.conf.OmitArgPrefixes,), f"{prog} {usage}".rstrip()
            options = tyro.cli(
                kind,
                args=list(words),
                prog=named,
                description=description,
                config=config,
            )
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        lines = (
            line.strip("│╭╮╰╯ ")
            for line in box.getvalue().splitlines()[1:]
            if not line.startswith(f"│{'':9}")
        )
        text = [line for line in lines if line]
        rule = next(
            (i for i, line in enumerate(text) if i and not line.strip("─-")), len(text)
        )
        sentence = " ".join(line for line in text[:rule] if line.strip("─-"))
        for jargon, plain in _PLAIN:
            sentence = re.sub(jargon, plain, sentence)
        meant = dict.fromkeys(
            line.split()[0] for line in text[rule:] if re.match(r"--\w", line)
        )
        if meant and sentence.startswith("not taken"):
            sentence += f"; did you mean {', '.join(meant)}?"
        raise InputError(f"{sentence} ({prog} --help)") from None
    for value, _, spelled in _leaves(options).values():
        if isinstance(value, Path):
            if value == Path() and {"", f"{spelled}="} & set(words):
                raise InputError(f"{spelled} is empty; {_A_PATH}")
            if _ADDRESS.match(str(value)):  # it would make folders called `https:`
                raise InputError(f"{spelled} is an address; {_A_PATH}")
    return options


def check_range(option: str, value: float | None, low: float, high: float) -> None:
    """Raises InputError for a number outside of its range; None was left out."""
    if value is not None and not low <= value <= high:
        raise InputError(
            f"{option} is {value}; it must be {low:,} or more, and at most {high:,}"
        )


def check(options: object, *rules: str, **ranges: tuple[float, float]) -> None:
    """Refuses numbers out of their ranges, and options by rules: ``a needs b or c``,
    ``a excludes b c``.
    """
    leaves = _leaves(options)
    for name, (low, high) in ranges.items():
        value, _, spelled = leaves.get(name, (None, False, ""))
        if not isinstance(value, str):
            check_range(spelled, value, low, high)
    for rule in rules:
        name, verb, *others = rule.replace(" or ", " ").split()
        _, given, spelled = leaves[name]
        if not given:
            continue
        found = [leaves[other][2] for other in others if leaves[other][1]]
        if verb == "needs" and not found:
            wanted = " or ".join(leaves[other][2] for other in others)
            raise InputError(f"{spelled} needs {wanted}")
        if verb != "needs" and found:
            raise InputError(
                f"{spelled} and {found[0]} exclude each other; give one of them"
            )


def as_words(options: object, *names: str) -> list[str]:
    """Those of some options that were given, as words of a command line."""
    given = [
        (value, spelled)
        for name, (value, there, spelled) in _leaves(options).items()
        if there and name in names
    ]
    return [
        word
        for value, spelled in given
        for word in ([spelled] if value is True else [spelled, str(value)])
    ]


def check_there(source: str) -> None:
    """Raises InputError for a file or folder that is not there; addresses, patterns and
    the demo are looked at later.
    """
    path = local_path(source)
    if is_remote(source) or is_pattern(path) or source.partition(":")[0] == "demo":
        return
    if not Path(path).exists():
        raise InputError(f"{source}: no such file or folder")


def check_out(
    option: str, path: Path, endings: Sequence[str], inputs: Iterable[str] = ()
) -> None:
    """Raises InputError for a file that cannot be written, or is one of the inputs."""
    expected = f"it must be a file {' or '.join(endings)}"
    if path.suffix not in endings:
        ending = path.suffix or "nothing"
        raise InputError(f"{option} {path}: ends in {ending}; {expected}")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; {expected}")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise InputError(f"{option} {path}: is what is read; name another file")


def _leaves(options: object) -> dict[str, tuple[Any, bool, str]]:
    """By name: the value, whether it was given, and the option as its help calls it."""
    leaves: dict[str, tuple[Any, bool, str]] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        name, value = field.name, getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= _leaves(value)
        else:
            positional = re.search(r"Positional.*metavar='(\S+?)[ ']", str(field.type))
            spelled = positional[1] if positional else f"--{name.replace('_', '-')}"
            leaves[name] = value, value != field.default, spelled
    return leaves


def say(text: str) -> None:
    """Prints a line on stderr, at once, as what follows may take minutes."""
    print(f"cloob: {text}", file=sys.stderr, flush=True)


def say_next(*commands: Sequence[str | Path]) -> None:
    for i, words in enumerate(commands):
        print(
            f"{'next:' if i == 0 else '  or:'} {shlex.join(['cloob', *map(str, words)])}",
            file=sys.stderr,
        )


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far the work is, on stderr: bars on a terminal, else a line per minute."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    to_person, tasks, last = sys.stderr.isatty(), dict[str, Any](), time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal last
        if to_person:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done, total=total, visible=done < total)
        elif done < total and time.monotonic() - last >= 60.0:
            last = time.monotonic()
            say(f"{what}: {done:,} of {total:,}")

    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not to_person
    ) as bars:
        yield update
