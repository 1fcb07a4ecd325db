"""Both towers as programs of torch.export."""

from __future__ import annotations

from pathlib import Path

from cloob.errors import InputError
from cloob.export.exported import Exported
from cloob.models.encoder import DualEncoder


def export_torch(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the programs of both towers into a folder.

    Args:
        encoder: Any.
        folder: An empty folder.

    Raises:
        InputError: The towers cannot be exported.
    """
    raise InputError(f"{encoder.name}: --to torch-export is not there yet")
