"""``sizes.json``: how many samples each shard of a folder holds, ``{"00000.tar": 9876, …}``.

``python -m cloob.data.sizes FOLDER`` writes it beside local shards. For shards elsewhere,
``python -m cloob.data.sizes 'pipe:…{00000..00331}.tar…' --out sizes.json`` fetches each once and counts; the file
that it writes names the shards in full and can itself be given as ``--data``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloob.errors import InputError

SIZES = "sizes.json"


def parse_sizes(where: str, told: Any) -> dict[str, int]:
    """The counts in what ``sizes.json`` holds.

    Raises:
        InputError: It is not an object of counts.
    """
    if not isinstance(told, Mapping):
        raise InputError(f'{where}: expected {{"shard.tar": count, …}}, found a {type(told).__name__}')
    wrong = next((k for k, v in told.items() if isinstance(v, bool) or not isinstance(v, int) or v < 0), None)
    if wrong is not None:
        raise InputError(f"{where}: {wrong!r} has {told[wrong]!r}; expected a number of samples")
    return dict(told)


def read_sizes(path: Path) -> dict[str, int]:
    """The counts in a local file; empty when there is no such file.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return parse_sizes(str(path), told)


def count_samples(spec: str) -> dict[str, int]:
    """Counts the samples of shards: of a local folder or pattern by file name, of streamed ones by full name.

    Raises:
        InputError: No shards, or one is truncated or cannot be read.
    """
    from cloob.data.opener import expand, fetch, is_remote
    from cloob.data.shardindex import open_index
    from cloob.data.sources import local_shards
    from cloob.data.tarindex import TarReader

    sizes: dict[str, int] = {}
    remote = is_remote(spec)
    with tempfile.TemporaryDirectory() as folder:
        for item in expand(spec, escape=False) if remote else local_shards(spec):
            path = Path(item)
            if remote:
                path = Path(folder) / "shard.tar"
                fetch(str(item), path)
            index = open_index(TarReader((path,)))
            if index.cuts:
                raise InputError(f"{item}: {index.cuts[0]}; {index.complete(0):,} samples are complete")
            sizes[str(item) if remote else path.name] = index.complete(0)
    return sizes


def main(words: Sequence[str] | None = None) -> int:
    """Counts and writes; exit code 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m cloob.data.sizes", description="Count the samples of shards.")
    parser.add_argument("shards", help="folder, pattern, or remote pattern (pipe:…, s3://…)")
    parser.add_argument("--out", type=Path, help="file to write; sizes.json in the folder by default")
    arguments = parser.parse_args(words)
    folder = Path(arguments.shards)
    out = arguments.out or (folder / SIZES if folder.is_dir() else None)
    try:
        if out is None:
            raise InputError("--out is missing: only a folder has its own place for sizes.json")
        sizes = count_samples(arguments.shards)
        out.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"cloob.data.sizes: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(sizes):,} shards, {sum(sizes.values()):,} samples")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
