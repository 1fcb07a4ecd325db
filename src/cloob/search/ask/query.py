"""Queries: words, pictures, addresses and pictures of the index, with weights, and the one unit row that they make.

A query is a weighted sum of unit rows, made a unit row again. On a command line each word is a term:

- ``beach`` adds it, ``+0.5:beach`` adds half of it, ``-people`` and ``-0.3:people`` take it away. A term with ``-``
  comes behind ``--``, where no word is an option: ``"beach" +0.5:photo.jpg -- -people``.
- A term that ends as picture files do (``.jpg`` …) or begins with ``/``, ``./`` or ``../`` is a picture, one that
  begins with ``http://`` or ``https://`` is the address of one, everything else is words. ``words:`` before it makes
  it words.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt

from cloob.data.source import IMAGE_EXTENSIONS
from cloob.errors import InputError
from cloob.files import TooLarge, read_at_most

if TYPE_CHECKING:
    from PIL.Image import Image

    from cloob.search.ask.embedder import Embedder

Vector = npt.NDArray[np.float32]
Kind = Literal["words", "picture", "address", "item", "image"]

MAX_WORDS = 10_000
"""Characters of one term of words."""

MAX_ADDRESS_BYTES = 32 * 1024 * 1024
"""A picture behind an address with more bytes is refused while it is fetched."""

MAX_WEIGHT = 1000.0
_LEAST = 1e-4  # length of a sum of unit rows below which its direction is mostly rounding
_TERM = re.compile(r"(?P<sign>[+-]?)(?:(?<=[+-])(?P<weight>\d+\.?\d*|\.\d+):)?(?P<what>.*)", re.DOTALL)
_UNSIGNED = re.compile(r"(\d+\.?\d*|\.\d+):[^\s\d]")  # as rclip has weights; 16:9 is words
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Term:
    """One part of a query.

    Attributes:
        what: Words, a picture's path or address, the id of a picture of the index, or an opened picture.
        kind: Which of them.
        weight: Not 0; negative takes away.
    """

    what: str | Path | int | Image
    kind: Kind
    weight: float = 1.0


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
        """Reads terms as a person writes them on a command line; files are looked for, addresses not opened.

        Raises:
            InputError: A term is empty, a weight is 0 or too large, a picture is not there, or an address is neither
                http nor https.
        """
        return cls(tuple(_read_term(word) for word in words))

    @classmethod
    def of(cls, what: str | Path | Image | Query) -> Query:
        """One thing as a query: a string is words as they stand, and never a path or an address."""
        if isinstance(what, Query):
            return what
        if isinstance(what, str):
            return cls((Term(_checked_words(what), "words"),))
        return cls((Term(what, "picture" if isinstance(what, Path) else "image"),))

    @property
    def needs_model(self) -> bool:
        """Whether anything has to be embedded: pictures of the index are already."""
        return any(term.kind != "item" for term in self.terms)


def embed_query(query: Query, embedder: Embedder | None, vector_of: Callable[[int], Vector] | None = None) -> Vector:
    """The unit row of a query.

    Args:
        query: At least one term.
        embedder: The model; None where nothing has to be embedded.
        vector_of: Gives the unit row of a picture of the index, by id.

    Returns:
        (D,) float32.

    Raises:
        InputError: No terms, a picture that cannot be read or fetched, or terms that cancel each other.
    """
    if not query.terms:
        raise InputError("an empty query; give words, a picture, or --like ID")
    rows = _embed_terms(query, embedder, vector_of)
    return weighted_sum([term.weight for term in query.terms], rows)


def weighted_sum(weights: Sequence[float], rows: Sequence[npt.NDArray[np.floating]]) -> Vector:
    """The unit row (D,) of a query from its terms' weights and rows.

    Raises:
        InputError: The rows differ in width or are not finite, or the terms cancel each other.
    """
    if len(widths := sorted({row.shape[-1] for row in rows})) > 1:
        raise InputError(f"vectors of widths {widths[0]} and {widths[1]}: the model is not the one of the index")
    total = np.sum([weight * row.astype(np.float64) for weight, row in zip(weights, rows, strict=True)], axis=0)
    length = float(np.linalg.norm(total))
    if not np.isfinite(length):
        raise InputError("the query's embedding is not finite; the model cannot embed it")
    if length <= _LEAST * max(map(abs, weights)):
        raise InputError("the terms of the query cancel each other; give one of them more weight")
    return np.asarray(total / length, np.float32)


def _embed_terms(
    query: Query, embedder: Embedder | None, vector_of: Callable[[int], Vector] | None
) -> list[npt.NDArray[np.float64]]:
    """A unit row a term; all words go through the model at once, and all pictures."""
    rows: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(query.terms)
    words = [place for place, term in enumerate(query.terms) if term.kind == "words"]
    items = [place for place, term in enumerate(query.terms) if term.kind == "item"]
    pictures = [place for place in range(len(query.terms)) if place not in (*words, *items)]
    for place in items:
        assert vector_of is not None
        rows[place] = np.asarray(vector_of(int(query.terms[place].what)), np.float64)  # type: ignore[arg-type]
    if words:
        assert embedder is not None
        for place, row in zip(words, embedder.texts([str(query.terms[place].what) for place in words]), strict=True):
            rows[place] = row.astype(np.float64)
    if pictures:
        assert embedder is not None
        shown = embedder.pictures([_picture(query.terms[place]) for place in pictures])
        for place, row in zip(pictures, shown, strict=True):
            rows[place] = row.astype(np.float64)
    return rows


def _picture(term: Term) -> Image:
    """The upright picture of a term."""
    from cloob.pictures import Unreadable, decode, read_file, upright  # Pillow

    name = str(term.what) if term.kind in ("picture", "address") else "the picture"
    try:
        if term.kind == "picture":
            return decode(read_file(str(term.what)))
        if term.kind == "address":
            return decode(_fetched(str(term.what)))
        return upright(term.what)  # type: ignore[arg-type]
    except Unreadable as error:
        raise InputError(f"{name}: {error.reason} ({error.detail})") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{name}: cannot be read ({said})") from None


def _fetched(address: str) -> bytes:
    """What an address gives; redirections to other schemes than http and https are refused where they occur."""
    from cloob.data.shards.fetch import fetch  # fsspec

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
    scheme = _SCHEME.match(what)
    if scheme:
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
