"""Unrelated queries of a query's shape, and how far above them a score lies.

A margin is (s − m) / d: s is the query's score for a picture, m and d are the mean and
standard deviation of the scores of unrelated queries of the same shape for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search.matrix import Vectors
from cloob.search.models import IndexWithModel
from cloob.search.query import Query

_TEXTS = Path(__file__).with_name("background.txt")
_DRAWN = 256  # pictures of the index that stand for unrelated pictures
_MIN_PICTURES = 20
_MIN_DEVIATION = 1e-3  # of cosines
_MIN_LENGTH = 1e-6  # of a sum of unit rows that has a direction

_REMEMBERED = 64  # shapes

Shape = tuple[tuple[bool, float], ...]  # of each term whether it is words, its weight


def margins(scores: Vectors, pictures: Vectors, unrelated: Vectors) -> Vectors:
    """How many standard deviations scores, (n,) or (n, C), of (n, D) pictures lie above
    those of (B, D) unrelated queries.
    """
    reached = pictures @ unrelated.T
    mean = reached.mean(1)
    deviation = np.maximum(reached.std(1), _MIN_DEVIATION)
    return np.asarray(((scores.T - mean) / deviation).T, np.float32)


def unrelated_rows(index: IndexWithModel, query: Query) -> Vectors | None:
    """(B, D) unit rows of unrelated queries of a query's shape; None if the index has
    too few pictures for it, or a term is a row of whatever it may be.
    """
    if any(isinstance(term.what, np.ndarray) for term in query.terms):
        return None
    shape = tuple((term.is_words, term.weight) for term in query.terms)
    has_pictures = not all(is_words for is_words, _ in shape)
    key = (shape, index.store.revision() if has_pictures else None)
    if key in index.unrelated:
        return index.unrelated[key]
    if len(index.unrelated) >= _REMEMBERED:
        index.unrelated = {}
    rows = index.unrelated[key] = _draw(index, shape)
    return rows


def text_rows(index: IndexWithModel) -> Vectors:
    """(B, D) unit rows of the background's texts; cached on disk."""
    cache = Cache()
    texts = _TEXTS.read_text(encoding="utf-8").splitlines()
    key = "\n".join((index.model().fingerprint, *texts)).encode()
    name = f"{hashlib.sha256(key).hexdigest()}.npy"
    with contextlib.suppress(ValueError, EOFError, OSError):  # damaged: made again
        if (cached := cache.find("embeddings", name)) is not None:
            rows: Vectors = np.load(cached, allow_pickle=False)
            return rows
    rows = index.embedder().texts(texts)
    stream = io.BytesIO()
    np.save(stream, rows, allow_pickle=False)
    with contextlib.suppress(InputError):  # the next process makes them again
        cache.put("embeddings", name, stream.getvalue())
    return rows


def _draw(index: IndexWithModel, shape: Shape) -> Vectors | None:
    """Sums of texts and pictures drawn at random, the same each time; a query of one
    text is each of the texts.
    """
    generator = np.random.default_rng(0)
    pools: dict[bool, Vectors] = {}
    for is_words, _ in shape:
        if is_words not in pools:
            pools[is_words] = text_rows(index) if is_words else _pictures(index)
    if len(pools.get(False, range(_MIN_PICTURES))) < _MIN_PICTURES:
        return None
    count = len(pools.get(True, range(_DRAWN)))
    largest = max(abs(weight) for _, weight in shape)
    total = np.zeros((count, index.model().dim))
    for place, (is_words, weight) in enumerate(shape):
        pool = pools[is_words]
        rows = np.arange(count)
        if place or not is_words:
            rows = generator.integers(len(pool), size=count)
        total += weight / largest * pool[rows]
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    has_direction = lengths[:, 0] > _MIN_LENGTH
    return np.asarray((total / lengths)[has_direction], np.float32)


def _pictures(index: IndexWithModel) -> Vectors:
    ids = np.sort(index.store.ids(limit=_DRAWN, order="chance"))
    return index.store.vectors(np.random.default_rng(0).permutation(ids))
