"""What an index names and may be used: addresses, patterns of files and models that were typed on this machine.

An index names where its pictures are, commands (``pipe:``) among them, and may be somebody else's. So an address that
stands in an index alone is no reason to fetch from it, and a pattern none to look through the disk.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from cloob.cache import cache_root
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError

logger = logging.getLogger(__name__)


def remember(address: str, *, quiet: bool = False) -> None:
    """Notes that an address, a pattern or a model was typed.

    Args:
        address: What was typed.
        quiet: Whether nothing is said of what it costs where the cache folder cannot be written.
    """
    note = _note(address)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        logger.log(
            logging.DEBUG if quiet else logging.WARNING,
            "%s: %s; so nothing notes that %s was typed here, and the index alone will not use it; "
            "CLOOB_CACHE names another folder",
            note.parent,
            error.strerror,
            address,
        )


def was_typed(address: str) -> bool:
    """Whether it was, and the cache folder has not been deleted since."""
    return _note(address).exists()


def check_typed(address: str) -> None:
    """Refuses an address or a pattern that was not typed on this machine.

    Raises:
        InputError: It was not, or the cache folder has been deleted since.
    """
    if not was_typed(address):
        done, kind = ("fetched from it", "ADDRESS") if is_remote(address) else ("looked for by it", "'PATTERN'")
        raise InputError(
            f"{address}: stands in the index and was never typed on this machine, so nothing is {done}; "
            f"if it is yours, type it once: cloob index {kind} --out INDEX"
        )


def _note(address: str) -> Path:
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_root() / "addresses" / digest
