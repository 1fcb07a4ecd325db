"""Records of a study's runs, from which alone its tables are made.

No torch here.

A finished run is one JSON file, ``runs/STAGE/ID.json`` in the study's folder, which git
ignores. ``pack`` puts them all into ``records.jsonl.gz``, one line a run, sorted by
stage and id. Readers see both together.

A run's file holds the class that each test picture is taken for. Tables need less, and
that is what is packed: for each picture whether it is right, and for each set the
p-value of ``chance``, over this seed and the lower ones.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKED = "records.jsonl.gz"
_DEALS = 2000
SETS = "test-sets"
"""A stage with one record a test set: the labels of its pictures, which all cells
share.
"""
Record = dict[str, Any]
Sets = dict[str, tuple[np.ndarray, int]]


def read(stage: str, study: Path) -> dict[str, Record]:
    packed = _packed(study).get(stage, {})
    files = sorted((study / "runs" / stage).glob("*.json"))
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    tested = any("zeroshot" in record for record in runs.values())
    sets = labels_by_set(study) if tested else {}
    for name, record in runs.items():
        packed[name] = (
            _smaller(record, runs, packed, sets) if "zeroshot" in record else record
        )
    return dict(sorted(packed.items()))


def names(study: Path) -> set[tuple[str, str]]:
    files = {
        (path.parent.name, path.stem) for path in (study / "runs").glob("*/*.json")
    }
    return files | {
        (stage, name) for stage, found in _packed(study).items() for name in found
    }


def pack(study: Path) -> None:
    """Puts the files of all runs into the packed file; equal records give equal
    bytes.
    """
    stages = sorted(
        {*_packed(study), *(folder.name for folder in (study / "runs").glob("*"))}
    )
    lines = [
        {"stage": stage, **record}
        for stage in stages
        for record in read(stage, study).values()
    ]
    text = "".join(
        json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"
        for line in lines
    )
    temporary = study / f".tmp-{PACKED}"  # a study that runs reads the packed file
    with (
        temporary.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as whole,
    ):
        whole.write(text.encode("ascii"))
    temporary.replace(study / PACKED)


def _packed(study: Path) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    if (study / PACKED).is_file():
        with gzip.open(study / PACKED, "rt", encoding="ascii") as lines:
            for line in lines:
                record = json.loads(line)
                found.setdefault(record.pop("stage"), {})[record["id"]] = record
    return found


def _smaller(
    record: Record, runs: dict[str, Record], packed: dict[str, Record], sets: Sets
) -> Record:
    same = list(_lower_seeds(record, runs.values()))
    if any(lower["id"] not in runs for lower in _lower_seeds(record, packed.values())):
        raise ValueError(
            f"{record['id']}: a lower seed is packed already; put its file back into"
            " runs/"
        )
    zeroshot = {}
    for name, scores in record["zeroshot"].items():
        labels, n_classes = sets[name]
        taken = [unpack(each["zeroshot"][name]["predictions"]) for each in same]
        hits = unpack(scores["predictions"]) == labels
        rest = {key: value for key, value in scores.items() if key != "predictions"}
        zeroshot[name] = {
            **rest,
            "hits": pack_bits(hits),
            "p": round(chance(taken, labels, n_classes), 6),
        }
    return {**record, "zeroshot": zeroshot}


def _lower_seeds(record: Record, others: Iterable[Record]) -> Iterable[Record]:
    seed = record["config"]["seed"]
    for other in others:
        config = other["config"]
        if config["seed"] <= seed and {**config, "seed": seed} == record["config"]:
            yield other


def labels_by_set(study: Path) -> Sets:
    """Of each test set the (n,) labels and the number of classes; nothing before the
    first cell.
    """
    return {
        name: (unpack(found["labels"]), found["n_classes"])
        for name, found in read(SETS, study).items()
    }


def write(stage: str, record: Record, study: Path) -> None:
    file = study / "runs" / stage / f"{record['id']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(
        json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(file)


def write_set(name: str, labels: np.ndarray, n_classes: int, study: Path) -> None:
    write(
        SETS,
        {
            "id": name,
            "n": len(labels),
            "n_classes": n_classes,
            "labels": pack_numbers(labels),
        },
        study,
    )


def pack_bits(hits: np.ndarray) -> str:
    """(n,) booleans as text, eight to a byte."""
    return base64.b64encode(np.packbits(hits).tobytes()).decode("ascii")


def unpack_bits(text: str, n: int) -> np.ndarray:
    """The inverse of ``pack_bits``: (n,) booleans."""
    return np.unpackbits(
        np.frombuffer(base64.b64decode(text), np.uint8), count=n
    ).astype(bool)


def pack_numbers(numbers: np.ndarray) -> str:
    """(n,) integers below 65,536 as text, two bytes each."""
    return base64.b64encode(numbers.astype("<u2").tobytes()).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """The inverse of ``pack_numbers``: (n,) int64."""
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.int64)


def chance(
    predictions: Sequence[np.ndarray], labels: np.ndarray, n_classes: int
) -> float:
    """The p-value of an accuracy, if pictures and names did not belong together.

    The names of the classes are dealt anew 2,000 times: an answer that is always the
    same, or classes told apart but called by each other's names, are no better than
    that.

    Args:
        predictions: For each seed, (n,) the class that each picture is taken for.
        labels: (n,) classes in [0, C).
        n_classes: C.
    """
    asked = np.tile(labels, len(predictions))
    taken = np.concatenate(list(predictions))
    counts = np.bincount(taken * n_classes + asked, minlength=n_classes**2)
    as_good = int(
        (counts.take(_dealt(n_classes)).sum(1) >= counts[:: n_classes + 1].sum()).sum()
    )
    return (1 + as_good) / (1 + _DEALS)


@functools.cache
def _dealt(n_classes: int) -> np.ndarray:
    """(2,000, C): in each row, the name that each class is given, as its place in a
    flat (C, C).
    """
    generator = np.random.default_rng(0)
    return np.stack(
        [generator.permutation(n_classes) for _ in range(_DEALS)]
    ) + n_classes * np.arange(n_classes)
