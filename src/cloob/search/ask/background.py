"""Whether anything fits: a score beside what unrelated queries reach with the same picture.

A cosine says little by itself: it depends on the model, on the words, and on pictures that are near to everything. So
each hit has a *margin*: with s the query's score and m, d the mean and the standard deviation of what B unrelated
queries score **with that picture**, the margin is (s − m) / d. A hit whose margin is below the cutoff is left out, and
where none is left nothing fits. An unrelated query has the shape of the query: a term of words becomes a line of
``background.txt``, a picture becomes one drawn from the index, the weights stay.

Which statistic and which cutoff: docs/find.md, measured by ``benchmarks/cutoff.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search.ask.query import Query

if TYPE_CHECKING:
    from cloob.search.ask.embedder import Embedder

CUTOFF = 3.0
"""Margin below which a hit is left out unless another cutoff is asked for."""

PICTURE_CUTOFF = 2.0
"""The same for a query of pictures alone."""

DRAWN = 256
"""Pictures of the index that stand for unrelated pictures."""

_LEAST_PICTURES = 20  # fewer have no deviation worth the name
_LEAST_DEVIATION = 1e-3  # of cosines; a model that answers everything alike tells nothing apart

Vectors = npt.NDArray[np.float32]


def background_texts() -> tuple[str, ...]:
    """B unrelated texts, the same for all models."""
    text = resources.files("cloob.search.ask").joinpath("background.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def background_rows(embedder: Callable[[], Embedder], fingerprint: str, cache: Cache | None = None) -> Vectors:
    """The unit rows of the background's texts, kept on the disk for the next process.

    Args:
        embedder: Gives the model where they have to be made.
        fingerprint: Of the model.
        cache: Where they are kept; None: ``Cache()``.

    Returns:
        (B, D).
    """
    cache = cache or Cache()
    texts = background_texts()
    name = hashlib.sha256("\n".join((fingerprint, *texts)).encode()).hexdigest() + ".npy"
    found = cache.find("embeddings", name)
    rows = _read(found.read_bytes(), len(texts)) if found is not None else None
    if rows is None:
        rows = embedder().texts(texts)
        stream = io.BytesIO()
        np.save(stream, rows, allow_pickle=False)
        with contextlib.suppress(InputError):  # the next process makes them again
            cache.put("embeddings", name, stream.getvalue())
    return rows


def unrelated(query: Query, texts: Vectors, pictures: Vectors, seed: int = 0) -> Vectors | None:
    """Unrelated queries of a query's shape.

    Args:
        query: The query.
        texts: (B, D) of the background.
        pictures: (P, D) drawn from the index; no terms of pictures ask for them.
        seed: Of what is drawn for the second term and later ones.

    Returns:
        (B, D) unit rows; None where a term is a picture and too few are there to compare with.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros((len(texts), texts.shape[1]))
    for place, term in enumerate(query.terms):
        pool = texts if term.kind == "words" else pictures
        if term.kind != "words" and len(pictures) < _LEAST_PICTURES:
            return None
        first = place == 0 and term.kind == "words"
        drawn = np.arange(len(texts)) if first else generator.integers(len(pool), size=len(texts))
        total += term.weight * pool[drawn]
    lengths = np.linalg.norm(total, axis=1)
    kept = lengths > 1e-6
    return np.asarray(total[kept] / lengths[kept, None], np.float32)


class Levels(NamedTuple):
    """What unrelated queries reach with each of n pictures.

    Attributes:
        mean: (n,) of their scores.
        deviation: (n,) standard deviation.
    """

    mean: Vectors
    deviation: Vectors

    def margins(self, scores: Vectors) -> Vectors:
        """How far scores stand above them, in standard deviations.

        Args:
            scores: (n,), or (n, C) for C queries.
        """
        mean, deviation = (level if scores.ndim == 1 else level[:, None] for level in self)
        return np.asarray((scores - mean) / deviation, np.float32)


def levels(pictures: Vectors, others: Vectors) -> Levels:
    """What unrelated queries reach.

    Args:
        pictures: (n, D) unit rows.
        others: (B, D) unit rows of unrelated queries.
    """
    reached = pictures @ others.T
    return Levels(reached.mean(1), np.maximum(reached.std(1), _LEAST_DEVIATION))


def default_cutoff(query: Query) -> float:
    """The cutoff of a query: scores of pictures with pictures spread more than those of words do."""
    return CUTOFF if any(term.kind == "words" for term in query.terms) else PICTURE_CUTOFF


def check_cutoff(cutoff: float | None) -> None:
    """Raises InputError for a cutoff that is no number."""
    if cutoff is not None and not np.isfinite(cutoff):
        raise InputError(f"the cutoff is {cutoff}; a number of standard deviations is wanted, such as {CUTOFF:g}")


def _read(content: bytes, rows: int) -> Vectors | None:
    """Rows of a file of the cache; None where it is damaged."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    fits = array.ndim == 2 and len(array) == rows and array.dtype == np.float32 and np.isfinite(array).all()
    return array if fits else None
