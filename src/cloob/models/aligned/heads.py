"""The heads that are trained on the features of frozen encoders.

Legend: n rows, F features of the encoder, D dimensions of the shared space.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """(n, F) features to (n, D) rows, not yet of unit length.

    The features are standardised first: each minus its mean, all divided by one scale, both from the training set
    (``fit``). Pooled features of a network with ReLUs share a large mean, and rows that are all alike are what
    contrast and retrieval can do least with.

    A ``"linear"`` head is dropout and a matrix. An ``"mlp"`` adds a branch of layer norm, a hidden layer of 2 D, GELU
    and dropout to that matrix; its last matrix starts at zero, so that an mlp starts as the linear head.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, embed_dim: int, kind: Literal["linear", "mlp"] = "linear", dropout: float = 0.0):
        super().__init__()
        self.options: dict[str, Any] = {"features": features, "embed_dim": embed_dim} | {
            "kind": kind,
            "dropout": dropout,
        }
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(()))
        self.matrix = nn.Linear(features, embed_dim)
        self.dropout: nn.Module = nn.Identity()
        self.branch: nn.Module | None = None
        if kind == "linear":
            self.dropout = nn.Dropout(dropout)
        else:
            last = nn.Linear(2 * embed_dim, embed_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.branch = nn.Sequential(
                nn.LayerNorm(features), nn.Linear(features, 2 * embed_dim), nn.GELU(), nn.Dropout(dropout), last
            )

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Takes mean and scale from the (N, F) features of the training set; the mean squared entry becomes 1."""
        self.mean.copy_(features.mean(0))
        centred = features.cpu().double() - self.mean.cpu()  # MPS has no float64
        self.scale.copy_(centred.square().mean().sqrt().clamp_min(1e-12))

    def forward(self, features: Tensor) -> Tensor:
        rows = (features - self.mean) / self.scale
        out: Tensor = self.matrix(self.dropout(rows))
        return out if self.branch is None else out + self.branch(rows)
