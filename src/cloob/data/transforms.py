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

from cloob.pictures import Encoded

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
# pixels from which on a copy costs more than going without it
_WORTH_SHARING = 200 * 200


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
    """A sample's crop in pixels, multiples of ``reduction``, by which the image is
    decoded smaller.
    """

    top: int
    left: int
    height: int
    width: int
    reduction: int
    flip: bool  # the result


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic) and, with ``flip``, a mirror image half of the
    time.

    ``flip`` is off by default: captions, signs and letters name left and right.

    A crop of a JPEG of at least twice ``image_size`` is moved to even pixels (of four
    or eight times, to multiples of four or eight: by less than one pixel of the
    result), so that it can be decoded at half its size. The mean difference to the same
    crop of the full image is one grey level at a crop of 3.5 times ``image_size``, and
    three at just twice.
    """

    image_size: int  # side of the square result
    # parts of the image's area that a crop keeps, smallest and largest
    scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        return self.take(image, self.draw(*image.size, generator))

    def draw(
        self,
        width: int,
        height: int,
        generator: torch.Generator,
        max_reduction: int = 1,
    ) -> Crop:
        """Draws a crop of an image of this size, which can be decoded smaller by a
        factor.
        """
        uniforms = torch.rand(
            2 * _TRIES + 3, generator=generator, dtype=torch.float64
        ).tolist()
        top, left, h, w = crop_box(height, width, self.scale, _RATIO, uniforms)
        factor = self._reduction(min(h, w), max_reduction)
        return Crop(
            top - top % factor,
            left - left % factor,
            h - h % factor,
            w - w % factor,
            factor,
            self.flip and uniforms[-1] < 0.5,
        )

    def crop_of(self, encoded: Encoded, generator: torch.Generator) -> Tensor:
        """A random crop, drawn first: then a JPEG need not be decoded in more detail
        than the crop takes.
        """
        crop = self.draw(*encoded.size, generator, encoded.max_reduction)
        return self.take(encoded.rgb(crop.reduction), crop)

    def _reduction(self, side: int, most: int) -> int:
        """By how much an image may be smaller of which a crop has this shorter side."""
        factor = most
        while factor > 1 and factor * self.image_size > side:
            factor //= 2
        return factor

    def take(self, image: Image.Image, crop: Crop) -> Tensor:
        """The crop of an RGB image that is smaller by ``crop.reduction``."""
        factor = crop.reduction
        top, bottom = crop.top // factor, (crop.top + crop.height) // factor
        left, right = crop.left // factor, (crop.left + crop.width) // factor
        pixels = _pixels(image)[:, top:bottom, left:right]
        # the fourth byte of shared memory has no meaning
        pixels = resize(pixels, self.image_size)[:3]
        return pixels.flip(-1) if crop.flip else pixels


def _pixels(image: Image.Image) -> Tensor:
    """``(c, height, width)`` of an image, of a large one without a copy and with c =
    4.
    """
    if image.width * image.height >= _WORTH_SHARING:
        # above 16 MB it lies in several pieces
        with contextlib.suppress(ValueError, TypeError, pa.ArrowException):
            shared = torch.from_dlpack(pa.array(image).values)  # type: ignore[attr-defined]
            return shared.view(image.height, image.width, 4).permute(2, 0, 1)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
