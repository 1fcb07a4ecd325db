"""What an evaluation leaves beside results.json: CLIP_benchmark's JSON and the recalls of the classes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.evaluation.embeddings import Embeddings, Labelled
from cloob.evaluation.measures.zeroshot import confusion_matrix
from cloob.evaluation.suite import write_results
from cloob.files import write_whole


def write_set_files(
    out: Path, results: Mapping[str, Any], embeddings: Embeddings, zeroshot: Sequence[Labelled]
) -> list[Path]:
    """Writes ``clip_benchmark/`` and ``per_class/`` in place of an earlier evaluation's files; returns the folders."""
    sources = {
        # A place on this machine says nothing elsewhere.
        model: model if Path(str(source).removeprefix("local-dir:")).is_absolute() else str(source)
        for model, source in embeddings.models.items()
        if isinstance(source, str | Path)
    }
    for earlier in (*(out / "clip_benchmark").glob("*_en_*.json"), *(out / "per_class").glob("*.csv")):
        earlier.unlink()
    write_clip_benchmark(out / "clip_benchmark", results, sources)
    taken: set[str] = set()
    for data in zeroshot:
        matrices = {}
        for model in (row["model"] for row in results["rows"] if data.name in row["zeroshot"]):
            images, labels, classes = embeddings.labelled(model, data)
            matrices[model] = confusion_matrix(images.features, labels, classes)
        if matrices:
            write_per_class(out / "per_class" / f"{_free(_slug(data.name), taken)}.csv", data.classnames, matrices)
    return [folder for folder in (out / "clip_benchmark", out / "per_class") if folder.is_dir()]


def write_clip_benchmark(folder: Path, results: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> None:
    """One JSON a model, set and task, which ``clip_benchmark build`` reads; ``sources`` say where models came from."""
    taken = set[str]()
    for row in results["rows"]:
        model = row["model"]
        for task, name, metrics in _tasks(row):
            content = {"dataset": name, "model": model, "pretrained": (sources or {}).get(model, model)}
            content |= {"task": task, "metrics": metrics, "language": "en"}
            write_results(folder / f"{_free(f'{_slug(name)}_{_slug(model)}_en_{task}', taken)}.json", content)


def write_per_class(path: Path, classnames: Sequence[str], matrices: Mapping[str, Tensor]) -> None:
    """A CSV with a line a class: ``label``, ``class``, ``images``, and a model each its recall and worst confusion."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{model}: {what}" for model in matrices for what in ("recall", "mostly taken for")]
    writer.writerow(["label", "class", "images", *columns])
    for label, name in enumerate(classnames):
        images = int(next(iter(matrices.values()))[label].sum())
        cells: list[str] = []
        for matrix in matrices.values():
            row = matrix[label].clone()
            right = int(row[label])
            row[label] = 0
            worst = int(row.argmax())
            recall = f"{right / images:.6g}" if images else ""
            cells += [recall, [*classnames, "(unreadable)"][worst] if int(row[worst]) else ""]
        writer.writerow([label, name, images, *cells])
    write_whole(path, text.getvalue())


def _tasks(row: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(task, set, metrics) under CLIP_benchmark's names, where ``image_retrieval`` is that of images for a text."""
    accuracies = ("acc1", "acc5", "mean_per_class_recall")
    for name, numbers in row["zeroshot"].items():
        metrics = {key: numbers[key] for key in accuracies}
        yield "zeroshot_classification", name, metrics | ({"acc5": None} if numbers["n_classes"] < 5 else {})
    for name, numbers in row["retrieval"].items():
        recalls = {f"image_retrieval_recall@{k}": numbers[f"text_to_image@{k}"] for k in (1, 5, 10)}
        recalls |= {f"text_retrieval_recall@{k}": numbers[f"image_to_text@{k}"] for k in (1, 5, 10)}
        yield "zeroshot_retrieval", name, recalls
    for name, numbers in row.get("probe", {}).items():
        shots = -1 if numbers["shots"] is None else numbers["shots"]
        metrics = {f"lp_{key}": numbers[key] for key in accuracies}
        yield "linear_probe", name, metrics | {"fewshot_k": shots, "seed": numbers["seeds"][0]}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "set"


def _free(stem: str, taken: set[str]) -> str:
    """``stem``, numbered if another file has it, whatever its case; notes that it is taken."""
    free, number = stem, 1
    while free.casefold() in taken:
        number += 1
        free = f"{stem}-{number}"
    taken.add(free.casefold())
    return free
