"""An ONNX folder by onnxruntime and NumPy alone: it answers a query while torch would still be imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cloob.models.onnx.contents import Contents, read_contents
from cloob.models.onnx.pixels import ShortestTransform
from cloob.models.onnx.reading import Tokenizer, read_tokenizer
from cloob.models.onnx.session import Rows
from cloob.models.runs import ONNX_FILE, config_file
from cloob.models.untrusted import check_folder, read_json

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
        self._transform = ShortestTransform(contents.preprocess_cfg)

    @classmethod
    def open(cls, source: str) -> Self | None:
        """The encoder of a model folder, whose graphs are opened when they are first used.

        Args:
            source: What ``cloob.load_model`` takes.

        Returns:
            None where it is no ONNX folder, or one whose pictures go through another transform of open_clip's.

        Raises:
            InputError: A file is missing, damaged, not to be trusted or does not fit the others.
        """
        folder = Path(source.removeprefix("local-dir:"))
        file = config_file(folder)
        if file.name != ONNX_FILE:
            return None
        check_folder(folder)
        contents = read_contents(folder, read_json(file))
        if not ShortestTransform.suits(contents.preprocess_cfg):
            return None
        return cls(contents, read_tokenizer(folder, contents.tokenizer, contents.context_length))

    def texts(self, texts: Sequence[str]) -> Rows:
        """Embeds n texts, at least one."""
        return _unit_rows(self._contents.texts(self._tokenizer.ids(list(texts))))

    def pictures(self, images: Sequence[Image]) -> Rows:
        """Embeds n pictures, at least one."""
        pixels = np.stack([self._transform.array(image) for image in images]).astype(np.float32) / np.float32(255)
        mean, std = (_by_channel(self._contents.preprocess_cfg[key]) for key in ("mean", "std"))
        return _unit_rows(self._contents.images((pixels - mean) / std))


def _by_channel(values: Any) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)[:, None, None]


def _unit_rows(rows: Rows) -> Rows:
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    unit: Rows = rows / lengths
    return unit
