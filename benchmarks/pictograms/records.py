"""Records: one JSON file a run, from which alone the tables are made. No torch here."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def read(stage: str, results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All records of a stage, by id, in the order of their names."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / stage).glob("*.json"))
    }


def search_scores(results: Path = RESULTS) -> dict[str, float]:
    """What the search knows: the mean recall on the validation pairs of each of its records."""
    return {name: record["val"]["mean_recall"] for name, record in read("search", results).items()}


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record in one go; equal records give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def pack(hits: np.ndarray) -> str:
    """(n,) bool as text, eight samples a byte."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode("ascii")


def unpack(text: str, n: int) -> np.ndarray:
    """The inverse of ``pack``."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)
