"""An index to work on: one that is there, or a temporary one for pictures that are in none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.commands.options import check_there
from cloob.errors import InputError, printable

if TYPE_CHECKING:
    from cloob.models.encoding import Encoder
    from cloob.search.build import Summary
    from cloob.search.index import Index
    from cloob.search.records import Precision

INDEX_FILE = "index.sqlite"


def check_index(address: str) -> None:
    """Refuses an address without an index."""
    path, scheme = Path(address), address.partition("://")[0]
    if scheme not in (address, "postgresql", "postgres"):
        raise InputError(f"{address}: {scheme}:// is no index; a folder or postgresql://… is wanted")
    if scheme == address and not (path / INDEX_FILE).is_file():
        there = "holds no index" if path.is_dir() else "is a file" if path.exists() else "no such folder"
        free = not any(path.iterdir()) if path.is_dir() else not path.exists()
        raise InputError(
            f"{address}: {there}; cloob index SRC --model M --out {address if free else 'NAME.idx'} makes one"
        )


def check_source(source: str, model: str | None) -> None:
    """Refuses a source that is not there, and pictures in no index without a model to embed them."""
    from cloob.models.source import check_source as check_model

    if "://" in source or (Path(source) / INDEX_FILE).is_file():
        return
    check_there(source)
    if model is None:
        raise InputError("no model given: --model names a run folder, or NAME/TAG of open_clip")
    check_model(model)


@contextmanager
def opened(
    source: str | Path,
    model: str | Encoder | None,
    device: str,
    workers: int | None,
    precision: Precision | None = None,
) -> Iterator[tuple[Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not be read; stderr names some.

    Pictures are embedded into an index that is gone at the end. The model is one of an index, by name or by what it is
    loaded from; or for pictures what ``load_model`` takes, or a loaded one.
    """
    import tempfile

    from cloob.commands.terminal import Progress
    from cloob.machine import decoders
    from cloob.search.index import Index, is_there
    from cloob.search.update import UpdateOptions

    if is_there(source):
        with Index.open(source, model=model if isinstance(model, str) else None) as index:
            yield index, 0
        return
    workers = decoders() if workers is None else workers
    options = UpdateOptions(model, device=device, precision=precision, workers=workers)
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder, Index.create(Path(folder) / "index") as index:
        with Progress() as progress:
            done = index.update([source], options, progress=partial(progress.update, "pictures"))
        report_left_out(done)
        if model is not None and not isinstance(model, str):
            index.use(index.model().name, model)
        yield index, sum(done.faults.values()) + done.unread


def report_left_out(summary: Summary) -> None:
    """Names on stderr what could not be read, and what else of the sources is not in the index."""
    from cloob.search.scan.collection import EXAMPLES

    left_out = summary.left_out
    reasons = [(fault, count, summary.unreadable.examples[fault]) for fault, count in summary.faults.most_common()]
    reasons += [(reason, count, left_out.examples[reason]) for reason, count in left_out.counts.items()]
    for reason, count, examples in reasons:
        more = ", …" if count > len(examples) >= EXAMPLES else ""
        print(f"cloob: {count:,} × {reason}: {', '.join(map(printable, examples))}{more}", file=sys.stderr)
