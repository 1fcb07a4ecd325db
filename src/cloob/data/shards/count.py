"""Counts how many samples each shard holds."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cloob.cache import Cache
from cloob.data.shards.fetch import fetch
from cloob.data.shards.index import open_index
from cloob.data.shards.paths import local_shards
from cloob.data.shards.sizes import SIZES, memory
from cloob.data.shards.spec import expand, is_remote, local_path, shard_name
from cloob.data.shards.tar import TarReader
from cloob.errors import InputError
from cloob.files import write_whole


def count_samples(spec: str) -> dict[str, int]:
    """Counts the samples of shards: of a local folder or pattern by file name, of streamed ones by full name.

    Raises:
        InputError: No shards, or one is truncated or cannot be read.
    """
    sizes: dict[str, int] = {}
    remote = is_remote(spec)
    with tempfile.TemporaryDirectory() as folder:
        for item in expand(spec, escape=False) if remote else local_shards(spec):
            path = Path(item)
            if remote:
                path = Path(folder) / "shard.tar"
                fetch(str(item), path)
            index = open_index(TarReader((path,)), Cache())
            if index.cuts:
                raise InputError(f"{item}: {index.cuts[0]}; {index.complete(0):,} samples are complete")
            sizes[str(item) if remote else path.name] = index.complete(0)
    return sizes


def write_counts(spec: str, out: Path | None) -> tuple[Path | None, dict[str, int]]:
    """Counts the samples of shards, and writes or remembers the counts.

    Args:
        spec: A folder, a path or a pattern of tars, here or elsewhere.
        out: The list to write; None: ``sizes.json`` in the folder, and for shards elsewhere none. The counts of those
            are remembered in any case, for whoever gives the same pattern as ``--data``.

    Returns:
        The list that was written, and the counts.

    Raises:
        InputError: As ``count_samples``, or nowhere to write.
    """
    remote = is_remote(spec)
    if not remote and out is None:
        folder = Path(local_path(spec))
        if not folder.is_dir():
            raise InputError("--out is missing: only a folder has its own place for sizes.json")
        out = folder / SIZES
    sizes = count_samples(spec)
    if remote:
        write_whole(memory(spec), json.dumps(sizes, indent=1) + "\n")
    if out is not None:
        write_whole(out, json.dumps(_by_name(sizes) if remote else sizes, indent=1) + "\n")
    return out, sizes


def _by_name(sizes: Mapping[str, int]) -> dict[str, int]:
    """Counts by file name instead of full address."""
    names = {shard_name(url): count for url, count in sizes.items()}
    if len(names) < len(sizes):
        raise InputError("--out: shards of several folders have the same names; count each folder by itself")
    return names
