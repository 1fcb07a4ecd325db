"""How far the pixels of transformers' image processor are from open_clip's, and what that does to the embeddings."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cloob.models.encoder import DualEncoder

_EXTRA = (0, 3, 7, 11, 8)
"""How much longer than wide the pictures are; at 3, 7, 11, … the two programs round half a row differently."""


def pixel_note(encoder: DualEncoder, processor: Any) -> str:
    """A sentence for the card with the differences on pictures made for it.

    Args:
        encoder: The model.
        processor: What ``AutoImageProcessor`` made of its export.

    Returns:
        Nothing where pixels and embeddings are equal.
    """
    levels = moved = same = 0.0
    std = torch.tensor(encoder.std).view(3, 1, 1)
    for image, extra in _pictures(encoder.image_size):
        own = _normalised(encoder, encoder.preprocess(image))
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        apart = float((encoder.encode_image(own[None]) - encoder.encode_image(theirs[None])).abs().max())
        if extra % 4 == 3:
            moved = max(moved, apart)
        else:
            levels = max(levels, float(((own - theirs) * std * 255).abs().max()))
            same = max(same, apart)
    elsewhere = f"up to {round(levels)} of 255 grey levels, and unit rows up to {same:.1g} apart"
    if encoder.preprocess_cfg.get("resize_mode") == "squash":
        return f"Pixels of transformers and of open_clip are {elsewhere}." if levels > 0.5 else ""
    return (
        "transformers crops pictures of one size in four that is not square one row or column away from where "
        "open_clip does, as the two round half a row differently: on pictures made for this card unit rows are then "
        f"{moved:.2g} apart. "
        f"Otherwise pixels are {elsewhere}. torchvision's `Resize({encoder.image_size}, BICUBIC)` and "
        f"`CenterCrop({encoder.image_size})` before the processor give the pixels of training."
    )


def _pictures(side: int) -> list[tuple[Image.Image, int]]:
    """Pictures of smooth coloured noise, upright and lying, and by how many pixels they are longer than wide."""
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for place, extra in enumerate(_EXTRA):
        coarse = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        size = (side, side + extra) if place % 2 else (side + extra, side)
        pictures.append((Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC), extra))
    square = pictures[0][0].resize((3 * side + 1, 2 * side), Image.Resampling.BICUBIC)
    return [*pictures, (square, int(side * (3 * side + 1) / (2 * side)) - side)]


def _normalised(encoder: DualEncoder, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    return (pixels.float() / 255 - mean) / std
