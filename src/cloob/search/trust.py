"""What an index may name: addresses, patterns of files and models that were typed on this machine.

An index names where its pictures are, commands (``pipe:``) among them, and models, and may be somebody else's. So an
address or a model that stands in an index alone is no reason to fetch it, and a pattern none to look through the disk.
Notes are of the typed words and not of the index: a merge brings in what another index names.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.cache import cache_root
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import Source

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder

logger = logging.getLogger(__name__)


def remember(typed: str, *, quiet: bool = False) -> None:
    """Notes that an address, a pattern or a model was typed; ``quiet`` where the cache cannot be written."""
    note = _note(typed)
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
            typed,
        )


def was_typed(named: str) -> bool:
    """Whether it was, and the cache folder has not been deleted since."""
    return _note(named).exists()


def check_typed(address: str) -> None:
    """Raises InputError for an address or a pattern that was not typed on this machine."""
    if not was_typed(address):
        done, kind = ("fetched from it", "ADDRESS") if is_remote(address) else ("looked for by it", "'PATTERN'")
        raise InputError(
            f"{address}: stands in the index and was never typed on this machine, so nothing is {done}; "
            f"if it is yours, type it once: cloob index {kind} --out INDEX"
        )


def absolute(spec: str) -> str:
    """A path that is found from anywhere, of a run with the checkpoint that it stands for; other names as they are."""
    spec = with_checkpoint(spec)
    local = spec.removeprefix("local-dir:")
    path = Path(local).expanduser()
    there = Path(split_checkpoint(str(path))[0]).exists()
    return f"{spec[: len(spec) - len(local)]}{path.absolute()}" if there else spec


def remember_model(spec: str) -> None:
    """Notes that a model was typed: of the hub, or a folder, which may name encoders of the hub."""
    if not Source.parse(spec).is_public:
        remember(spec, quiet=not spec.startswith("hf-hub:"))  # few folders need the note


def load_named(spec: str, device: str | torch.device) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model; see :func:`cloob.models.fingerprint.load_with_fingerprint`.

    A name of a fixed list (open_clip's NAME/TAG, a public checkpoint) is fetched from where that list says.

    Raises:
        InputError: As there; or it, or what its folder names, would have to be fetched and was never typed here.
    """
    from cloob.models import fingerprint  # torch
    from cloob.models.hub import closed_hub  # likewise

    if was_typed(spec) or Source.parse(spec).is_public:
        return fingerprint.load_with_fingerprint(spec, device)
    with closed_hub(
        f"the index alone asks for it, so it is not fetched; if you trust it, type it once: --model {spec}"
    ):
        return fingerprint.load_with_fingerprint(spec, device)


def _note(typed: str) -> Path:
    digest = hashlib.sha256(typed.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_root() / "addresses" / digest
