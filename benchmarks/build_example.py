"""Makes ``src/cloob/data/demo/pairs.npz`` from the features of the demo set.

    cloob train align --data demo --objective cca --out build/example
    python benchmarks/build_example.py

The first command leaves the features in the cache; this takes the main directions of
both sides and a draw of the pairs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from cloob.cache import cache_root

TARGET = Path("src/cloob/data/demo/pairs.npz")
N_TRAIN, N_TEST, WIDTH = 1600, 500, 96


def first_places(rows: np.ndarray) -> set[int]:
    """Places where a row stands for the first time."""
    places: dict[bytes, int] = {}
    for place, row in enumerate(rows):
        places.setdefault(bytes(row), place)
    return set(places.values())


def by_pair(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with a row for every pair, of files with one for every picture and
    text.
    """
    pictures, texts = found["pairs"].T
    columns = {name: found[name][pictures] for name in ("images", "images_rows")}
    return columns | {name: found[name][texts] for name in ("texts", "texts_rows")}


def main() -> None:
    files = (cache_root() / "features").glob("*.safetensors")
    by_length = {len(found["ids"]): found for found in map(load_file, files)}
    train, test = map(by_pair, (by_length[6110], by_length[N_TEST]))
    distinct = first_places(train["images_rows"]) & first_places(train["texts_rows"])
    drawn = np.random.default_rng(0).permutation(sorted(distinct))[:N_TRAIN]
    stored = {}
    for name in ("images", "texts"):
        rows = train[name].astype(np.float64)
        mean = rows.mean(0)
        _, _, directions = np.linalg.svd(rows - mean, full_matrices=False)
        chosen = np.concatenate([rows[np.sort(drawn)], test[name]]) - mean
        stored[name] = (chosen @ directions[:WIDTH].T).astype(np.float16)
    np.savez_compressed(TARGET, **stored)


if __name__ == "__main__":
    main()
