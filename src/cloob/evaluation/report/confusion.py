"""Confusion pictures for the page: one pixel a cell, transparent where nothing is, so that they suit light and dark.

Legend: C classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloob.errors import require
from cloob.evaluation.report.numbers import shortened

MOST_CELLS = 256
WORST_SHOWN = 6
MOST_NAMES = 20
"""So many class names stand beside a picture at most; of more classes only every second, third and so on."""
_LEAST_IMAGES = 3  # a class on average; below, a cell is one image and the picture is noise
_COLOURS = ("0069a8", "d0560a", "00896a", "b8568f", "8a6d00", "3f9fd6", "5b4ea3", "6b6b6b")  # --c0 … of page.css


@dataclass(frozen=True)
class Confusion:
    """Which class each image of a set was taken for by a model.

    Attributes:
        set: The set's name.
        model: The model's name.
        classnames: C names.
        matrix: (C, C + 1) counts, a row a class, see :func:`cloob.evaluation.measures.confusion.confusion_matrix`.
    """

    set: str
    model: str
    classnames: Sequence[str]
    matrix: Tensor


def panels(confusions: Sequence[Confusion], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each set its pictures, one a model; sets with fewer than three images a class are left out."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for item in confusions:
        images = int(item.matrix.sum())
        n_seen = int((item.matrix.sum(1) > 0).sum())
        if n_seen < 2 or images < _LEAST_IMAGES * n_seen:
            continue
        uri, size = _picture(item.matrix, colours[item.model])
        worst = _worst(item)
        right = 100 * int(item.matrix.diagonal().sum()) / images
        alt = f"Confusion of {item.model} on {item.set}: {right:.1f} % of {images} images on the diagonal"
        shown = {"uri": uri, "size": size, "alt": alt, "worst": worst, "names": _names(item)}
        sets.setdefault(item.set, []).append({"model": item.model, "colour": colours[item.model], **shown})
    return [{"set": name, "models": models} for name, models in sets.items()]


def _names(item: Confusion) -> list[dict[str, Any]]:
    """Class names beside the picture, from its top to its bottom: where the middle of each lies, in % of the side."""
    seen = [name for name, n in zip(item.classnames, item.matrix.sum(1).tolist(), strict=True) if n]
    every = -(-len(seen) // MOST_NAMES)
    return [
        {"name": shortened(name, 40), "at": round(100 * (i + 0.5) / len(seen), 2)}
        for i, name in enumerate(seen)
        if i % every == 0
    ]


def _worst(item: Confusion) -> list[dict[str, str]]:
    """The most frequent confusions as shares of a class's images; ties go to the earlier class."""
    matrix = item.matrix.double()
    totals = matrix.sum(1, keepdim=True)
    shares = (matrix / totals.clamp_min(1)).clone()
    shares.diagonal().zero_()
    names = [*item.classnames, "(unreadable)"]
    order = shares.flatten().sort(descending=True, stable=True)
    confusions = []
    for cell, share in zip(order.indices[:WORST_SHOWN].tolist(), order.values[:WORST_SHOWN].tolist(), strict=True):
        label, predicted = divmod(cell, len(names))
        if share == 0:
            break
        count = f"{int(item.matrix[label, predicted])} of {int(totals[label])}"
        confusions.append(
            {"label": shortened(names[label], 60), "taken": shortened(names[predicted], 60), "count": count}
        )
    return confusions


def _picture(matrix: Tensor, colour: int) -> tuple[str, int]:
    """A data: URI of the shares of each class's images, and the cells along a side.

    The square root of a share is drawn, so that rare confusions are seen; above 256 classes neighbours are one cell.
    """
    kept = (matrix.sum(1) > 0).nonzero()[:, 0]
    counts = matrix[kept][:, kept].double()
    totals = matrix[kept].sum(1).double()
    if len(kept) > MOST_CELLS:
        block = torch.arange(len(kept)) // -(-len(kept) // MOST_CELLS)
        n = int(block[-1]) + 1
        rows = torch.zeros(n, len(kept), dtype=torch.float64).index_add_(0, block, counts)
        counts = torch.zeros(n, n, dtype=torch.float64).index_add_(1, block, rows)
        totals = torch.zeros(n, dtype=torch.float64).index_add_(0, block, totals)
    alpha = (255 * (counts / totals[:, None]).clamp(0, 1).sqrt()).round().to(torch.uint8)
    pil = require("PIL.Image", "train")
    image = pil.fromarray(alpha.numpy())
    image = pil.frombytes("P", image.size, image.tobytes())
    rgb = bytes.fromhex(_COLOURS[colour % len(_COLOURS)])
    image.putpalette(rgb * 256)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=bytes(range(256)), optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}", len(alpha)
