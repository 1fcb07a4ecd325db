"""A map of pictures: their rows in two dimensions, the same for the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.search.ask.find import read_filter
from cloob.search.store import Ids, Vectors
from cloob.search.where import Filter

if TYPE_CHECKING:
    from cloob.search.index import Index

Method = Literal["pca", "tsne"]
SAMPLE = 5000
"""Pictures on a map unless more are asked for; t-SNE takes some ten seconds for so many on one core."""

_COMPONENTS = 50  # t-SNE starts from so many principal components, as its authors advise
_PERPLEXITY = 30.0


def sample(ids: Ids, most: int, seed: int = 0) -> Ids:
    """At most so many of some ids, drawn without order and returned ascending; the same for the same ids."""
    if most < 1:
        raise InputError(f"a map of {most} pictures; 1 or more is wanted")
    if len(ids) <= most:
        return ids
    return np.sort(np.random.default_rng(seed).choice(ids, most, replace=False))


def map_of(
    index: Index, most: int | None, method: Method, where: str | Filter | None, model: str | None
) -> tuple[Ids, Vectors]:
    """Ids and places of a sample of an index's pictures, see :meth:`cloob.search.index.Index.map`."""
    asked = index.model(model)
    ids = sample(index.store.ids(read_filter(index, where)), SAMPLE if most is None else most)
    rows = index.store.vectors(asked.name, ids.tolist())
    there = np.isfinite(rows).all(1)
    return ids[there], layout(rows[there], method)


def layout(rows: Vectors, method: Method = "pca") -> Vectors:
    """Places of pictures on a map.

    Args:
        rows: (n, D) unit rows.
        method: ``"pca"``: the two directions of largest variance, in no time. ``"tsne"``: neighbours stay neighbours,
            distances between groups mean nothing (scikit-learn).

    Returns:
        (n, 2) float32 in [0, 1], each axis from end to end; all 0.5 where there is nothing to spread.

    Raises:
        InputError: Another method.
    """
    if method not in ("pca", "tsne"):
        raise InputError(f"a map by {method!r}; pca or tsne is wanted")
    if len(rows) < 2:
        return np.full((len(rows), 2), 0.5, np.float32)
    components = _principal(rows.astype(np.float64), _COMPONENTS if method == "tsne" else 2)
    places = _tsne(components) if method == "tsne" and len(rows) > 3 else components[:, :2]
    low, high = places.min(0), places.max(0)
    spread = np.where(high - low > 1e-9, high - low, 1.0)
    return np.asarray(np.where(high - low > 1e-9, (places - low) / spread, 0.5), np.float32)


def _principal(rows: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """(n, count) principal components; each points to where its largest loading is positive."""
    centred = rows - rows.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    chosen = directions[:, ::-1][:, :count]
    largest = np.abs(chosen).argmax(0)
    signs = np.sign(chosen[largest, np.arange(chosen.shape[1])])
    components: npt.NDArray[np.float64] = centred @ (chosen * np.where(signs == 0, 1, signs))
    if components.shape[1] < 2:  # rows of one number
        components = np.concatenate([components, np.zeros_like(components)], axis=1)
    return components


def _tsne(components: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    manifold = require("sklearn.manifold", "train")
    start = components[:, :2]
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4  # scikit-learn's scale for its own start
    perplexity = min(_PERPLEXITY, (len(components) - 1) / 3)
    tsne = manifold.TSNE(init=start.astype(np.float32), perplexity=perplexity, random_state=0, n_jobs=1)
    with require("threadpoolctl", "train").threadpool_limits(1):  # sums in one order
        places: npt.NDArray[np.float64] = tsne.fit_transform(components.astype(np.float32)).astype(np.float64)
    return places
