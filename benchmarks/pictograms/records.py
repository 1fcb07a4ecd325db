"""Records: one JSON file a run, from which alone the tables are made. No torch here."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
TEST_SETS = "test-sets.json"
"""The labels of the test sets' pictures, which all cells share."""
TIMING = "timing.json"
"""What a step of each method costs, measured side by side."""


def read(stage: str, results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All records of a stage, by id, in the order of their names."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / stage).glob("*.json"))
    }


def search_scores(results: Path = RESULTS) -> dict[str, float]:
    """What the search knows: the mean recall on the validation pairs of each of its records."""
    return {name: record["val"]["mean_recall"] for name, record in read("search", results).items()}


def labels_by_set(results: Path = RESULTS) -> dict[str, tuple[np.ndarray, int]]:
    """Of each test set the (n,) labels and the number of classes; nothing before the first cell."""
    path = results / TEST_SETS
    sets = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: (unpack(found["labels"]), found["n_classes"]) for name, found in sets.items()}


def timing(results: Path = RESULTS) -> dict[str, dict[str, list[float]]]:
    """Tower -> method -> seconds a step in the first and in the second half; nothing before the ``timing`` stage."""
    path = results / TIMING
    found: dict[str, dict[str, list[float]]] = (
        json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else {}
    )
    return found


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes a record in one go; equal records give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def pack(numbers: np.ndarray) -> str:
    """(n,) integers below 65,536 as text, two bytes each."""
    return base64.b64encode(numbers.astype("<u2").tobytes()).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """The inverse of ``pack``: (n,) int64."""
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.int64)
