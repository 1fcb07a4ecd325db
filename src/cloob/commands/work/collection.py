"""An index to work on: one that is there, or one made for the time being of pictures that are in none."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloob.errors import printable
from cloob.models.encoding import Encoder
from cloob.search.build import Summary
from cloob.search.identity import Making
from cloob.search.index import Index
from cloob.search.open import is_there
from cloob.search.scan.collection import EXAMPLES
from cloob.search.update import UpdateOptions


@contextmanager
def opened(
    source: str | Path, model: str | Encoder | None, device: str, workers: int, making: Making | None = None
) -> Iterator[tuple[Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not be read; stderr names some.

    Args:
        source: An index, or pictures: these are embedded into an index that is gone at the end.
        model: A model of the index, by name or by what it is loaded from; for pictures what ``load_model`` takes, or
            a loaded one.
        device: Where the model embeds pictures.
        workers: Threads that decode.
        making: How pictures become vectors; None: as ``Making`` says.

    Raises:
        InputError: Nothing there, or a model that cannot be loaded.
    """
    if is_there(source):
        with Index.open(source, model=model if isinstance(model, str) else None) as index:
            yield index, 0
        return
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder, Index.create(Path(folder) / "index") as index:
        making = making or Making()
        options = UpdateOptions(
            model=model, device=device, precision=making.precision, draft=making.draft, workers=workers
        )
        done = index.update([source], options, progress=_show_progress if sys.stderr.isatty() else None)
        say_left_out(done)
        if model is not None and not isinstance(model, str):
            index.use(index.model().name, model)
        yield index, sum(done.faults.values()) + done.unread


def say_left_out(summary: Summary) -> None:
    """Names on stderr what could not be read, and what else of the sources is not in the index."""
    for fault, count in summary.faults.most_common():
        print(f"cloob: {count:,} × {fault}: {_such(summary.fault_examples[fault], count)}", file=sys.stderr)
    for reason, count in summary.left_out.counts.items():
        examples = summary.left_out.examples[reason]
        print(f"cloob: {count:,} × {reason}: {_such(examples, count)}", file=sys.stderr)


def _such(examples: list[str], count: int) -> str:
    return ", ".join(map(printable, examples)) + (", …" if count > len(examples) >= EXAMPLES else "")


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)
