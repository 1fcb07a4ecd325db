"""Both towers as ONNX graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloob.errors import InputError
from cloob.export.exported import Exported
from cloob.models.encoder import DualEncoder


def export_onnx(encoder: DualEncoder, folder: Path, *, int8: bool = False, sets: Sequence[str] = ()) -> Exported:
    """Writes the graphs of both towers into a folder.

    Args:
        encoder: Any.
        folder: An empty folder.
        int8: Whether weights are stored as 8-bit integers.
        sets: Labelled sets to measure the export on beside the model itself.

    Raises:
        InputError: The towers cannot be exported.
    """
    raise InputError(f"{encoder.name}: --to onnx is not there yet")
