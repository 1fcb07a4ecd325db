"""Public models for photographs: what ``cloob find`` takes, and what ``cloob models --for photos`` lists."""

from __future__ import annotations

from typing import NamedTuple


class PhotoModel(NamedTuple):
    """A model of open_clip; its size is that of its parameters in float32."""

    name: str
    megabytes: int
    pixels: int  # of a side of the picture that it sees
    licence: str
    languages: str


PHOTOS = (
    PhotoModel("ViT-B-32-256/datacomp_s34b_b86k", 605, 256, "MIT", "English"),
    PhotoModel("ViT-L-14/datacomp_xl_s13b_b90k", 1710, 224, "MIT", "English"),
    PhotoModel("MobileCLIP2-S0/dfndr2b", 299, 256, "Apple, research only", "English"),
    PhotoModel("ViT-B-32-SigLIP2-256/webli", 1507, 256, "Apache 2.0", "many"),
    PhotoModel("xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k", 1464, 224, "MIT", "many"),
)
"""The first is the default."""
