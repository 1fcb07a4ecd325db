"""A model that costs nothing, and folders of pictures for the tests of indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from cloob.search.build import Effort
from cloob.search.scan.open import ScanOptions
from cloob.search.update import UpdateOptions

SIDE = 8


class FakeEncoder(nn.Module):
    """Pixels through one random matrix; the same seed gives the same weights."""

    def __init__(self, name: str = "fake", seed: int = 0, dim: int = 16) -> None:
        super().__init__()
        self.name = name
        self.embed_dim = dim
        weight = torch.randn(dim, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weight", weight)
        self.seen = 0

    def preprocess(self, image: Image.Image, /) -> Tensor:
        return torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1)

    def encode_image(self, images: Tensor, /) -> Tensor:
        self.seen += len(images)
        return normalize((images.flatten(1).float() / 255 - 0.4) @ self.weight.T, dim=1)

    def encode_text(self, texts: Sequence[str], /) -> Tensor:
        rows = [torch.randn(self.embed_dim, generator=torch.Generator().manual_seed(len(text))) for text in texts]
        return normalize(torch.stack(rows), dim=1)


def options(encoder: FakeEncoder, **effort: int | float | bool | None) -> UpdateOptions:
    return UpdateOptions(model=encoder, scan=ScanOptions(), effort=Effort(**{"workers": 0, "batch_size": 4} | effort))


def noise(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture that no other seed gives."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_noise(path: Path, seed: int, **saving: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(path, **saving)
    return path
