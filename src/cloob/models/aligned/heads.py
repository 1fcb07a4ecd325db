"""The heads that are trained on the features of frozen encoders."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Standardise = Literal["column", "one", "none"]


class Head(nn.Module):
    """(n, F) features of n items to (n, D) rows of the shared space, not yet of unit length.

    The features are standardised first, by the training set (``fit``). Pooled features of a network with ReLUs share a
    large mean, and rows that are all alike are what contrast and retrieval can do least with.

    A ``"linear"`` head is dropout and a matrix. An ``"mlp"`` adds a branch of a hidden layer of 2 D, GELU and dropout
    to that matrix; its last matrix starts at zero, so that an mlp starts as the linear head. There is no layer norm: in
    rows of few columns it would remove what they have to say.

    Args:
        features: Width F of the rows that come in.
        embed_dim: Width D of those that go out.
        kind: ``"linear"`` or ``"mlp"``.
        dropout: In front of a linear head's matrix, or in the hidden layer of an mlp.
        standardise: Each feature loses its mean, then ``"one"`` divides all by one number, ``"column"`` each by its own
            spread (a constant one by 1). ``"none"`` leaves them as they are.

    Example:
        >>> import torch
        >>> from cloob import Head
        >>> features = torch.randn(100, 12) + 5
        >>> head = Head(12, 8)
        >>> head.fit(features)
        >>> torch.nn.functional.normalize(head(features), dim=1).shape
        torch.Size([100, 8])
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        embed_dim: int,
        kind: Literal["linear", "mlp"] = "linear",
        dropout: float = 0.0,
        standardise: Standardise = "one",
    ):
        super().__init__()
        options = {"features": features, "embed_dim": embed_dim, "kind": kind, "dropout": dropout}
        self.options: dict[str, Any] = options | ({} if standardise == "one" else {"standardise": standardise})
        self.standardise = standardise
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features if standardise == "column" else ()))
        self.matrix = nn.Linear(features, embed_dim)
        self.dropout: nn.Module = nn.Identity()
        self.branch: nn.Module | None = None
        if kind == "linear":
            self.dropout = nn.Dropout(dropout)
        else:
            last = nn.Linear(2 * embed_dim, embed_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.branch = nn.Sequential(nn.Linear(features, 2 * embed_dim), nn.GELU(), nn.Dropout(dropout), last)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Takes mean and scale from the (N, F) features of the training set; the mean squared entry becomes 1."""
        if self.standardise == "none":
            return
        self.mean.copy_(features.mean(0))
        centred = features.cpu() - self.mean.cpu().double()  # MPS has no float64
        if self.standardise == "one":
            self.scale.copy_((torch.linalg.vector_norm(centred) / centred.numel() ** 0.5).clamp_min(1e-12))
            return
        spread = torch.linalg.vector_norm(centred, dim=0) / len(centred) ** 0.5
        constant = spread <= 1e-6 * self.mean.cpu().abs()  # what is left is rounding of the mean
        self.scale.copy_(spread.masked_fill(constant, 1.0))

    @torch.no_grad()
    def solve(self, mean: Tensor, matrix: Tensor) -> None:
        """Makes a linear head give (features - mean) @ matrix, for an (F,) mean and an (F, D) matrix."""
        self.mean.copy_(mean)
        self.scale.fill_(1.0)
        self.matrix.weight.copy_(matrix.T)
        self.matrix.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        rows = (features - self.mean) / self.scale
        out: Tensor = self.matrix(self.dropout(rows))
        return out if self.branch is None else out + self.branch(rows)
