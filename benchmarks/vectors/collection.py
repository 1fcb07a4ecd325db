"""Vectors as an image-text model makes them, and the text queries that look for them.

Pictures: norm(0.55 g + 0.45 c + 0.5 e). g is the mean direction of pictures, c the unit centre of one of 20,000
concepts, e what is the picture's own. A concept is half one of 200 topics, half its own; how many pictures it has
falls as 1 / (rank + 50). Texts: norm(0.25 g + 0.55 t + 0.4 c + 0.6 e) with another mean direction t, the modality
gap, for concepts drawn from the same distribution. All directions are Gaussian with standard deviations that fall
as j^-0.4 over the axes in a fixed random order, since the spectra of such models fall too. :func:`statistics_of`
gives the cosines that come of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

DIM = 512
CONCEPTS = 20_000
TOPICS = 200
_BLOCK = 50_000


@dataclass(frozen=True, eq=False)
class World:
    """What pictures and texts share."""

    spectrum: Vectors
    picture_mean: Vectors
    text_mean: Vectors
    concepts: Vectors
    shares: npt.NDArray[np.float64]


def make_world() -> World:
    """The same each time."""
    draw = np.random.default_rng(0)
    spectrum = draw.permutation((1.0 + np.arange(DIM)) ** -0.4).astype(np.float32)

    def directions(n: int) -> Vectors:
        return _unit(draw.standard_normal((n, DIM), np.float32) * spectrum)

    means, topics = directions(2), directions(TOPICS)
    concepts = _unit(topics[draw.integers(0, TOPICS, CONCEPTS)] + directions(CONCEPTS))
    shares = 1.0 / (50.0 + np.arange(CONCEPTS))
    return World(spectrum, means[0], means[1], concepts, shares / shares.sum())


def write_pictures(path: Path, world: World, n: int) -> None:
    """(n, 512) float32 unit rows as .npy; the first rows of a larger one are those of a smaller."""
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, DIM))
    for start in range(0, n, _BLOCK):
        draw = np.random.default_rng([1, start])
        concept = draw.choice(CONCEPTS, _BLOCK, p=world.shares)
        own = _unit(draw.standard_normal((_BLOCK, DIM), np.float32) * world.spectrum)
        block = _unit(0.55 * world.picture_mean + 0.45 * world.concepts[concept] + 0.5 * own)
        rows[start : start + _BLOCK] = block[: n - start]
    rows.flush()


def make_texts(world: World, n: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """(n, 512) queries, and the concept of each."""
    draw = np.random.default_rng(2)
    concept = draw.choice(CONCEPTS, n, p=world.shares)
    own = _unit(draw.standard_normal((n, DIM), np.float32) * world.spectrum)
    gap = 0.25 * world.picture_mean + 0.55 * world.text_mean
    return _unit(gap + 0.4 * world.concepts[concept] + 0.6 * own), concept


def best(rows: Vectors, queries: Vectors, top: int) -> npt.NDArray[np.int64]:
    """(Q, top) rows with the largest products, the oracle."""
    scores = np.full((len(queries), top), -np.inf, np.float32)
    found = np.zeros((len(queries), top), np.int64)
    for start in range(0, len(rows), _BLOCK):
        products = queries @ rows[start : start + _BLOCK].T
        near = np.argpartition(-products, top, axis=1)[:, :top]
        scores = np.concatenate([scores, np.take_along_axis(products, near, 1)], 1)
        found = np.concatenate([found, near + start], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        scores, found = np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)
    return found


def statistics_of(rows: Vectors, queries: Vectors, nearest: npt.NDArray[np.int64]) -> dict[str, float]:
    """Cosines by which a collection can be compared with a real one."""
    some = rows[:2000]
    pairs = some @ some.T
    return {
        "picture and picture": float(pairs[np.triu_indices(len(some), 1)].mean()),
        "text and picture": float((queries @ some.T).mean()),
        "text and nearest picture": float((queries * rows[nearest[:, 0]]).sum(1).mean()),
        "text and tenth nearest": float((queries * rows[nearest[:, -1]]).sum(1).mean()),
    }


def _unit(rows: Vectors) -> Vectors:
    result: Vectors = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return result
