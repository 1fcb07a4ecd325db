"""The training augmentation: a random crop, drawn before the image is decoded, and
resized.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from cloob.pictures import axes

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_REDUCTIONS = (8, 4, 2)  # what a JPEG decoder can do
_WORTH_SHARING = (
    200 * 200
)  # pixels from which on a copy costs more than going without it


def resize(pixels: Tensor, size: int) -> Tensor:
    """``(c, h, w)`` uint8 pixels as ``(c, size, size)``: Pillow's bicubic within one
    grey level, but faster.
    """
    batch = pixels[None]
    return interpolate(
        batch, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )[0]


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniforms: list[float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width as torchvision's RandomResizedCrop has them; a try
    takes two of the ``uniforms``.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(_TRIES):
        target = area * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * i])
        aspect = math.exp(low + (high - low) * uniforms[2 * i + 1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniforms[2 * _TRIES] * (height - h + 1))
            left = int(uniforms[2 * _TRIES + 1] * (width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


class Crop(NamedTuple):
    """A sample's crop in pixels of the stored image, multiples of ``reduction``, by
    which a JPEG may be smaller.
    """

    top: int
    left: int
    height: int
    width: int
    reduction: int
    flip: bool  # the result
    source_size: tuple[int, int]  # width and height of the image
    orientation: int = (
        1  # EXIF's, 1 to 8: how the result is turned, before it is mirrored
    )


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic) and, with ``flip``, a mirror image half of the
    time.

    ``flip`` is off by default: captions, signs and letters name left and right.

    With ``reduce``, a crop of at least twice ``image_size`` is moved to even pixels (of
    four or eight times, to multiples of four or eight: by less than one pixel of the
    result), so that a JPEG can be decoded at half its size. The mean difference to the
    same crop of the full image is one grey level at a crop of 3.5 times ``image_size``,
    and three at just twice.
    """

    image_size: int  # side of the square result
    scale: tuple[float, float] = (
        0.9,
        1.0,
    )  # parts of the image's area that a crop keeps, smallest and largest
    flip: bool = False
    reduce: bool = True

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        return self.take(image, self.draw(*image.size, generator))

    def draw(
        self, width: int, height: int, generator: torch.Generator, orientation: int = 1
    ) -> Crop:
        """Draws a crop of an upright image of this size; returns its place in the
        stored one.
        """
        uniforms = torch.rand(
            2 * _TRIES + 3, generator=generator, dtype=torch.float64
        ).tolist()
        top, left, h, w = crop_box(height, width, self.scale, _RATIO, uniforms)
        swap, reverse_rows, reverse_columns = axes(orientation)
        if reverse_rows:
            top = height - top - h
        if reverse_columns:
            left = width - left - w
        if swap:
            top, left, h, w, width, height = left, top, w, h, height, width
        smaller = min(h, w) // self.image_size if self.reduce else 1
        r = next((r for r in _REDUCTIONS if r <= smaller), 1)
        flip = self.flip and uniforms[-1] < 0.5
        return Crop(
            top - top % r,
            left - left % r,
            h - h % r,
            w - w % r,
            r,
            flip,
            (width, height),
            orientation,
        )

    def take(self, image: Image.Image, crop: Crop) -> Tensor:
        """The crop, upright; ``image`` is RGB as stored, or smaller by a factor of
        ``crop.reduction``.
        """
        top, left, h, w = crop[:4]
        if image.size != crop.source_size:
            width, height = crop.source_size
            factors = (r for r in reversed(_REDUCTIONS) if r <= crop.reduction)
            r = {(-(-width // r), -(-height // r)): r for r in factors}[image.size]
            top, left, h, w = top // r, left // r, h // r, w // r
        pixels = None
        if image.width * image.height >= _WORTH_SHARING:
            with contextlib.suppress(
                ValueError, TypeError, pa.ArrowException
            ):  # above 16 MB it lies in several pieces
                stored = torch.from_dlpack(pa.array(image).values)  # type: ignore[attr-defined]
                pixels = stored.view(image.height, image.width, 4).permute(
                    2, 0, 1
                )  # the fourth byte has no meaning
        pixels = (
            torch.from_numpy(np.array(image)).permute(2, 0, 1)
            if pixels is None
            else pixels
        )
        pixels = resize(pixels[:, top : top + h, left : left + w], self.image_size)[:3]
        swap, reverse_rows, reverse_columns = axes(crop.orientation)
        if swap:
            pixels = pixels.transpose(-1, -2)
        if reverse_rows:
            pixels = pixels.flip(-2)
        return pixels.flip(-1) if reverse_columns != crop.flip else pixels
