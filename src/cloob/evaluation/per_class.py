"""Recall per class as tables, per_class/*.csv beside results.json."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures import confusion_matrix
from cloob.files import write_whole


def write_per_class(
    folder: Path,
    results: Mapping[str, Any],
    embeddings: Embeddings,
    zeroshot: Sequence[Labelled],
) -> list[Path]:
    """Writes a CSV a labelled set; returns the files.

    A line is a class: ``label``, ``class``, ``images``, and for every model its recall
    and worst confusion.
    """
    files: list[Path] = []
    for data in zeroshot:
        matrices = {}
        for row in results["rows"]:
            if data.name in row["zeroshot"]:
                model = row["model"]
                images, labels, classes = embeddings.labelled(model, data)
                matrices[model] = confusion_matrix(images.features, labels, classes)
        if matrices:
            files.append(folder / _free_name(data.name, files))
            write_whole(files[-1], _table(data.classnames, matrices))
    return files


def _table(classnames: Sequence[str], matrices: Mapping[str, Tensor]) -> str:
    """The CSV of all classes: every model's recall, and what it mostly takes the class
    for.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    header = ["label", "class", "images"]
    for model in matrices:
        header += [f"{model}: recall", f"{model}: mostly taken for"]
    writer.writerow(header)
    for label, name in enumerate(classnames):
        cells: list[str] = []
        for matrix in matrices.values():
            counts = matrix[label].clone()
            n = int(counts.sum())
            cells.append(f"{int(counts[label]) / n:.6g}" if n else "")
            counts[label] = 0
            worst = int(counts.argmax())
            is_confused = bool(counts[worst])
            cells.append([*classnames, "(unreadable)"][worst] if is_confused else "")
        writer.writerow([label, name, n, *cells])
    return text.getvalue()


def _free_name(name: str, files: Sequence[Path]) -> str:
    """A name of a file that no other set has, also where ``A`` and ``a`` are one."""
    stem = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "set"
    used = {file.stem.casefold() for file in files}
    free = stem
    number = 1
    while free.casefold() in used:
        number += 1
        free = f"{stem}-{number}"
    return f"{free}.csv"


def per_class_files(results: Path) -> list[str]:
    """The names of the tables of classes that a results.json lists, none without one.

    Its folder may be anybody's, so a name that leads elsewhere is no name.
    """
    try:
        names = json.loads(results.read_text(encoding="utf-8"))["per_class"]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    if not isinstance(names, list):
        return []
    texts = [name for name in names if isinstance(name, str)]
    return [name for name in texts if re.fullmatch(r"[\w+-][\w.+-]*\.csv", name)]


def remove_per_class(folder: Path, names: Iterable[str]) -> None:
    """Removes tables of an earlier evaluation; other files stay."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
