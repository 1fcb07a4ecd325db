"""``sizes.json``: how many samples each shard of a folder holds, ``{"00000.tar": 9876, …}``.

``cloob data SHARDS --count`` makes it; the counts of shards elsewhere are remembered in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import tempfile
from pathlib import Path

from cloob.cache import cache_root
from cloob.data.shards.fetch import fetch
from cloob.errors import InputError

SIZES = "sizes.json"

_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_EXPECTED = (
    '; a .json is expected to list shards, {"shard.tar": count, …}; pictures and captions are read from JSON lines '
    '(.jsonl), {"filepath": …, "title": …} a line'
)


def parse_sizes(where: str, content: bytes) -> dict[str, int]:
    """The counts in what ``sizes.json`` holds; InputError unless it is a JSON object of counts."""
    try:
        counts = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({str(error)[:200]}){_EXPECTED}") from None
    if not isinstance(counts, dict):
        raise InputError(f"{where}: found a {type(counts).__name__}{_EXPECTED}")
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise InputError(f"{where}: {name[:80]!r} has {reprlib.repr(count)[:60]}, no number of samples{_EXPECTED}")
    return counts


def read_sizes(path: Path) -> dict[str, int]:
    """The counts in a local file, none without such a file; InputError where it cannot be read or is no list."""
    try:
        return parse_sizes(str(path), path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def fetch_sizes(url: str) -> dict[str, int]:
    """The counts in a list elsewhere; InputError where it cannot be fetched or is no list."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        fetch(url, path)
        return parse_sizes(url, path.read_bytes())


def check_bare(where: str, name: str) -> str:
    """A name in a list: InputError unless it is that of a file beside it."""
    if not _BARE.fullmatch(name):
        raise InputError(
            f"{where}: names {reprlib.repr(name)}; a list may only name files beside itself, by letters, digits, '.', "
            "'_' and '-'; give other shards to --data yourself, as a pattern"
        )
    return name


def listed_url(base: str, name: str) -> str:
    """The address of what a list elsewhere names; ``base`` is its own address or command, as the user typed it."""
    head, found, tail = base.rpartition(SIZES)
    if not found:
        raise InputError(f"{base}: only a {SIZES} beside its shards may list them")
    return f"{head}{check_bare(base, name)}{tail}"


def remembered(pattern: str) -> dict[str, int]:
    """What counting the shards of a pattern has remembered on this host, by full address; empty if nothing."""
    return read_sizes(memory(pattern))


def memory(pattern: str) -> Path:
    """Where the counts of a pattern are remembered."""
    return cache_root() / "sizes" / f"{hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()}.json"


def unfinished(pattern: str) -> Path:
    """Where the counts of a pattern are kept of which some are missing yet; nobody reads pairs by these."""
    return memory(pattern).with_suffix(".unfinished")
