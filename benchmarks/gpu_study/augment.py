"""Augmentation of a whole batch on its device: crops, mirrors and colours, without a picture leaving it.

Each picture draws for itself. The ranges are mild, as they are in the paper's training (crops of 90 to 100 % of the
area); colour and mirrors are for many epochs of few pictures, and no caption here says left or right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CROP = (0.9, 1.0)  # of the area
ASPECT = (3 / 4, 4 / 3)
COLOUR = 0.2  # brightness, contrast and saturation, as a share
_GREY = (0.299, 0.587, 0.114)


def augment(images: Tensor, generator: torch.Generator, *, mirror: bool = True) -> Tensor:
    """Another look at each picture.

    Args:
        images: (n, 3, H, W) uint8.
        generator: On the device of the images.
        mirror: Half of the pictures are mirrored.

    Returns:
        (n, 3, H, W) uint8.
    """
    pixels = recoloured(cropped(images.float(), generator, mirror=mirror), generator)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def cropped(pixels: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """A random part of each picture, resized bilinearly to the whole; (n, 3, H, W) float."""
    n, device = len(pixels), pixels.device
    area = _uniform(n, *CROP, generator, device)
    aspect = _uniform(n, math.log(ASPECT[0]), math.log(ASPECT[1]), generator, device).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # In the coordinates of affine_grid a picture goes from −1 to 1: a part of width w has its centre within ±(1 − w).
    x = _uniform(n, -1, 1, generator, device) * (1 - width)
    y = _uniform(n, -1, 1, generator, device) * (1 - height)
    if mirror:
        width = torch.where(torch.rand(n, generator=generator, device=device) < 0.5, -width, width)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recoloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of each picture changed by a factor of 1 ± ``COLOUR``."""
    factors = [_uniform(len(pixels), 1 - COLOUR, 1 + COLOUR, generator, pixels.device) for _ in range(3)]
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors)
    pixels = pixels * brightness
    weights = torch.tensor(_GREY, device=pixels.device).view(1, 3, 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    pixels = mean + contrast * (pixels - mean)
    grey = (pixels * weights).sum(1, keepdim=True)
    return grey + saturation * (pixels - grey)


def _uniform(n: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator, device=device)
