"""What an evaluation finds, as results.json holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cloob.files import write_whole

Section = Literal["zeroshot", "probe", "retrieval", "vectors", "geometry"]
Numbers = dict[str, Any]
"""What was measured of a model on a set: numbers, their intervals (``…_interval``),
counts of what could not be read (``unreadable``) and lists by name.
"""


class Row(TypedDict):
    """One model; its numbers by section and name of the set."""

    model: str
    objective: str | None  # the member of the family that it was trained with, if known
    settings: Mapping[str, object]  # its ``objective.json``
    fingerprint: str | None
    zeroshot: dict[str, Numbers]
    retrieval: dict[str, Numbers]
    geometry: dict[str, Numbers]
    probe: NotRequired[dict[str, Numbers]]
    vectors: NotRequired[dict[str, Numbers]]


class Difference(TypedDict):
    """By how much a model is ahead of another, with the ends of the interval."""

    metric: str
    set: str | None  # None: the mean of the sets that all models share
    model: str
    baseline: str
    difference: float
    low: float
    high: float


class Failure(TypedDict):
    """What could not be measured."""

    model: str | None  # None: a set that no model could be measured on
    set: str | None  # None: a model that cannot be loaded
    error: str


class Checkpoint(TypedDict):
    """The geometry of a checkpoint of a run."""

    step: int
    epoch: float | None
    effective_eigenvalues_image: int
    effective_eigenvalues_text: int
    ajne_image: float
    ajne_text: float


class Checkpoints(TypedDict):
    """The geometry of the checkpoints of runs, on one set."""

    set: str
    models: dict[str, list[Checkpoint]]


class Results(TypedDict):
    """All of results.json."""

    rows: list[Row]
    differences: list[Difference]
    level: float  # of the intervals
    failures: NotRequired[list[Failure]]
    checkpoints: NotRequired[Checkpoints]


def write_results(path: str | Path, results: Results) -> None:
    """Writes results.json, completely or not at all; equal results give equal bytes.

    NaN and infinity become null.
    """
    plain = json.loads(json.dumps(results), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(path), text, f"{path}: results cannot be written here")
