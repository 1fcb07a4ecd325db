"""Transformer blocks for towers that open_clip does not have, by n items, L positions,
width d and h heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.models.settings import Pixels

Gelu = Literal["tanh", "exact"]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # an error where the heads do not divide it
        torch.empty(width, device="meta").view(heads, -1)
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Where ``queries`` (n, L) is False, a position attends to all alike; where
        ``keys`` is, none attends to it.
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
        attended: Tensor = self.out(rows.transpose(1, 2).reshape(n, length, width))
        return attended


class Block(nn.Module):
    """Attention and a feed-forward layer with residuals; norms before both as in ViT,
    else after as in BERT.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        eps: float,
        *,
        norm_first: bool,
        gelu: Gelu,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.attention = Attention(width, heads)
        self.norm_1 = nn.LayerNorm(width, eps)
        self.norm_2 = nn.LayerNorm(width, eps)
        self.expand = nn.Linear(width, hidden)
        self.shrink = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        attended = x + self.attention(
            self.norm_1(x) if self.norm_first else x, queries, keys
        )
        x = attended if self.norm_first else self.norm_1(attended)
        hidden = self.expand(self.norm_2(x) if self.norm_first else x)
        out = x + self.shrink(F.gelu(hidden, approximate=self.approximate))
        rows: Tensor = out if self.norm_first else self.norm_2(out)
        return rows


class Blocks(nn.ModuleList):
    """So many blocks of one kind."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        eps: float,
        *,
        norm_first: bool = True,
        gelu: Gelu = "exact",
    ) -> None:
        super().__init__(
            Block(width, heads, hidden, eps, norm_first=norm_first, gelu=gelu)
            for _ in range(layers)
        )

    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        for block in self:
            x = block(x, queries, keys)
        return x


class Patches(nn.Module):
    def __init__(
        self, image_size: int, patch_size: int, width: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch_size, patch_size, bias=bias)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(
            torch.zeros(1 + (image_size // patch_size) ** 2, width)
        )

    def forward(self, images: Tensor) -> Tensor:
        rows = self.conv(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(rows.shape[0], 1, -1)
        return torch.cat([first, rows], 1) + self.position_embedding


class ImageTower(nn.Module):
    """A ViT: with a last norm and a bias of the patches, or with a bias of the
    projection and unit rows.
    """

    def __init__(
        self,
        pixels: Pixels,
        patch: int,
        blocks: Blocks,
        width: int,
        embed_dim: int,
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.preprocess_cfg = pixels
        self.patches = Patches(pixels["size"], patch, width, bias=norm is not None)
        self.blocks = blocks
        self.norm = norm or nn.Identity()
        self.proj = nn.Linear(width, embed_dim, bias=norm is None)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.proj(self.norm(self.blocks(self.patches(images))[:, 0]))
        return rows if self.proj.bias is None else F.normalize(rows, dim=-1)
