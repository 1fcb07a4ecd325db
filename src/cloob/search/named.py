"""The models that an index names: nothing is fetched for one that was never typed on this machine.

A name of a fixed list (open_clip's NAME/TAG, a public checkpoint) is fetched from where that list says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import is_public
from cloob.search.scan.addresses import remember, was_typed

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder


def absolute(spec: str) -> str:
    """A path that is found from anywhere, of a run with the checkpoint that it stands for; other names as they are."""
    spec = with_checkpoint(spec)
    local = spec.removeprefix("local-dir:")
    path = Path(local).expanduser()
    there = Path(split_checkpoint(str(path))[0]).exists()
    return f"{spec[: len(spec) - len(local)]}{path.absolute()}" if there else spec


def remember_model(spec: str) -> None:
    """Notes that a model was typed: of the hub, or a folder, which may name encoders of the hub."""
    if not is_public(spec):
        remember(spec, quiet=not spec.startswith("hf-hub:"))  # few folders need the note


def load_named(spec: str, device: str | torch.device) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model; see :func:`cloob.models.fingerprint.load_with_fingerprint`.

    Raises:
        InputError: As there; or it, or what its folder names, would have to be fetched and was never typed here.
    """
    from cloob.models import fingerprint  # torch
    from cloob.models.hub import closed_hub  # likewise

    if was_typed(spec) or is_public(spec):
        return fingerprint.load_with_fingerprint(spec, device)
    with closed_hub(
        f"the index alone asks for it, so it is not fetched; if you trust it, type it once: --model {spec}"
    ):
        return fingerprint.load_with_fingerprint(spec, device)
