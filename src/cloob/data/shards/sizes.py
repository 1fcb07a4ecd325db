"""``sizes.json``: how many samples each shard of a folder holds, ``{"00000.tar": 9876, …}``.

``cloob data SHARDS --count`` makes it; the counts of shards elsewhere are remembered in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.cache import cache_root
from cloob.data.shards.fetch import fetch
from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most

SIZES = "sizes.json"
MAX_LIST_BYTES = 16 * 1024**2
MAX_SAMPLES = 10**7
"""In one shard: a sample takes 2 KiB of a tar at least."""
MAX_TOTAL = 10**10

_BARE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_ADDRESS = re.compile(r"[A-Za-z0-9._~/%+=,@!&?:-]{1,2000}")


def parse_sizes(where: str, content: bytes) -> dict[str, int]:
    """The counts in what ``sizes.json`` holds; InputError unless it is a JSON object of counts."""
    try:
        counts = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: _distinct(where, pairs))
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: nested too deeply{_EXPECTED}") from None
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({str(error)[:200]}){_EXPECTED}") from None
    if not isinstance(counts, Mapping):
        raise InputError(f"{where}: found a {type(counts).__name__}{_EXPECTED}{_PAIRS}")
    if isinstance(counts.get("annotations"), list):
        raise InputError(f"{where}: found annotations in the form of COCO{_EXPECTED}{_PAIRS}")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SAMPLES:
            said = f"{_short(name)} has {_short(count)}"
            raise InputError(f"{where}: {said}, no number of samples from 0 to {MAX_SAMPLES:,}{_EXPECTED}")
    if sum(counts.values()) > MAX_TOTAL:
        raise InputError(f"{where}: {sum(counts.values()):,} samples together; the limit is {MAX_TOTAL:,}")
    return dict(counts)


_EXPECTED = '; a .json is expected to list shards, {"shard.tar": count, …}'
_PAIRS = '; pictures and captions are read from JSON lines (.jsonl), {"filepath": …, "title": …} a line'


def _distinct(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = dict(pairs)
    if len(counts) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"{where}: names {_short(twice)} twice")
    return counts


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a huge number"


def read_sizes(path: Path) -> dict[str, int]:
    """The counts in a local file, none without such a file; InputError where it cannot be read or is no list."""
    try:
        content = read_at_most(path, MAX_LIST_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except TooLarge:
        raise InputError(f"{path}: more than {MAX_LIST_BYTES:,} bytes{_EXPECTED}{_PAIRS}") from None
    return parse_sizes(str(path), content)


def fetch_sizes(url: str) -> dict[str, int]:
    """The counts in a list elsewhere; InputError where it cannot be fetched or is no list."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SIZES
        fetch(url, path, max_bytes=MAX_LIST_BYTES)
        return parse_sizes(url, path.read_bytes())


def check_bare(where: str, name: str) -> str:
    """A name in a local list: InputError unless it is that of a file beside it."""
    if not _BARE.fullmatch(name):
        raise InputError(
            f"{where}: names {_short(name)}; a list on disk may only name files beside itself, by letters, digits, "
            "'.', '_' and '-'; give other shards to --data yourself, as a pattern, and count them by "
            "cloob data PATTERN --count"
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
        head, bare_list, tail = base.rpartition(SIZES)
        if not bare_list:
            raise InputError(f"{base}: {name!r} is a bare file name; only a {SIZES} beside its shards may hold such")
        return f"{head}{name}{tail}"
    host = re.match(r"[A-Za-z0-9+.-]+://[^/?#]+/", base)
    if host and name.startswith(host[0]) and _ADDRESS.fullmatch(name) and ".." not in name.split("/"):
        return name
    below_host = f" or addresses below {host[0]}" if host else ""
    raise InputError(f"{base}: names {_short(name)}; such a list may only name files beside itself{below_host}")


def remembered(pattern: str) -> dict[str, int]:
    """What counting the shards of a pattern has remembered on this host, by full address; empty if nothing."""
    return read_sizes(memory(pattern))


def memory(pattern: str) -> Path:
    """Where the counts of a pattern are remembered."""
    return cache_root() / "sizes" / f"{hashlib.blake2b(pattern.encode(), digest_size=16).hexdigest()}.json"


def unfinished(pattern: str) -> Path:
    """Where the counts of a pattern are kept of which some are missing yet; nobody reads pairs by these."""
    return memory(pattern).with_suffix(".unfinished")


if __name__ == "__main__":
    raise SystemExit("the samples of shards are counted by: cloob data SHARDS --count")
