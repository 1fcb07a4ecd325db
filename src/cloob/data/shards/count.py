"""Counts samples: ``cloob data SHARDS --count`` writes ``sizes.json``, or remembers counts of shards elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

from cloob.cache import Cache, cache_root
from cloob.data.shards.fetch import fetch, fetch_tar
from cloob.data.shards.index import open_index, scan_index
from cloob.data.shards.paths import SIZES, local_shards, parse_sizes, read_sizes
from cloob.data.shards.spec import expand, is_remote, local_path, shard_name
from cloob.data.shards.tar import TarReader
from cloob.errors import InputError, counted
from cloob.files import write_whole

logger = logging.getLogger(__name__)


def fetch_sizes(url: str) -> dict[str, int]:
    """The counts in a list elsewhere; InputError where it cannot be fetched or is no list."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        fetch(url, path)
        return parse_sizes(url, path.read_bytes())


def remembered(pattern: str) -> dict[str, int]:
    """The counts that this host remembers of a pattern's shards, by full address; some or all may be missing."""
    return read_sizes(_memory(pattern))


def _memory(pattern: str) -> Path:
    return cache_root() / "sizes" / f"{hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()}.json"


def write_counts(spec: str, out: Path | None) -> tuple[Path | None, dict[str, int]]:
    """Counts the samples of shards, and writes or remembers the counts.

    Args:
        spec: A folder, a path or a pattern of tars, here or elsewhere.
        out: The list to write; None: ``sizes.json`` in the folder, and for shards elsewhere none. The counts of those
            are remembered in any case, for whoever gives the same pattern as ``--data``.

    Returns:
        The list that was written, and the counts, by path or full address.
    """
    remote = is_remote(spec)
    if not remote and out is None:
        folder = Path(local_path(spec))
        if not folder.is_dir():
            raise InputError("--out is missing: only a folder has its own place for sizes.json")
        out = folder / SIZES
    shards = expand(spec, escape=False) if remote else [str(path) for path in local_shards(spec)]
    names = [shard_name(shard) if remote else Path(shard).name for shard in shards]
    for place, name in enumerate(names if out is not None else ()):
        if (first := names.index(name)) != place:
            both = f"{shards[first]} and {shards[place]}"
            raise InputError(f"--out: {both} have the same name; count each folder by itself")
    sizes = _count(spec, shards, remote=remote)
    if out is not None:
        listed = {name: sizes[shard] for name, shard in zip(names, shards, strict=True)}
        write_whole(out, json.dumps(listed, indent=1) + "\n")
    return out, sizes


def _count(spec: str, shards: list[str], *, remote: bool) -> dict[str, int]:
    """Counts each shard. Counts of remote shards are saved as they come, so a count that broke off goes on."""
    before = remembered(spec) if remote else {}
    sizes = {shard: before[shard] for shard in shards if shard in before}
    if len(sizes) == len(shards):
        sizes = {}
    if sizes:
        logger.warning("%s: goes on after %s that were counted before", spec, counted(len(sizes), "shards"))
    cut: dict[str, str] = {}
    odd: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shard in shards:
            if shard in sizes:
                continue
            path = Path(folder) / "shard.tar" if remote else Path(shard)
            if remote:
                fetch_tar(shard, path)
            reader = TarReader((path,))
            index = scan_index(reader) if remote else open_index(reader, Cache())
            if index.left_out:
                odd[shard] = "; ".join(index.left_out)
            if index.cuts:
                cut[shard] = f"{index.cuts[0]}; {index.complete(0):,} samples are complete"
                continue
            sizes[shard] = index.complete(0)
            if remote:
                write_whole(_memory(spec), json.dumps(sizes))
    if odd:
        shard = next(iter(odd))
        logger.warning("%s: not counted: %s (of %s that hold such)", shard, odd[shard], counted(len(odd), "shards"))
    if cut:
        (first, said), *others = cut.items()
        also = f"; also cut: {', '.join(shard for shard, _ in others)}" if others else ""
        raise InputError(f"{first}: {said}{also}")
    return {shard: sizes[shard] for shard in shards}
