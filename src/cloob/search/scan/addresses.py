"""Which addresses of an index may be fetched from: those that were typed on this machine.

An index names where its pictures are, commands (``pipe:``) among them, and may be somebody else's. So an address that
stands in an index alone is no reason to fetch from it.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from cloob.cache import cache_root
from cloob.errors import InputError


def remember(address: str) -> None:
    """Notes that an address was typed; nothing where the cache folder cannot be written."""
    note = _note(address)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


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
