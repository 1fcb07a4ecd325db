"""Exact search gives what a plain loop gives, for any blocks, parts and filters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloob.search.sqlite import exact
from cloob.search.sqlite.exact import Part, nearest


def loop(parts: list[Part], query: np.ndarray, top: int) -> list[tuple[int, np.float32]]:
    """Best first, equal ones by id; each product summed on its own in float64."""
    found = []
    for part in parts:
        positions = range(len(part.ids)) if part.positions is None else part.positions.tolist()
        for position in positions:
            score = np.float32((part.rows[position].astype(np.float64) * query.astype(np.float64)).sum())
            found.append((int(part.ids[position]), score))
    return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:top]


def rows_of(draw: st.DrawFn, n: int, dim: int) -> np.ndarray:
    """Unit rows of which many are equal or nearly so."""
    kinds = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((kinds, dim))[rng.integers(0, kinds, n)]
    rows += rng.choice([0, 0, 1e-7, 1e-3], (n, 1)) * rng.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@given(st.data())
def test_equals_a_loop(data: st.DataObject) -> None:
    draw = data.draw
    dim, sizes = draw(st.integers(1, 40)), draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    ids = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.arange(1, sum(sizes) + 1))
    parts, start = [], 0
    for size in sizes:
        own = np.sort(ids[start : start + size])
        start += size
        chosen = None
        if draw(st.booleans()):
            chosen = np.flatnonzero(np.random.default_rng(draw(st.integers(0, 99))).random(size) < 0.5)
        parts.append(Part(own, rows_of(draw, size, dim), chosen))
    queries = rows_of(draw, 3, dim)
    top = draw(st.integers(1, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK", draw(st.sampled_from([1, 3, 16, 1000])))
        found, scores = nearest(parts, queries, top)
    for i, query in enumerate(queries):
        wanted = loop(parts, query, top)
        assert list(zip(found[i].tolist(), scores[i], strict=True))[: len(wanted)] == wanted
        assert not found[i, len(wanted) :].any() and (scores[i, len(wanted) :] == -np.inf).all()
