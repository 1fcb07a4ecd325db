"""``sizes.json``: how many samples each shard of a folder holds, ``{"00000.tar": 9876, …}``.

``python -m cloob.data.shards.sizes FOLDER`` writes it beside local shards. For shards elsewhere,
``python -m cloob.data.shards.sizes 'pipe:…{00000..00331}.tar…'`` fetches each once, counts, and remembers the counts in
the cache folder for whoever gives the same pattern as ``--data``; with ``--out`` it also writes the list, to be put
beside the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import reprlib
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloob.cache import cache_root
from cloob.data.shards.spec import expand, fetch, is_remote, shard_name
from cloob.errors import InputError
from cloob.files import write_whole

SIZES = "sizes.json"
MAX_LIST_BYTES = 16 * 1024**2
MAX_SAMPLES = 10**7
"""In one shard: a sample takes 2 KiB of a tar at least."""
MAX_TOTAL = 10**10

_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_ADDRESS = re.compile(r"[A-Za-z0-9._~/%+=,@!&?:-]{1,2000}")


def parse_sizes(where: str, content: bytes) -> dict[str, int]:
    """The counts in what ``sizes.json`` holds.

    Raises:
        InputError: It is not a JSON object of counts.
    """
    try:
        told = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _distinct(where, pairs))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: nested too deeply{_EXPECTED}") from None
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({str(error)[:200]}){_EXPECTED}") from None
    if not isinstance(told, Mapping):
        raise InputError(f"{where}: found a {type(told).__name__}{_EXPECTED}{_PAIRS}")
    if isinstance(told.get("annotations"), list):
        raise InputError(f"{where}: found annotations in the form of COCO{_EXPECTED}{_PAIRS}")
    for name, count in told.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SAMPLES:
            said = f"{_short(name)} has {_short(count)}"
            raise InputError(f"{where}: {said}, no number of samples from 0 to {MAX_SAMPLES:,}{_EXPECTED}")
    if sum(told.values()) > MAX_TOTAL:
        raise InputError(f"{where}: {sum(told.values()):,} samples together; the limit is {MAX_TOTAL:,}")
    return dict(told)


_EXPECTED = '; a .json is expected to list shards, {"shard.tar": count, …}'
_PAIRS = '; pictures and captions are read from JSON lines (.jsonl), {"filepath": …, "title": …} a line'


def _distinct(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"{where}: names {_short(twice)} twice")
    return found


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"


def read_sizes(path: Path) -> dict[str, int]:
    """The counts in a local file; empty when there is no such file.

    Raises:
        InputError: The file cannot be read, or is no list.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LIST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if len(content) > MAX_LIST_BYTES:
        raise InputError(f"{path}: more than {MAX_LIST_BYTES:,} bytes{_EXPECTED}{_PAIRS}")
    return parse_sizes(str(path), content)


def fetch_sizes(url: str) -> dict[str, int]:
    """The counts in a list elsewhere.

    Raises:
        InputError: It cannot be fetched, or is no list.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        fetch(url, path, max_bytes=MAX_LIST_BYTES)
        return parse_sizes(url, path.read_bytes())


def check_bare(where: str, name: str) -> str:
    """A name in a local list: that of a file beside it.

    Raises:
        InputError: It is anything else.
    """
    if not _BARE.fullmatch(name):
        raise InputError(
            f"{where}: names {_short(name)}; a list on disk may only name files beside itself, by letters, digits, "
            "'.', '_' and '-'; give other shards to --data yourself, as a pattern, and count them by "
            "python -m cloob.data.shards.sizes PATTERN"
        )
    return name


def listed_url(base: str, name: str) -> str:
    """The address of what a list elsewhere names.

    Args:
        base: The list's own address or command, as the user typed it.
        name: The name of a file beside it, or an address of its own scheme and host.

    Raises:
        InputError: It is anything else.
    """
    if _BARE.fullmatch(name):
        head, found, tail = base.rpartition(SIZES)
        if not found:
            raise InputError(f"{base}: {name!r} is a bare file name; only a {SIZES} beside its shards may hold such")
        return f"{head}{name}{tail}"
    host = re.match(r"[A-Za-z0-9+.-]+://[^/?#]+/", base)
    if host and name.startswith(host[0]) and _ADDRESS.fullmatch(name) and ".." not in name.split("/"):
        return name
    own = f" or addresses below {host[0]}" if host else ""
    raise InputError(f"{base}: names {_short(name)}; such a list may only name files beside itself{own}")


def remembered(pattern: str) -> dict[str, int]:
    """What counting the shards of a pattern has remembered on this host, by full address; empty if nothing."""
    return read_sizes(_memory(pattern))


def _memory(pattern: str) -> Path:
    return cache_root() / "sizes" / f"{hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()}.json"


def count_samples(spec: str) -> dict[str, int]:
    """Counts the samples of shards: of a local folder or pattern by file name, of streamed ones by full name.

    Raises:
        InputError: No shards, or one is truncated or cannot be read.
    """
    from cloob.data.open import local_shards
    from cloob.data.shards.index import open_index
    from cloob.data.shards.tar import TarReader

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


def by_name(sizes: Mapping[str, int]) -> dict[str, int]:
    """Counts by file name instead of full address.

    Raises:
        InputError: Two shards have the same file name.
    """
    names = {shard_name(url): count for url, count in sizes.items()}
    if len(names) < len(sizes):
        raise InputError("--out: shards of several folders have the same names; count each folder by itself")
    return names


def main(words: Sequence[str] | None = None) -> int:
    """Counts and writes; exit code 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m cloob.data.shards.sizes", description="Count the samples of shards."
    )
    parser.add_argument("shards", help="folder, pattern, or remote pattern (pipe:…, s3://…)")
    parser.add_argument("--out", type=Path, help="file to write; sizes.json in the folder by default")
    arguments = parser.parse_args(words)
    spec, out = arguments.shards, arguments.out
    if out is None and Path(spec).is_dir():
        out = Path(spec) / SIZES
    remote = is_remote(spec)
    try:
        if out is None and not remote:
            raise InputError("--out is missing: only a folder has its own place for sizes.json")
        sizes = count_samples(spec)
        if remote:
            write_whole(_memory(spec), json.dumps(sizes, indent=1) + "\n")
        if out is not None:
            write_whole(out, json.dumps(by_name(sizes) if remote else sizes, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"cloob.data.shards.sizes: {error}", file=sys.stderr)
        return 2
    print(f"{out or f'--data {spec!r} can be used'}: {len(sizes):,} shards, {sum(sizes.values()):,} samples")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
