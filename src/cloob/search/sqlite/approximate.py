"""Approximate search in large collections: a faiss index finds candidates, which are then scored exactly.

The index is kept in the user's own cache and not beside the database: faiss trusts the files that it reads, and an
index's folder may come from somebody else.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cloob.cache import Cache
from cloob.errors import InputError, require
from cloob.search.sqlite.exact import Part
from cloob.search.store import Vectors

logger = logging.getLogger(__name__)

EXACT_UP_TO = 1_000_000  # vectors are searched exactly unless somebody asks otherwise
WORTH_IT_FROM = 200_000  # below, an index is not built even where approximate search is asked for
_CANDIDATES = 10  # rows that are scored exactly for each one that is wanted


def worthwhile(n: int, wanted: bool | None) -> bool:
    """Whether so many vectors are to be searched by an index."""
    return n > EXACT_UP_TO if wanted is None else wanted and n >= WORTH_IT_FROM


def build(name: str, rows: Vectors) -> None:
    """Builds the index of (n, D) rows and keeps it; nothing where it is kept already, and a warning without faiss."""
    try:
        faiss = require("faiss", "search")
    except InputError as error:
        logger.warning("%s; %s vectors are searched one by one", error, f"{len(rows):,}")
        return
    Cache().get("features", name, lambda path: _write(faiss, rows, path))


def find(name: str, n: int, dim: int) -> Any:
    """The index of this name, or None."""
    path = Cache().find("features", name)
    try:
        index = None if path is None else require("faiss", "search").read_index(str(path))
    except (InputError, RuntimeError):
        return None
    return index if index is not None and (index.ntotal, index.d) == (n, dim) else None


def candidates(index: Any, part: Part, query: Vectors, top: int) -> Part:
    """Of the rows that the index is of, some that are near to a query (D,)."""
    faiss, selector = require("faiss", "search"), None
    if part.positions is not None:
        mask = np.zeros(len(part.ids), bool)
        mask[part.positions] = True
        selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    parameters = faiss.SearchParametersIVF(sel=selector, nprobe=_probes(index.nlist))
    wanted = min(len(part), max(_CANDIDATES * top, 100))
    _, (found,) = index.search(np.ascontiguousarray(query[None], np.float32), wanted, params=parameters)
    return replace(part, positions=np.sort(found[found >= 0]))


def _probes(nlist: int) -> int:
    """So many lists that text queries find 0.95 of their ten nearest: see benchmarks/results/search/results.json."""
    return min(nlist, max(128, nlist // 32))


def _write(faiss: Any, rows: Vectors, path: Path) -> None:
    n, dim = rows.shape
    nlist = int(2 ** round(math.log2(4 * math.sqrt(n))))
    index = faiss.index_factory(dim, f"IVF{nlist},SQfp16", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).choice(n, min(n, 64 * nlist), replace=False))
    index.train(np.ascontiguousarray(rows[sample]))
    for start in range(0, n, 65_536):
        index.add(np.ascontiguousarray(rows[start : start + 65_536]))
    faiss.write_index(index, str(path))
