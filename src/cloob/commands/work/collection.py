"""An index to work on: one that is there, or one made for the time being of pictures that are in none."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloob.commands.work.showing import printable
from cloob.search.build import Effort, Summary
from cloob.search.identity import Making
from cloob.search.index import Index
from cloob.search.open import is_there
from cloob.search.update import UpdateOptions


@contextmanager
def opened(
    source: str | Path, model: str | None, device: str, workers: int, making: Making | None = None
) -> Iterator[tuple[Index, int]]:
    """An index of a source, and how many of its pictures could not be read; stderr names the first of them.

    Args:
        source: An index, or pictures: these are embedded into an index that is gone at the end.
        model: The name of a model of the index; what ``load_model`` takes for pictures.
        device: Where the model runs.
        workers: Threads that decode.
        making: How pictures become vectors; None: as ``Making`` says.

    Raises:
        InputError: Nothing there, or a model that cannot be loaded.
    """
    if is_there(source):
        with Index.open(source, model=model) as index:
            index.encoder(device=device)
            yield index, 0
        return
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder, Index.create(Path(folder) / "index") as index:
        making = making or Making()
        effort = Effort(workers=workers)
        options = UpdateOptions(
            model=model, device=device, precision=making.precision, draft=making.draft, effort=effort
        )
        done = index.update([source], options, progress=_show_progress if sys.stderr.isatty() else None)
        yield index, say_faults(done)


def say_faults(done: Summary) -> int:
    """Names on stderr what could not be read, and counts it."""
    for reason, count in done.faults.most_common():
        first = printable((done.fault_examples.get(reason) or ["?"])[0])
        print(f"cloob: {count:,} × {reason}, such as {first}", file=sys.stderr)
    return sum(done.faults.values())


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)
