"""The training augmentation: one random crop, resized; normalisation is the encoder's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

_TRIES = 10
_RATIO = (3 / 4, 4 / 3)


def to_tensor(image: Image.Image) -> Tensor:
    """``(3, H, W)`` uint8 pixels of an RGB image (a view with the channels last in memory)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resizes ``(3, h, w)`` uint8 pixels to ``(3, size, size)``, bicubic with antialiasing.

    Within one grey level of Pillow's bicubic, and four times as fast on large images (uint8 kernels of torch).
    """
    batch = pixels[None]
    return interpolate(batch, size=(size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], uniforms: list[float]
) -> tuple[int, int, int, int]:
    """Where a random resized crop is taken, as torchvision's RandomResizedCrop defines it.

    Up to 10 times an area in ``scale`` and an aspect ratio, log-uniform in ``ratio``, are drawn; the first crop that
    fits is placed uniformly. If none fits, the largest central crop within ``ratio``.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        scale: Smallest and largest part of the image's area.
        ratio: Smallest and largest width/height.
        uniforms: 22 numbers in [0, 1): two a try, and two for the place.

    Returns:
        Top, left, height and width, pixels.
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


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic) and, if asked for, a mirror image half of the time.

    ``flip`` is off by default: captions, signs and letters name left and right.

    Attributes:
        image_size: Side of the square result, pixels.
        scale: Part of the image's area that a crop keeps, smallest and largest.
        ratio: Width/height of a crop, smallest and largest.
        flip: Mirror with probability one half.
    """

    image_size: int
    scale: tuple[float, float] = (0.9, 1.0)
    flip: bool = False
    ratio: tuple[float, float] = _RATIO

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size {self.image_size} must be at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} must be (low, high) with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} must be (low, high) with 0 < low <= high")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """``(3, image_size, image_size)`` uint8; draws from ``generator`` only, always the same count of numbers."""
        uniforms = torch.rand(2 * _TRIES + 3, generator=generator, dtype=torch.float64).tolist()
        top, left, h, w = crop_box(image.height, image.width, self.scale, self.ratio, uniforms)
        pixels = resize(to_tensor(image)[:, top : top + h, left : left + w], self.image_size)
        return pixels.flip(-1) if self.flip and uniforms[-1] < 0.5 else pixels


def train_transform(image_size: int, scale: tuple[float, float] = (0.9, 1.0), flip: bool = False) -> TrainTransform:
    """The augmentation used in training; see ``TrainTransform``. The evaluation transform is the encoder's."""
    return TrainTransform(image_size, scale=scale, flip=flip)
