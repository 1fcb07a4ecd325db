"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and for sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from cloob.errors import InputError
from cloob.export.exported import Exported
from cloob.models.encoder import DualEncoder


def export_transformers(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the files of transformers and of sentence-transformers into a folder.

    Args:
        encoder: With open_clip's own ViT and causal text tower.
        folder: An empty folder.

    Raises:
        InputError: transformers has no such towers; the line names what to export to instead.
    """
    raise InputError(f"{encoder.name}: --to transformers is not there yet")
