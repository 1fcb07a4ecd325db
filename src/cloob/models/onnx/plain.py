"""An ONNX folder by onnxruntime and NumPy alone: it answers a query while torch would still be imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from cloob.models.onnx.contents import Contents, read_contents
from cloob.models.onnx.session import Rows
from cloob.models.onnx.tokens import Tokenizer, read_tokenizer
from cloob.models.runs import ONNX_FILE, config_file

if TYPE_CHECKING:
    from PIL.Image import Image


class PlainEncoder:
    """Pictures and texts to (n, D) unit rows of NumPy: the rows of ``cloob.load_model`` without torch.

    Attributes:
        fingerprint: As that of the loaded encoder.
    """

    def __init__(self, contents: Contents, tokenizer: Tokenizer) -> None:
        self.fingerprint = contents.fingerprint
        self._contents, self._tokenizer = contents, tokenizer

    @classmethod
    def open(cls, source: str) -> Self | None:
        """The encoder of a model folder, whose graphs are opened when they are first used.

        Args:
            source: What ``cloob.load_model`` takes.

        Returns:
            None where it is no ONNX folder.

        Raises:
            InputError: A file is missing, damaged or does not fit the others.
        """
        folder = Path(source.removeprefix("local-dir:"))
        if config_file(folder).name != ONNX_FILE:
            return None
        contents = read_contents(folder)
        return cls(contents, read_tokenizer(folder, contents.tokenizer, contents.context_length))

    def texts(self, texts: Sequence[str]) -> Rows:
        """Embeds n texts, at least one."""
        return _unit_rows(self._contents.texts(self._tokenizer.ids(list(texts))))

    def pictures(self, images: Sequence[Image]) -> Rows:
        """Embeds n pictures, at least one."""
        pixels = np.stack([self._contents.transform.array(image) for image in images]).astype(np.float32)
        contents = self._contents
        return _unit_rows(contents.images((pixels / np.float32(255) - contents.mean) / contents.std))


def _unit_rows(rows: Rows) -> Rows:
    unit: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return unit
