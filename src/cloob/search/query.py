"""Queries: a weighted sum of words, pictures, addresses and pictures of the index; docs/find.md has the notation."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cloob.data.source import IMAGE_EXTENSIONS
from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most

if TYPE_CHECKING:
    from PIL.Image import Image

    from cloob.models.encoding import Encoder

Vector = npt.NDArray[np.float32]
Kind = Literal["words", "picture", "address", "item", "image"]
AnyQuery: TypeAlias = "Query | str | Path | Image | Vector"

MAX_WORDS = 10_000
"""Characters of one term of words."""

MAX_ADDRESS_BYTES = 32 * 1024 * 1024
"""Size of a picture that is fetched from an address."""

MAX_WEIGHT = 1000.0
_MIN_LENGTH = 1e-4  # of a sum of unit rows; below it the direction is mostly rounding
_TERM = re.compile(r"(?P<sign>[+-]?)(?:(?<=[+-])(?P<weight>\d+\.?\d*|\.\d+):)?(?P<what>.*)", re.DOTALL)
_UNSIGNED = re.compile(r"(\d+\.?\d*|\.\d+):[^\s\d]")  # as rclip has weights; 16:9 is words
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Term:
    """One part of a query: words, a picture's path or address, the id of one of the index, or an opened picture."""

    what: str | Path | int | Image
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
        """Reads terms as a person writes them on a command line; no address is opened."""
        return cls(tuple(map(_read_term, words)))

    @classmethod
    def of(cls, what: str | Path | Image | Query) -> Query:
        """A query of one term: a string is words as they stand, and never a path or an address."""
        if isinstance(what, Query):
            return what
        if isinstance(what, str):
            return cls((Term(_checked_words(what), "words"),))
        return cls((Term(what, "picture" if isinstance(what, Path) else "image"),))

    @property
    def needs_model(self) -> bool:
        """Whether anything has to be embedded; pictures of the index are already."""
        return any(term.kind != "item" for term in self.terms)


class Embedder(Protocol):
    """Words and upright pictures to (n, D) unit rows: a model of the index, or an ONNX folder without torch."""

    def texts(self, texts: Sequence[str], /) -> Vector: ...

    def pictures(self, images: Sequence[Image], /) -> Vector: ...


class TorchEmbedder:
    """A loaded model as an :class:`Embedder`."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def texts(self, texts: Sequence[str]) -> Vector:
        return self._rows(lambda: self._encoder.encode_text(list(texts)))

    def pictures(self, images: Sequence[Image]) -> Vector:
        import torch

        pixels = torch.stack([self._encoder.preprocess(image) for image in images])
        return self._rows(lambda: self._encoder.encode_image(pixels.to(getattr(self._encoder, "device", "cpu"))))

    def _rows(self, encode: Callable[[], Any]) -> Vector:
        from cloob.models.encoding import evaluating  # torch

        with evaluating(self._encoder):
            rows: Vector = encode().float().cpu().numpy()
        return rows


def embed_query(query: Query, embedder: Callable[[], Embedder], row_of_item: Callable[[int], Vector]) -> Vector:
    """The unit row (D,) of a query; ``embedder`` is called only if something has to be embedded."""
    if not query.terms:
        raise InputError("an empty query; give words, a picture, or --like ID")
    terms = query.terms
    rows: dict[int, Vector] = {}
    words = [place for place, term in enumerate(terms) if term.kind == "words"]
    pictures = [place for place, term in enumerate(terms) if term.kind in ("picture", "address", "image")]
    if words:
        rows |= zip(words, embedder().texts([str(terms[place].what) for place in words]), strict=True)
    if pictures:
        rows |= zip(pictures, embedder().pictures([_picture(terms[place]) for place in pictures]), strict=True)
    rows |= {place: row_of_item(term.what) for place, term in enumerate(terms) if isinstance(term.what, int)}
    return weighted_row([term.weight for term in terms], [rows[place] for place in range(len(terms))])


def weighted_row(weights: Sequence[float], rows: Sequence[Vector]) -> Vector:
    """The unit row (D,) of a query from its terms' weights and rows."""
    total = np.sum([weight * row.astype(np.float64) for weight, row in zip(weights, rows, strict=True)], axis=0)
    length = float(np.linalg.norm(total))
    if not np.isfinite(length):
        raise InputError("the query's embedding is not finite; the model cannot embed it")
    if length <= _MIN_LENGTH * max(map(abs, weights)):
        raise InputError("the terms of the query cancel each other; give one of them more weight")
    return np.asarray(total / length, np.float32)


def _picture(term: Term) -> Image:
    from cloob.pictures import Unreadable, decode, read_file, upright  # Pillow

    name = "the picture" if term.kind == "image" else str(term.what)
    try:
        if term.kind == "image":
            return upright(term.what)  # type: ignore[arg-type]
        return decode(read_file(name) if term.kind == "picture" else _fetched(name))
    except Unreadable as error:
        raise InputError(f"{name}: {error.reason} ({error.detail})") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None


def _fetched(address: str) -> bytes:
    from cloob.data.shards.remote import fetch  # fsspec; it follows redirections to http and https alone

    with tempfile.TemporaryDirectory(prefix="cloob-") as folder:
        target = Path(folder) / "picture"
        fetch(address, target)
        try:
            return read_at_most(target, MAX_ADDRESS_BYTES)
        except TooLarge as error:
            raise InputError(f"{address}: has {error.size:,} bytes; at most {MAX_ADDRESS_BYTES:,} are read") from None


def _read_term(word: str) -> Term:
    match = _TERM.fullmatch(word)
    assert match is not None
    weight = float(match["weight"] or 1)
    if not 0 < weight <= MAX_WEIGHT:
        raise InputError(f"{word}: the weight is {weight:g}; above 0 and at most {MAX_WEIGHT:g} is wanted")
    weight = -weight if match["sign"] == "-" else weight
    what = match["what"].strip()
    if _UNSIGNED.match(what):
        raise InputError(f"{word}: a weight needs its sign, +{what}; for the words as they stand write words:{what}")
    if not what:
        raise InputError(f"{word!r}: a term without words; quote several words of one term")
    if what.startswith("words:"):
        return Term(_checked_words(what.removeprefix("words:")), "words", weight)
    if scheme := _SCHEME.match(what):
        if scheme[1].lower() not in ("http", "https"):
            raise InputError(f"{what}: {scheme[1]}:// is not opened; http://, https:// or a local file is wanted")
        return Term(what, "address", weight)
    named = Path(what).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
    if named or what.startswith(("/", "./", "../", "~/")):
        path = Path(what).expanduser()
        if not path.is_file():
            raise InputError(f"{what}: no such picture; for the words as they stand write words:{what}")
        return Term(path, "picture", weight)
    return Term(_checked_words(what), "words", weight)


def _checked_words(text: str) -> str:
    if not text.strip():
        raise InputError("an empty query; give words, a picture, or --like ID")
    if len(text) > MAX_WORDS:
        raise InputError(f"the query has {len(text):,} characters; at most {MAX_WORDS:,} are read")
    return text.encode("utf-8", "replace").decode()
