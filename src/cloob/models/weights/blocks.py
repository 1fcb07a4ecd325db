"""Parts of towers that open_clip does not have: blocks with norms before or after, separate query, key and value.

Shapes: n items, L positions, d the width, h heads.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Gelu = Literal["tanh", "exact"]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        torch.empty(width, device="meta").view(heads, -1)  # an error where the heads do not divide it
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """(n, L, d) to (n, L, d).

        Where ``queries`` (n, L) is False, a position attends to all alike; where ``keys`` is, none attends to it.
        """
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if queries is not None:
            query = query * queries[:, None, :, None]  # all logits 0: a uniform softmax
        mask = None if keys is None else keys[:, None, None, :]
        rows = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joined: Tensor = self.out(rows.transpose(1, 2).reshape(n, length, width))
        return joined


class Block(nn.Module):
    """Attention and a feed-forward layer with residuals; norms before each as in ViT, else after as in BERT."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, *, norm_first: bool, gelu: Gelu) -> None:
        super().__init__()
        self.norm_first, self.approximate = norm_first, "tanh" if gelu == "tanh" else "none"
        self.attention = Attention(width, heads)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.expand, self.shrink = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm_1(x), queries, keys)
            return x + self._feed(self.norm_2(x))
        x = self.norm_1(x + self.attention(x, queries, keys))
        rows: Tensor = self.norm_2(x + self._feed(x))
        return rows

    def _feed(self, x: Tensor) -> Tensor:
        rows: Tensor = self.shrink(F.gelu(self.expand(x), approximate=self.approximate))
        return rows


class Blocks(nn.ModuleList):
    def forward(self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        for block in self:
            x = block(x, queries, keys)
        return x


class Patches(nn.Module):
    def __init__(self, image_size: int, patch_size: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch_size, patch_size, bias=bias)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(torch.zeros(1 + (image_size // patch_size) ** 2, width))

    def forward(self, images: Tensor) -> Tensor:
        rows = self.conv(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(rows.shape[0], 1, -1)
        return torch.cat([first, rows], 1) + self.position_embedding


class Towers(nn.Module):
    """What a ``DualEncoder`` asks of an open_clip module, for two towers of our own; ``logit_scale`` is ln τ⁻¹."""

    def __init__(self, visual: nn.Module, text: nn.Module, logit_scale: float) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale, device="cpu"), requires_grad=False)

    def encode_image(self, images: Tensor) -> Tensor:
        rows: Tensor = self.visual(images)
        return rows

    def encode_text(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.text(tokens)
        return rows


def preprocess(size: int, mean: Any, std: Any, interpolation: str) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` of a tower; ``interpolation`` may be ``"lanczos"`` as well."""
    settings = {"size": size, "mode": "RGB", "mean": tuple(mean), "std": tuple(std), "interpolation": interpolation}
    return settings | {"resize_mode": "shortest", "fill_color": 0}
