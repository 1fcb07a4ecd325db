"""Queries: a weighted sum of words, pictures, and pictures of the index.

The page “Search pictures” has the notation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError
from cloob.pictures import decode

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from cloob.models.encoder import DualEncoder
    from cloob.models.onnx import PlainEncoder
    from cloob.models.text_graph import TextGraph

Vector = npt.NDArray[np.float32]
AnyQuery: TypeAlias = "Query | str | Path | Image | Vector"
Embedder: TypeAlias = (
    # a loaded model; without torch an ONNX folder, or the kept graph of a text tower
    "TorchEmbedder | PlainEncoder | TextGraph"
)

_MIN_LENGTH = 1e-4  # of a sum of unit rows; below it the direction is mostly rounding
_TERM = re.compile(
    r"(?P<sign>[+-]?)(?:(?<=[+-])(?P<weight>\d+\.?\d*|\.\d+):)?(?P<what>.*)", re.DOTALL
)
_PATHS = ("/", "./", "../", "~/", "http://", "https://")


@dataclass(frozen=True)
class Term:
    """One part of a query: words, the id of a picture of the index, or a picture from
    elsewhere: its path, the bytes of its file, opened, or its unit row (D,).
    """

    what: str | int | Path | bytes | Image | Vector
    weight: float = 1.0  # not 0; negative subtracts

    @property
    def is_words(self) -> bool:
        """Whether it is text."""
        return isinstance(self.what, str)


@dataclass(frozen=True)
class Query:
    """Terms whose weighted sum is searched for.

    Example:
        >>> query = Query.parse(["beach", "-0.5:people"])
        >>> [(term.what, term.weight) for term in query.terms]
        [('beach', 1.0), ('people', -0.5)]
    """

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Reads terms as a person writes them on a command line."""
        return cls(tuple(map(_parse_term, words)))

    @classmethod
    def of(cls, what: AnyQuery) -> Query:
        """A query of one term: a string is words as they stand, and never a path."""
        if isinstance(what, Query):
            return what
        return cls((_words(what, 1.0) if isinstance(what, str) else Term(what),))

    @property
    def needs_model(self) -> bool:
        """Whether anything has to be embedded; pictures of the index are already."""
        return not all(isinstance(term.what, int | np.ndarray) for term in self.terms)

    def items(self) -> list[int]:
        """The ids of the pictures of the index in it."""
        return [term.what for term in self.terms if isinstance(term.what, int)]


@dataclass(frozen=True)
class TorchEmbedder:
    """Words and upright pictures to (n, D) unit rows by a loaded model."""

    encoder: DualEncoder

    def texts(self, texts: Sequence[str]) -> Vector:
        """(n, D) of texts."""
        with self._evaluating():
            return _as_numpy(self.encoder.encode_text(list(texts)))

    def pictures(self, images: Sequence[Image]) -> Vector:
        """(n, D) of upright pictures."""
        return self.pixels([self.encoder.preprocess(image) for image in images])

    def pixels(self, pixels: Sequence[torch.Tensor]) -> Vector:
        """(n, D) of what the model's preprocessing made of pictures."""
        import torch

        batch = torch.stack(list(pixels)).to(self.encoder.device)
        with self._evaluating():
            return _as_numpy(self.encoder.encode_image(batch))

    def _evaluating(self) -> AbstractContextManager[None]:
        from cloob.models.encoder import evaluating

        return evaluating(self.encoder)


def _as_numpy(rows: torch.Tensor) -> Vector:
    return np.asarray(rows.float().cpu().numpy())


def weighted_row(weights: Sequence[float], rows: Sequence[Vector]) -> Vector:
    """(D,) float32 unit row: the weighted sum of a query's terms."""
    most = max(map(abs, weights), default=0) or 1.0
    total = np.sum(
        [
            weight / most * row.astype(np.float64)
            for weight, row in zip(weights, rows, strict=True)
        ],
        axis=0,
    )
    length = float(np.linalg.norm(total))
    if not _MIN_LENGTH < length < np.inf:
        raise InputError(
            "the query is empty, or its terms cancel each other; give one of them more"
            " weight"
        )
    return np.asarray(total / length, np.float32)


def picture_of(term: Term) -> Image:
    """The opened picture of a term."""
    from cloob.models.pixels import open_image

    assert not isinstance(term.what, str | int | np.ndarray)
    return decode(term.what) if isinstance(term.what, bytes) else open_image(term.what)


def _parse_term(word: str) -> Term:
    """Reads a term as a person writes it on a command line."""
    match = _TERM.fullmatch(word)
    assert match is not None  # it matches everything
    what = match["what"].strip()
    weight = float(f"{match['sign']}{match['weight'] or 1}")
    path = Path(what).expanduser()
    is_path = what.startswith(_PATHS) or path.suffix.lower() in IMAGE_SUFFIXES
    if what.startswith("words:") or not is_path:
        return _words(what.removeprefix("words:"), weight)
    if not path.is_file():
        raise InputError(
            f"{what}: no such picture; for the words as they stand write words:{what}"
        )
    return Term(path, weight)


def _words(text: str, weight: float) -> Term:
    if not text.strip():
        raise InputError("an empty query; give words, a picture, or --like ID")
    return Term(text.encode("utf-8", "replace").decode(), weight)
