"""An index to work on (one that is there, or a temporary one of pictures that are in none)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cloob
from cloob.commands.console import DecodeOptions, check_there, progress, refuse, say
from cloob.errors import printable

if TYPE_CHECKING:
    from cloob.models.encoder import DualEncoder
    from cloob.search.build import Summary
    from cloob.search.records import Precision

INDEX_FILE = "index.sqlite"


def check_index(typed: str) -> tuple[str, str | None]:
    """The address of the index that is meant, and the filter of a folder in it; refuses a place without one.

    Of a database the server is asked later.
    """
    from cloob.search.address import find_index, is_there

    address, within = find_index(typed)
    path = Path(address)
    there = "holds no index" if path.is_dir() else "is a file" if path.exists() else "no such folder"
    free = not any(path.iterdir()) if path.is_dir() else not path.exists()
    message = f"{address}: {there}; cloob index SRC --model M --out {address if free else 'NAME.idx'} makes one"
    refuse({message: not is_there(address)})
    return address, within


def check_source(source: str, model: str | None) -> None:
    """Refuses a source that is not there, and pictures in no index without a model to embed them."""
    from cloob.models.source import check_source as check_model

    if "://" not in source and not (Path(source) / INDEX_FILE).is_file():
        check_there(source)
        refuse({"no model given: --model names a run folder, or NAME/TAG of open_clip": model is None})
        check_model(str(model))


@contextmanager
def opened(
    source: str | Path, model: str | DualEncoder | None, machine: DecodeOptions, precision: Precision | None = None
) -> Iterator[tuple[cloob.Index, int]]:
    """An index of a source, and how many of its pictures, folders and shards could not be read; some are named.

    Pictures are embedded into an index that is gone at the end. The model is one of an index, by name or by what it is
    loaded from; or for pictures what ``load_model`` takes, or a loaded one.
    """
    from cloob.search.address import is_there
    from cloob.search.update import UpdateOptions

    if is_there(source):
        with cloob.Index.open(source, model=model if isinstance(model, str) else None) as index:
            yield index, 0
        return
    options = UpdateOptions(model, device=machine.device, precision=precision, workers=machine.threads())
    with tempfile.TemporaryDirectory(prefix="cloob-") as folder, cloob.Index.create(Path(folder) / "index") as index:
        with progress() as update:
            done = index.update([source], options, progress=partial(update, "pictures"))
        report_left_out(done)
        yield index, done.faults.total() + done.unread


def report_left_out(summary: Summary) -> None:
    """Names what could not be read, and what else of the sources is not in the index."""
    from cloob.search.scan.collection import EXAMPLES

    for kind in (summary.unreadable, summary.left_out):
        for reason, count in kind.counts.most_common():
            examples = kind.examples[reason]
            more = ", …" if count > len(examples) >= EXAMPLES else ""
            say(f"{count:,} × {reason}: {', '.join(map(printable, examples))}{more}")


def folder_name(label: str) -> str:
    name = re.sub(r"[/\\]", "_", printable(label)).strip()
    return "_" if name in ("", ".", "..") else name[:200]
