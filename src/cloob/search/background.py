"""Whether anything fits: a score compared with the scores of unrelated queries for the same picture.

A cosine says little by itself: it depends on the model, on the words, and on pictures that are near to everything. So
each hit has a *margin*: with s the query's score and m, d the mean and the standard deviation of the scores of B
unrelated queries **for that picture**, the margin is (s − m) / d. A hit whose margin is below the cutoff is left out,
and if none is left nothing fits. An unrelated query has the shape of the query: a term of words becomes a line of
``background.txt``, a picture becomes one drawn from the index, the weights stay.

docs/find.md says what the cutoff was measured to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.search.query import Embedder, Query
from cloob.search.store import Vectors

CUTOFF = 3.0  # of a query with words
PICTURE_CUTOFF = 2.0  # of a query of pictures alone, whose scores spread more
DRAWN = 256  # pictures of the index that stand for unrelated pictures
_MIN_PICTURES = 20
_MIN_DEVIATION = 1e-3  # of cosines


def background_rows(embedder: Callable[[], Embedder], fingerprint: str) -> Vectors:
    """(B, D) unit rows of the background's texts, by the model of a fingerprint; cached on disk."""
    cache, texts = Cache(), Path(__file__).with_name("background.txt").read_text(encoding="utf-8").splitlines()
    name = hashlib.sha256("\n".join((fingerprint, *texts)).encode()).hexdigest() + ".npy"
    rows: Vectors
    with contextlib.suppress(ValueError, EOFError, OSError):  # a damaged file is made again
        if (cached := cache.find("embeddings", name)) is not None:
            rows = np.load(cached, allow_pickle=False)
            return rows
    rows = embedder().texts(texts)
    np.save(stream := io.BytesIO(), rows, allow_pickle=False)
    with contextlib.suppress(InputError):  # the next process makes them again
        cache.put("embeddings", name, stream.getvalue())
    return rows


def unrelated(query: Query, texts: Callable[[], Vectors], pictures: Callable[[], Vectors]) -> Vectors | None:
    """(B, D) unit rows of unrelated queries of a query's shape.

    They are made of the (B, D) rows of the background's texts and of (P, D) rows drawn from the index. None if a term
    is a picture, and the index has too few to compare with.
    """
    kinds = {term.kind == "words" for term in query.terms}
    pools = {is_words: (texts if is_words else pictures)() for is_words in kinds}
    if False in pools and len(pools[False]) < _MIN_PICTURES:
        return None
    generator, count = np.random.default_rng(0), len(pools[True]) if True in pools else DRAWN
    total, largest = np.zeros(1), max(abs(term.weight) for term in query.terms)
    for place, term in enumerate(query.terms):
        pool = pools[term.kind == "words"]
        drawn = np.arange(count) if place == 0 and term.kind == "words" else generator.integers(len(pool), size=count)
        total = total + term.weight / largest * pool[drawn]
    lengths = np.linalg.norm(total, axis=1)
    kept = lengths > 1e-6
    return np.asarray(total[kept] / lengths[kept, None], np.float32)


def margins(scores: Vectors, pictures: Vectors, others: Vectors) -> Vectors:
    """How many standard deviations scores, (n,) or (n, C), lie above those of (B, D) unrelated queries."""
    reached = pictures @ others.T
    mean, deviation = reached.mean(1), np.maximum(reached.std(1), _MIN_DEVIATION)
    return np.asarray(((scores.T - mean) / deviation).T, np.float32)
