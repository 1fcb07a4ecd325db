"""A map of pictures: their rows in two dimensions, the same for the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.search.records import IndexedModel
from cloob.search.store import Ids, Store, Vectors
from cloob.search.where import Filter

Method = Literal["pca", "tsne"]

SAMPLE = 5000
"""Pictures on a map by default; t-SNE takes some ten seconds for so many on one core."""

_COMPONENTS = 50  # principal components that t-SNE starts from, as its authors advise
_PERPLEXITY = 30.0


def map_of(
    store: Store, most: int | None, method: Method, condition: Filter | None, model: IndexedModel
) -> tuple[Ids, Vectors]:
    """See :meth:`cloob.search.index.Index.map`."""
    ids = sample(store.ids(condition), SAMPLE if most is None else most)
    rows = store.vectors(model.name, ids.tolist())
    known = np.isfinite(rows).all(1)
    return ids[known], layout(rows[known], method)


def sample(ids: Ids, most: int) -> Ids:
    """At most so many ids, drawn and returned ascending; the same for the same ids."""
    if most < 1:
        raise InputError(f"a map of {most} pictures; 1 or more is wanted")
    return ids if len(ids) <= most else np.sort(np.random.default_rng(0).choice(ids, most, replace=False))


def layout(rows: Vectors, method: Method) -> Vectors:
    """Places of (n, D) rows on a map: (n, 2) in [0, 1], each axis from end to end; 0.5 where nothing differs."""
    if method not in ("pca", "tsne"):
        raise InputError(f"a map by {method!r}; pca or tsne is wanted")
    if method == "pca" or len(rows) < 4:
        return fit_plane(rows)(rows)
    components = _pca(rows, _COMPONENTS).transform(rows.astype(np.float64)).astype(np.float32)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    with require("threadpoolctl", "train").threadpool_limits(1):  # sums in one order
        tsne = require("sklearn.manifold", "train").TSNE(perplexity=perplexity, random_state=0, n_jobs=1)
        places = tsne.fit_transform(components)
    return _stretched(places, places)


def fit_plane(rows: Vectors) -> Callable[[Vectors], Vectors]:
    """Fits the plane in which rows differ most; the function gives any rows their places on it, in [0, 1]²."""
    if len(rows) < 2:
        return lambda some: np.full((len(some), 2), 0.5, np.float32)
    pca = _pca(rows, 2)

    def project(some: Vectors) -> npt.NDArray[np.float64]:
        flat = pca.transform(some.astype(np.float64))
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))

    fitted = project(rows)
    return lambda some: _stretched(project(some), fitted)


def _pca(rows: Vectors, components: int) -> Any:
    decomposition = require("sklearn.decomposition", "train")
    return decomposition.PCA(min(components, *rows.shape), svd_solver="covariance_eigh").fit(rows.astype(np.float64))


def _stretched(places: npt.NDArray[Any], fitted: npt.NDArray[Any]) -> Vectors:
    """Places in [0, 1], where 0 and 1 are the ends of those that were fitted."""
    low, span = fitted.min(0), np.ptp(fitted, axis=0)
    moved = np.where(span > 1e-9, (places - low) / np.where(span > 1e-9, span, 1), 0.5)
    return np.asarray(moved.clip(0, 1), np.float32)
