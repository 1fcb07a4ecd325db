"""Which addresses of an index may be fetched from: those that were typed on this machine.

An index names where its pictures are, commands (``pipe:``) among them, and may be somebody else's. So an address that
stands in an index alone is no reason to fetch from it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from cloob.cache import cache_root
from cloob.errors import InputError

logger = logging.getLogger(__name__)


def remember(address: str) -> None:
    """Notes that an address was typed; where the cache folder cannot be written, says what that costs."""
    note = _note(address)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        logger.warning(
            "%s: %s; so nothing notes that %s was typed here: its pictures will not be fetched by the index alone; "
            "CLOOB_CACHE names another folder",
            note.parent,
            error.strerror,
            address,
        )


def check_typed(address: str) -> None:
    """Refuses an address that was not typed on this machine.

    Raises:
        InputError: It was not, or the cache folder has been deleted since.
    """
    if not _note(address).exists():
        raise InputError(
            f"{address}: stands in the index and was never typed on this machine, so nothing is fetched from it; "
            "if it is yours, type it once: cloob index ADDRESS --out INDEX"
        )


def _note(address: str) -> Path:
    digest = hashlib.sha256(address.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_root() / "addresses" / digest
