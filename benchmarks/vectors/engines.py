"""What is compared: each engine in a process of its own, so that its memory is its own.

``python -m benchmarks.vectors.engines NAME VECTORS.npy QUERIES.npy FOLDER`` reads lines of JSON,
``["prepare"]``, ``["ask", start, stop, seconds]``, ``["probes", n]``, and answers each by a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TOP = 10
INGEST = 10_000
"""Rows of one transaction."""

Vectors = npt.NDArray[np.float32]


class Engine(Protocol):
    """Answers queries over vectors that it was given."""

    def prepare(self) -> dict[str, float]:
        """Takes the vectors in: seconds of each step, and bytes on disk."""

    def ask(self, query: Vectors) -> Sequence[int]:
        """Positions of the ten nearest to one (D,) query."""


class Numpy:
    """One product with all rows, mapped from the file."""

    def __init__(self, rows: Vectors, folder: Path) -> None:
        self.rows = rows

    def prepare(self) -> dict[str, float]:
        return {"disk_bytes": self.rows.nbytes}

    def ask(self, query: Vectors) -> Sequence[int]:
        products = self.rows @ query
        near = np.argpartition(products, -TOP)[-TOP:]
        ordered: list[int] = near[np.argsort(-products[near])].tolist()
        return ordered


class FaissFlat:
    """``IndexFlatIP``."""

    def __init__(self, rows: Vectors, folder: Path) -> None:
        import faiss

        self.rows = rows
        self.index: Any = faiss.IndexFlatIP(rows.shape[1])

    def prepare(self) -> dict[str, float]:
        start = time.perf_counter()
        for first in range(0, len(self.rows), 65_536):
            self.index.add(np.ascontiguousarray(self.rows[first : first + 65_536]))
        return {"build_seconds": time.perf_counter() - start}

    def ask(self, query: Vectors) -> Sequence[int]:
        found: list[int] = self.index.search(query[None], TOP)[1][0].tolist()
        return found


class Store:
    """A store of cloob's; items are numbered from 1 in the order of the vectors."""

    def __init__(self, rows: Vectors, open_: Callable[[], Any], size: Callable[[], int]) -> None:
        self.rows, self.open, self.size = rows, open_, size
        self.store: Any = None

    def prepare(self) -> dict[str, float]:
        from cloob.search.records import IndexedModel, Item

        self.store = self.open()
        steps: dict[str, float] = {}
        if not self.store.models():
            self.store.add_model(IndexedModel("m", "tiny-vit", "0" * 64, self.rows.shape[1]))
            start = time.perf_counter()
            for first in range(0, len(self.rows), INGEST):
                block = np.ascontiguousarray(self.rows[first : first + INGEST])
                places = range(first, first + len(block))
                items = [
                    Item(0, "pictures", f"folder/{i // 1000:04}/{i:08}.jpg", f"{i:064x}", 100_000, i, 640, 480)
                    for i in places
                ]
                self.store.write(items, "m", block)
            steps = {"ingest_seconds": time.perf_counter() - start, "disk_bytes": self.size()}
        start = time.perf_counter()
        self.store.optimise()
        return steps | {"build_seconds": time.perf_counter() - start, "disk_bytes_built": self.size()}

    def ask(self, query: Vectors) -> Sequence[int]:
        found: list[int] = (self.store.nearest("m", query[None], TOP).ids[0] - 1).tolist()
        return found


def sqlite(rows: Vectors, folder: Path, approximate: bool | None) -> Store:
    """SQLite, exact or by faiss, whatever the number of vectors."""
    from cloob.search.sqlite import approximate as module
    from cloob.search.sqlite.store import SqliteStore

    place = folder / "sqlite"
    module.WORTH_IT_FROM = 0

    def open_() -> Any:
        (SqliteStore(place, writable=True) if place.exists() else SqliteStore.create(place)).close()
        return SqliteStore(place, writable=True, approximate=approximate)

    def size() -> int:
        files = [path for top in (place, Path(os.environ["CLOOB_CACHE"])) for path in top.rglob("*")]
        return sum(path.stat().st_size for path in files if path.is_file())

    return Store(rows, open_, size)


ENGINES: dict[str, Callable[[Vectors, Path], Engine]] = {
    "numpy": Numpy,
    "faiss flat": FaissFlat,
    "cloob exact": lambda rows, folder: sqlite(rows, folder, False),
    "cloob approximate": lambda rows, folder: sqlite(rows, folder, True),
}


def memory() -> dict[str, int]:
    """Bytes of this process in memory: its own, and pages of files, which the system may take back."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {
        "own_bytes": int(values["RssAnon"].split()[0]) * 1024,
        "file_bytes": int(values["RssFile"].split()[0]) * 1024,
    }


def answer(engine: Engine, queries: Vectors, words: list[Any]) -> dict[str, Any]:
    """What one line asks for."""
    if words[0] == "prepare":
        return engine.prepare()
    if words[0] == "probes":
        from cloob.search.sqlite import approximate as module

        module._probes = lambda nlist: min(nlist, words[1])
        return {}
    _, start, stop, patience = words
    seconds: list[float] = []
    found: list[list[int]] = []
    for query in queries[start:stop]:
        began = time.perf_counter()
        found.append(list(engine.ask(query)))
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > patience:
            break
    return {"seconds": seconds, "found": found, **memory()}


def main() -> None:
    name, vectors, queries, folder = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    asked = np.load(queries)
    engine = ENGINES[name](np.load(vectors, mmap_mode="r"), Path(folder))
    for line in sys.stdin:
        print(json.dumps(answer(engine, asked, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
