"""What an evaluation leaves beside results.json: CLIP_benchmark's JSON, recalls of the classes, confusion pictures.

Legend: n images, C classes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, require
from cloob.evaluate.cache import fingerprint
from cloob.evaluate.facts import short_name
from cloob.evaluate.store import Embeddings, Labelled
from cloob.evaluate.suite import write_results
from cloob.files import write_whole

_MOST_TICKS = 50  # class names along the sides of a confusion picture; more would not be readable
_MOST_CELLS = 1000
_PICTURE_KEY = "cloob"


def write_set_files(
    out: Path, results: Mapping[str, Any], embeddings: Embeddings, zeroshot: Sequence[Labelled]
) -> list[Path]:
    """Writes everything of this module.

    Args:
        out: Folder of results.json; the files go to ``clip_benchmark/``, ``per_class/`` and ``confusion/`` in it.
        results: What :func:`cloob.evaluate.suite.evaluate` returned.
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
    write_clip_benchmark(out / "clip_benchmark", results, sources)
    taken: set[str] = set()
    for data in zeroshot:
        name = short_name(data)
        models = [row["model"] for row in results["rows"] if name in row["zeroshot"]]
        if not models:
            continue
        matrices = {}
        for model in models:
            images, labels, classes = embeddings.labelled(model, data)
            matrices[model] = confusion_matrix(images.features, labels, classes)
        table = out / "per_class" / f"{_free(_slug(name), taken)}.csv"
        write_per_class(table, data.classnames, matrices)
        for model, matrix in matrices.items():
            picture = _free(f"{table.stem}--{_slug(model)}", taken)
            draw_confusion(out / "confusion" / f"{picture}.png", matrix, data.classnames, f"{name}, {model}")
    return [folder for folder in (out / "clip_benchmark", out / "per_class", out / "confusion") if folder.is_dir()]


def write_clip_benchmark(
    folder: Path, results: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> list[Path]:
    """One JSON a model, set and task, as CLIP_benchmark writes them, so that ``clip_benchmark build`` reads them.

    Args:
        folder: Where they go.
        results: What :func:`cloob.evaluate.suite.evaluate` returned.
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
        matrices: Model -> its :func:`confusion_matrix`. A class without images has an empty recall.

    Raises:
        InputError: The file cannot be written.
    """
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
            taken_for = "" if int(row[worst]) == 0 else [*classnames, "(unreadable)"][worst]
            cells += [f"{right / images:.6g}" if images else "", taken_for]
        writer.writerow([label, name, images, *cells])
    write_whole(path, text.getvalue())


def confusion_matrix(image_features: Tensor, labels: Tensor, class_embeddings: Tensor) -> Tensor:
    """Which class each image was taken for.

    Args:
        image_features: (n, D); a NaN row is an image that could not be read.
        labels: (n,) int64 in [0, C).
        class_embeddings: (C, D).

    Returns:
        (C, C + 1) int64 counts, a row a label; the last column counts what could not be read. Of classes with equal
        scores the right one counts last, as in :func:`cloob.evaluate.zeroshot.zeroshot_ranks`.
    """
    n_classes = len(class_embeddings)
    scores = image_features.double() @ class_embeddings.double().T
    rows = torch.arange(len(labels))
    own = scores[rows, labels].clone()
    # The rounding within which `ranking.ranks` counts a tie, so that both agree on what is right.
    rounding = 8 * torch.finfo(torch.float64).eps * class_embeddings.double().norm(dim=1).max()
    least = own - rounding * image_features.double().norm(dim=1)
    scores[rows, labels] = -torch.inf
    best, other = scores.nan_to_num(nan=-torch.inf).max(1)
    predicted = torch.where(best >= least, other, labels)
    predicted = torch.where(torch.isfinite(own), predicted, n_classes)
    cells = labels * (n_classes + 1) + predicted
    return torch.bincount(cells, minlength=n_classes * (n_classes + 1)).view(n_classes, n_classes + 1)


def draw_confusion(path: Path, matrix: Tensor, classnames: Sequence[str], title: str) -> None:
    """Draws a confusion matrix, each row as shares of its images; classes without images are left out.

    A picture that is there already and shows the same is left as it is: drawing takes most of a repeated evaluation.

    Args:
        path: A .png; its folder is created.
        matrix: (C, C + 1), see :func:`confusion_matrix`. Above 1000 classes, neighbours are drawn as one.
        classnames: C names; written along the sides up to 50.
        title: Written above.

    Raises:
        InputError: The file cannot be written.
    """
    key = fingerprint(title, *classnames, hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest())
    if _drawn(path, key):
        return
    require("matplotlib", "train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = [label for label, row in enumerate(matrix) if int(row.sum())]
    shares = matrix[kept][:, kept].double() / matrix[kept].sum(1, keepdim=True)
    if len(kept) > _MOST_CELLS:
        size = -(-len(kept) // _MOST_CELLS)
        shares = torch.nn.functional.avg_pool2d(shares[None, None], size, ceil_mode=True)[0, 0] * size
    names = [classnames[label].replace("$", r"\$") for label in kept] if len(kept) <= _MOST_TICKS else []
    # Inches, set by hand: matplotlib's own layouts draw everything twice, which took half of the time.
    side = 3.0 + 0.16 * min(len(kept), _MOST_TICKS)
    margin = 0.75 + 0.06 * max((len(name) for name in names), default=0)
    width, height = margin + side + 1.1, margin + side + 0.4
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    bar = figure.add_axes(
        ((margin + side + 0.15) / width, (margin + side / 10) / height, 0.15 / width, side * 0.8 / height)
    )
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest", aspect="auto")
    figure.colorbar(image, cax=bar, label="share of the class's images")
    accuracy = float(matrix.diagonal().sum() / matrix.sum())
    axes.set_title(f"{title}: {100 * accuracy:.1f} % right", fontsize=10)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if names:
        axes.set_xticks(range(len(kept)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(kept)), names, fontsize=7)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={_PICTURE_KEY: key})
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _tasks(row: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(task, set, metrics) under CLIP_benchmark's names."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name, numbers in row["zeroshot"].items():
        metrics = {key: numbers[key] for key in ("acc1", "acc5", "mean_per_class_recall")}
        if numbers["n_classes"] < 5:
            metrics["acc5"] = None
        found.append(("zeroshot_classification", name, metrics))
    for name, numbers in row["retrieval"].items():
        recalls = {f"image_retrieval_recall@{k}": numbers[f"text_to_image@{k}"] for k in (1, 5, 10)}
        recalls |= {f"text_retrieval_recall@{k}": numbers[f"image_to_text@{k}"] for k in (1, 5, 10)}
        found.append(("zeroshot_retrieval", name, recalls))
    for name, numbers in row.get("probe", {}).items():
        metrics = {f"lp_{key}": numbers[key] for key in ("acc1", "acc5", "mean_per_class_recall")}
        metrics |= {"fewshot_k": -1 if numbers["shots"] is None else numbers["shots"], "seed": numbers["seeds"][0]}
        found.append(("linear_probe", name, metrics))
    return found


def _drawn(path: Path, key: str) -> bool:
    """Whether the file is a picture that :func:`draw_confusion` made of the same."""
    pil = require("PIL.Image", "train")
    try:
        with pil.open(path) as image:
            return bool(image.info.get(_PICTURE_KEY) == key)
    except (OSError, SyntaxError, ValueError):
        return False


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
