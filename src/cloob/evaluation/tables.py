"""What an evaluation leaves beside results.json: CLIP_benchmark's JSON and the recalls of the classes.

Legend: C classes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures.confusion import confusion_matrix
from cloob.evaluation.suite import write_results
from cloob.files import write_whole

_COLUMNS = ("label", "class", "images")
_CLIP_BENCHMARK_FILE = re.compile(r".+_en_(zeroshot_classification|zeroshot_retrieval|linear_probe)(-[0-9]+)?\.json")


def write_set_files(
    out: Path, results: Mapping[str, Any], embeddings: Embeddings, zeroshot: Sequence[Labelled]
) -> list[Path]:
    """Writes everything of this module, in place of what an earlier evaluation left there.

    Args:
        out: Folder of results.json; the files go to ``clip_benchmark/`` and ``per_class/`` in it.
        results: What :func:`cloob.evaluation.suite.evaluate` returned.
        embeddings: What it was computed from.
        zeroshot: The labelled sets.

    Returns:
        The folders that hold something.

    Raises:
        InputError: A file cannot be written.
    """
    sources = {
        # A place on this machine says nothing elsewhere.
        model: model if Path(str(source).removeprefix("local-dir:")).is_absolute() else str(source)
        for model, source in embeddings.models.items()
        if isinstance(source, str | Path)
    }
    _remove_earlier(out)
    write_clip_benchmark(out / "clip_benchmark", results, sources)
    taken: set[str] = set()
    for data in zeroshot:
        name = data.name
        models = [row["model"] for row in results["rows"] if name in row["zeroshot"]]
        if not models:
            continue
        matrices = {}
        for model in models:
            images, labels, classes = embeddings.labelled(model, data)
            matrices[model] = confusion_matrix(images.features, labels, classes)
        table = out / "per_class" / f"{_free(_slug(name), taken)}.csv"
        write_per_class(table, data.classnames, matrices)
    return [folder for folder in (out / "clip_benchmark", out / "per_class") if folder.is_dir()]


def write_clip_benchmark(
    folder: Path, results: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> list[Path]:
    """One JSON a model, set and task, as CLIP_benchmark writes them, so that ``clip_benchmark build`` reads them.

    Args:
        folder: Where they go.
        results: What :func:`cloob.evaluation.suite.evaluate` returned.
        sources: Where each model came from, for the field ``pretrained``.

    Returns:
        The files, ``<set>_<model>_en_<task>.json``, numbered where two names are alike as file names. Fields:
        ``dataset``, ``model``, ``pretrained``, ``task``, ``metrics``, ``language``. As there,
        ``image_retrieval_recall`` is that of images for a text, and acc5 of fewer than five classes has no value.
    """
    files, taken = [], set[str]()
    for row in results["rows"]:
        for task, name, metrics in _tasks(row):
            content = {
                "dataset": name,
                "model": row["model"],
                "pretrained": (sources or {}).get(row["model"], row["model"]),
                "task": task,
                "metrics": metrics,
                "language": "en",
            }
            path = folder / (_free(f"{_slug(name)}_{_slug(row['model'])}_en_{task}", taken) + ".json")
            write_results(path, content)
            files.append(path)
    return files


def write_per_class(path: Path, classnames: Sequence[str], matrices: Mapping[str, Tensor]) -> None:
    """A CSV with a line a class: ``label``, ``class``, ``images``, and a model each its recall and worst confusion.

    Args:
        path: The file; its folder is created.
        classnames: C names.
        matrices: Model -> its confusion matrix, see ``measures.confusion``. A class without images has an empty recall.

    Raises:
        InputError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{model}: {what}" for model in matrices for what in ("recall", "mostly taken for")]
    writer.writerow([*_COLUMNS, *columns])
    for label, name in enumerate(classnames):
        images = int(next(iter(matrices.values()))[label].sum())
        cells: list[str] = []
        for matrix in matrices.values():
            row = matrix[label].clone()
            right = int(row[label])
            row[label] = 0
            worst = int(row.argmax())
            taken_for = "" if int(row[worst]) == 0 else [*classnames, "(unreadable)"][worst]
            cells += [f"{right / images:.6g}" if images else "", taken_for]
        writer.writerow([label, name, images, *cells])
    write_whole(path, text.getvalue())


def _remove_earlier(out: Path) -> None:
    """Removes the files of an earlier evaluation: what is called as ours and, of the CSVs, begins with our columns."""
    for path in (out / "clip_benchmark").glob("*.json"):
        if _CLIP_BENCHMARK_FILE.fullmatch(path.name):
            path.unlink()
    for path in (out / "per_class").glob("*.csv"):
        with path.open("rb") as file:
            ours = file.readline().startswith(f"{','.join(_COLUMNS)},".encode())
        if ours:
            path.unlink()


def _tasks(row: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(task, set, metrics) under CLIP_benchmark's names."""
    tasks: list[tuple[str, str, dict[str, Any]]] = []
    for name, numbers in row["zeroshot"].items():
        metrics = {key: numbers[key] for key in ("acc1", "acc5", "mean_per_class_recall")}
        if numbers["n_classes"] < 5:
            metrics["acc5"] = None
        tasks.append(("zeroshot_classification", name, metrics))
    for name, numbers in row["retrieval"].items():
        recalls = {f"image_retrieval_recall@{k}": numbers[f"text_to_image@{k}"] for k in (1, 5, 10)}
        recalls |= {f"text_retrieval_recall@{k}": numbers[f"image_to_text@{k}"] for k in (1, 5, 10)}
        tasks.append(("zeroshot_retrieval", name, recalls))
    for name, numbers in row.get("probe", {}).items():
        metrics = {f"lp_{key}": numbers[key] for key in ("acc1", "acc5", "mean_per_class_recall")}
        metrics |= {"fewshot_k": -1 if numbers["shots"] is None else numbers["shots"], "seed": numbers["seeds"][0]}
        tasks.append(("linear_probe", name, metrics))
    return tasks


def _slug(name: str) -> str:
    """A name that is a file's name on every system."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "set"


def _free(stem: str, taken: set[str]) -> str:
    """``stem``, with a number where another file has it already; notes that it is taken. Case makes no difference."""
    free, number = stem, 1
    while free.casefold() in taken:
        number += 1
        free = f"{stem}-{number}"
    taken.add(free.casefold())
    return free
