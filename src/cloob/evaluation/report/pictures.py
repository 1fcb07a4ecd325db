"""Pictures inside the page: small copies of the test set's, without metadata, and confusion matrices, a pixel a cell.

Legend: C classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.errors import require
from cloob.evaluation.report.numbers import shortened
from cloob.pictures import Unreadable, decode

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 320  # pixels: a picture is at most 160 wide on the page, twice that on a dense screen
_MAX_CELLS = 256
_MAX_NAMES = 20  # beside a confusion picture; of more classes only every second, third and so on
_WORST_SHOWN = 6
_MIN_IMAGES = 3  # a class on average; below, a cell is one image and the picture is noise
_COLOURS = ("0069a8", "d0560a", "00896a", "b8568f", "8a6d00", "3f9fd6", "5b4ea3", "6b6b6b")  # --c0 … of page.css


@dataclass(frozen=True)
class Confusion:
    """Which class each image of a set was taken for by a model.

    Attributes:
        set: The set's name.
        model: The model's name.
        classnames: C names.
        matrix: (C, C + 1) counts, see :func:`cloob.evaluation.measures.zeroshot.confusion_matrix`.
    """

    set: str
    model: str
    classnames: Sequence[str]
    matrix: Tensor


def data_uri(image: bytes) -> str | None:
    """A small WebP of an encoded picture as a data: URI, with nothing of the file but pixels; None if it is broken."""
    try:
        picture = decode(image)
    except Unreadable:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    return _uri(picture, "WEBP", quality=80)


def confusion_panels(confusions: Sequence[Confusion], colours: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each set its pictures, one a model; sets with too few images a class are left out."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for item in confusions:
        images, right = int(item.matrix.sum()), int(item.matrix.diagonal().sum())
        seen = item.matrix.sum(1).nonzero()[:, 0]
        if len(seen) < 2 or images < _MIN_IMAGES * len(seen):
            continue
        uri, size = _picture(item.matrix[seen][:, [*seen.tolist(), -1]], colours[item.model])
        names = [
            {"name": shortened(item.classnames[label], 40), "at": round(100 * (i + 0.5) / len(seen), 2)}
            for i, label in enumerate(seen.tolist())
            if i % -(-len(seen) // _MAX_NAMES) == 0
        ]
        alt = (
            f"Confusion of {item.model} on {item.set}: {100 * right / images:.1f} % of {images} images on the diagonal"
        )
        panel = {"model": item.model, "colour": colours[item.model], "uri": uri, "size": size, "alt": alt}
        sets.setdefault(item.set, []).append({**panel, "names": names, "worst": _worst(item)})
    return [{"set": name, "models": models} for name, models in sets.items()]


def _worst(item: Confusion) -> list[dict[str, str]]:
    """The most frequent confusions as shares of a class's images; ties go to the earlier class."""
    totals = item.matrix.sum(1)
    shares = item.matrix.double() / totals.clamp_min(1)[:, None]
    shares.diagonal().zero_()
    names = [*item.classnames, "(unreadable)"]
    order = shares.flatten().sort(descending=True, stable=True)
    cells = [divmod(cell, len(names)) for cell in order.indices[order.values > 0][:_WORST_SHOWN].tolist()]
    return [
        {
            "label": shortened(names[label], 60),
            "taken": shortened(names[predicted], 60),
            "count": f"{int(item.matrix[label, predicted])} of {int(totals[label])}",
        }
        for label, predicted in cells
    ]


def _picture(matrix: Tensor, colour: int) -> tuple[str, int]:
    """A data: URI of the shares of each class's images, and the cells along a side.

    The opacity is the root of a share, so that rare confusions are seen; of many classes neighbours share a cell.
    """
    n = len(matrix)
    blocks = F.one_hot(torch.arange(n) // -(-n // _MAX_CELLS)).double()
    counts = blocks.T @ matrix[:, :n].double() @ blocks
    totals = blocks.T @ matrix.sum(1).double()
    alpha = (255 * (counts / totals[:, None]).clamp(0, 1).sqrt()).round().to(torch.uint8)
    picture = require("PIL.Image", "train").frombytes("P", (len(alpha), len(alpha)), alpha.numpy().tobytes())
    picture.putpalette(bytes.fromhex(_COLOURS[colour % len(_COLOURS)]) * 256)
    return _uri(picture, "PNG", transparency=bytes(range(256)), optimize=True), len(alpha)


def _uri(picture: Image, form: str, **options: Any) -> str:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
