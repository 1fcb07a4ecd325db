"""Queries: a weighted sum of words, pictures, and pictures of the index.

The page “Search pictures” has the notation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cloob.data.source import IMAGE_SUFFIXES
from cloob.errors import InputError
from cloob.pictures import decode

if TYPE_CHECKING:
    from PIL.Image import Image

    from cloob.models.encoder import DualEncoder
    from cloob.models.onnx import PlainEncoder
    from cloob.models.text_graph import TextGraph

Vector = npt.NDArray[np.float32]
Kind = Literal["words", "picture", "item", "image", "file"]
AnyQuery: TypeAlias = "Query | str | Path | Image | Vector"
Embedder: TypeAlias = (
    # a loaded model; without torch an ONNX folder, or the kept graph of a text tower
    "TorchEmbedder | PlainEncoder | TextGraph"
)

_MIN_LENGTH = 1e-4  # of a sum of unit rows; below it the direction is mostly rounding
_TERM = re.compile(
    r"(?P<sign>[+-]?)(?:(?<=[+-])(?P<weight>\d+\.?\d*|\.\d+):)?(?P<what>.*)", re.DOTALL
)


@dataclass(frozen=True)
class Term:
    """One part of a query: words, a picture's path, the id of one of the index, an
    opened picture, or the bytes of a file.
    """

    what: str | Path | int | Image | bytes
    kind: Kind
    weight: float = 1.0  # not 0; negative subtracts


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
        terms = []
        for word in words:
            sign, number, what = _TERM.fullmatch(word).groups()  # type: ignore[union-attr]  # it matches everything
            what, weight = what.strip(), float(f"{sign}{number or 1}")
            is_path = (
                what.startswith(("/", "./", "../", "~/", "http://", "https://"))
                or Path(what).suffix.lower() in IMAGE_SUFFIXES
            )
            if what.startswith("words:") or not is_path:
                terms.append(_words(what.removeprefix("words:"), weight))
            elif Path(what).expanduser().is_file():
                terms.append(Term(Path(what).expanduser(), "picture", weight))
            else:
                raise InputError(
                    f"{what}: no such picture; for the words as they stand write"
                    f" words:{what}"
                )
        return cls(tuple(terms))

    @classmethod
    def of(cls, what: str | Path | Image | Query) -> Query:
        """A query of one term: a string is words as they stand, and never a path."""
        if isinstance(what, Query):
            return what
        if isinstance(what, str):
            return cls((_words(what, 1.0),))
        return cls((Term(what, "picture" if isinstance(what, Path) else "image"),))

    @property
    def needs_model(self) -> bool:
        """Whether anything has to be embedded; pictures of the index are already."""
        return any(term.kind != "item" for term in self.terms)


@dataclass(frozen=True)
class TorchEmbedder:
    """Words and upright pictures to (n, D) unit rows by a loaded model."""

    encoder: DualEncoder

    def texts(self, texts: Sequence[str]) -> Vector:
        return self._rows(self.encoder.encode_text, list(texts))

    def pictures(self, images: Sequence[Image]) -> Vector:
        import torch

        pixels = torch.stack([self.encoder.preprocess(image) for image in images])
        return self._rows(
            self.encoder.encode_image, pixels.to(getattr(self.encoder, "device", "cpu"))
        )

    def _rows(self, encode: Callable[[Any], Any], items: Any) -> Vector:
        from cloob.models.encoder import evaluating

        with evaluating(self.encoder):
            rows: Vector = encode(items).float().cpu().numpy()
        return rows


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

    if isinstance(term.what, bytes):
        return decode(term.what)
    return open_image(term.what)  # type: ignore[arg-type]


def _words(text: str, weight: float) -> Term:
    if not text.strip():
        raise InputError("an empty query; give words, a picture, or --like ID")
    return Term(text.encode("utf-8", "replace").decode(), "words", weight)
