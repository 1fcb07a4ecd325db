"""What commands share: parts of their options, and what they print."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cloob.commands.options import Positional as Positional
from cloob.commands.options import arg as arg
from cloob.commands.options import as_words as as_words
from cloob.commands.options import parse as parse
from cloob.data.shards.spec import is_pattern, is_remote
from cloob.errors import InputError
from cloob.machine import check_device_name, decoders

if TYPE_CHECKING:
    from cloob.evaluation.embed import EmbedOptions


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where the model runs."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def check(self) -> None:
        """Raises InputError for what does not go."""
        check_device_name(self.device)


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
    """Rows for heads on vectors, of a run or as ContrastiveHeads.save wrote them."""

    a: str | None = None
    """Rows for head a, as --a of `cloob train vectors`."""
    b: str | None = None
    """Rows for head b."""

    @property
    def side_and_file(self) -> tuple[Literal["a", "b"], str] | None:
        if self.a is not None and self.b is not None:
            raise InputError("--a and --b exclude each other; give one of them")
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

        return EmbedOptions(resolve_device(self.device), self.batch_size, self.workers)


def check_range(option: str, value: float | None, low: float, high: float) -> None:
    """Raises InputError for a number outside of its range; None was left out."""
    if value is not None and not low <= value <= high:
        raise InputError(
            f"{option} is {value}; it must be {low:,} or more, and at most {high:,}"
        )


def check_there(source: str) -> None:
    """Raises InputError for a file or folder that is not there; addresses, patterns and
    the demo are looked at later.
    """
    if is_remote(source) or is_pattern(source) or source.partition(":")[0] == "demo":
        return
    if not Path(source).expanduser().exists():
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


def say(text: str) -> None:
    """Prints a line on stderr, at once, as what follows may take minutes."""
    print(f"cloob: {text}", file=sys.stderr, flush=True)


def say_next(*commands: Sequence[str | Path]) -> None:
    for i, words in enumerate(commands):
        title = "next:" if i == 0 else "  or:"
        print(title, shlex.join(["cloob", *map(str, words)]), file=sys.stderr)


def say_next_of_pictures(out: Path, source: str, holds_out: bool) -> None:
    """Says what may follow a training on pictures and captions."""
    judge = ["--held-out"] if holds_out else ["--retrieval", "PAIRS"]
    pictures = source if Path(source).is_dir() else "PICTURES"
    index = ["index", pictures, "--model", str(out), "--out", "pictures.idx"]
    say_next(["eval", out, *judge], index, ["search", "pictures.idx", "a red bird"])


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows on stderr how far the work is: on a terminal bars, else a line a minute."""
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
