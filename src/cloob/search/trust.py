"""What an index may name: addresses, patterns of files and models that were typed on this machine.

An index names where its pictures are, commands (``pipe:``) among them, and models, and may be somebody else's. So an
address or a model that stands in an index alone is no reason to fetch it, and a pattern none to look through the disk.
Notes are of the typed words and not of the index: a merge brings in what another index names.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.cache import cache_root
from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import Source

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder


def remember(typed: str) -> None:
    """Notes that an address, a pattern or a model was typed; where the cache cannot be written, it is typed again."""
    with contextlib.suppress(OSError):
        _note(typed).parent.mkdir(parents=True, exist_ok=True)
        _note(typed).touch()


def was_typed(named: str) -> bool:
    return _note(named).exists()


def absolute(spec: str) -> str:
    """A path that is found from anywhere, of a run with the checkpoint that it stands for; other names as they are."""
    spec = with_checkpoint(spec)
    local = spec.removeprefix("local-dir:")
    path = Path(local).expanduser()
    there = Path(split_checkpoint(str(path))[0]).exists()
    return f"{spec[: len(spec) - len(local)]}{path.absolute()}" if there else spec


def load_named(spec: str, device: str | torch.device) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model; nothing is fetched for it but what a fixed list names or was typed."""
    from cloob.models.importing import closed_hub
    from cloob.models.load import load_with_fingerprint  # torch

    if was_typed(spec) or Source.parse(spec).is_public:
        return load_with_fingerprint(spec, device)
    with closed_hub(
        f"the index alone asks for it, so it is not fetched; if you trust it, type it once: --model {spec}"
    ):
        return load_with_fingerprint(spec, device)


def _note(typed: str) -> Path:
    return cache_root() / "addresses" / hashlib.sha256(typed.encode("utf-8", "surrogatepass")).hexdigest()
