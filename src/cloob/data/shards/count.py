"""Counts how many samples each shard holds."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from pathlib import Path

from cloob.cache import Cache
from cloob.data.shards.index import open_index, scan_index
from cloob.data.shards.paths import local_shards
from cloob.data.shards.remote import fetch_tar
from cloob.data.shards.sizes import SIZES, memory, read_sizes, unfinished
from cloob.data.shards.spec import expand, is_remote, local_path, shard_name
from cloob.data.shards.tar import TarReader
from cloob.errors import InputError, counted
from cloob.files import write_whole

logger = logging.getLogger(__name__)
_KEEP_EVERY = 16  # shards: a list is written whole each time, and a shard takes seconds


def count_samples(spec: str) -> dict[str, int]:
    """Counts the samples of shards, by path or full address.

    Those of shards elsewhere are kept until ``write_counts`` has them all: a count that broke off is gone on with.

    Raises:
        InputError: No shards, or some are truncated or cannot be read.
    """
    remote = is_remote(spec)
    items = _shards(spec)
    before = read_sizes(unfinished(spec)) if remote else {}
    sizes = {item: before[item] for item in items if item in before}
    if sizes:
        logger.warning("%s: goes on behind %s that were counted before", spec, counted(len(sizes), "shards"))
    cut: dict[str, str] = {}
    odd: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for item in items:
                if item in sizes:
                    continue
                path = Path(folder) / "shard.tar" if remote else Path(item)
                if remote:
                    fetch_tar(item, path)
                reader = TarReader((path,))
                index = scan_index(reader) if remote else open_index(reader, Cache())
                if index.left_out:
                    odd[item] = "; ".join(index.left_out)
                if index.cuts:
                    cut[item] = f"{index.cuts[0]}; {index.complete(0):,} samples are complete"
                    continue
                sizes[item] = index.complete(0)
                if remote and len(sizes) % _KEEP_EVERY == 0:
                    _keep(spec, sizes)
    finally:  # Ctrl-C as well
        if remote:
            _keep(spec, sizes)
    if odd:
        item = next(iter(odd))
        logger.warning("%s: not counted: %s (of %s that hold such)", item, odd[item], counted(len(odd), "shards"))
    if cut:
        (first, said), *others = cut.items()
        also = f"; also cut: {', '.join(item for item, _ in others)}" if others else ""
        raise InputError(f"{first}: {said}{also}")
    return {item: sizes[item] for item in items}


def _keep(spec: str, sizes: dict[str, int]) -> None:
    with contextlib.suppress(InputError):  # it saves work, and says nothing of the counts
        write_whole(unfinished(spec), json.dumps(sizes))


def _shards(spec: str) -> list[str]:
    return expand(spec, escape=False) if is_remote(spec) else [str(path) for path in local_shards(spec)]


def write_counts(spec: str, out: Path | None) -> tuple[Path | None, dict[str, int]]:
    """Counts the samples of shards, and writes or remembers the counts.

    Args:
        spec: A folder, a path or a pattern of tars, here or elsewhere.
        out: The list to write; None: ``sizes.json`` in the folder, and for shards elsewhere none. The counts of those
            are remembered in any case, for whoever gives the same pattern as ``--data``.

    Returns:
        The list that was written, and the counts, by path or full address.

    Raises:
        InputError: As ``count_samples``, nowhere to write, or shards of equal names, which a list cannot tell apart.
    """
    remote = is_remote(spec)
    if not remote and out is None:
        folder = Path(local_path(spec))
        if not folder.is_dir():
            raise InputError("--out is missing: only a folder has its own place for sizes.json")
        out = folder / SIZES
    names = _names(spec) if out is not None else {}
    sizes = count_samples(spec)
    if remote:
        write_whole(memory(spec), json.dumps(sizes, indent=1) + "\n")
        unfinished(spec).unlink(missing_ok=True)
    if out is not None:
        write_whole(out, json.dumps({names[item]: count for item, count in sizes.items()}, indent=1) + "\n")
    return out, sizes


def _names(spec: str) -> dict[str, str]:
    """The file name of each shard, by path or full address; refused before anything is counted if two are equal."""
    remote = is_remote(spec)
    names: dict[str, str] = {}
    items: dict[str, str] = {}
    for item in _shards(spec):
        name = names[item] = shard_name(item) if remote else Path(item).name
        if (other := items.setdefault(name, item)) != item:
            raise InputError(f"--out: {other} and {item} have the same name; count each folder by itself")
    return names
