"""Heads that lead two kinds of rows into one space; several of them as one, with a bias
against hubs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.data.source import spread

Standardise = Literal["column", "one", "none"]
Transform = Literal["plain", "root", "log", "ranks"]
Kind = Literal["linear", "mlp", "fourier"]
Side = Literal["a", "b"]
N_NEAREST = 10
MAX_BIAS = 0.25
SHARE = MAX_BIAS**0.5
N_RANKS = 32
N_WAVES = 512
N_DISTANT = 500  # rows whose distances say how long a wave is


class Columns(NamedTuple):
    """What happens to a side's columns before a head's matrix."""

    transform: Transform
    standardise: Standardise

    def __str__(self) -> str:
        return f"{self.transform}, {self.standardise}"


class Head(nn.Module):
    """(n, F) features of n items to (n, D) rows of the shared space, not yet of unit
    length.

    The features are standardised first, by the training set (``fit``). Pooled features
    of a network with ReLUs share a large mean, and rows that are all alike are what
    contrast and retrieval can do least with.

    A ``"linear"`` head is dropout and a matrix. An ``"mlp"`` adds a branch of a hidden
    layer of 2 D, GELU and dropout to that matrix; its last matrix starts at zero, so
    that an mlp starts as the linear head. There is no layer norm: in rows of few
    columns it would remove information. A ``"fourier"`` head is a matrix of 512 cosines
    of random waves, whose products approach a Gaussian kernel of rows (Rahimi and Recht
    2007); ``draw_waves`` draws them, and its matrix is solved for.

    Args:
        features: Width F of the rows that come in.
        embed_dim: Width D of those that go out.
        kind: ``"linear"``, ``"mlp"`` or ``"fourier"``.
        dropout: In front of a linear head's matrix, or in the hidden layer of an mlp.
        standardise: Every feature loses its mean, then ``"one"`` divides all by one
            number, ``"column"`` every column by its standard deviation (a constant one
            by 1). ``"none"`` leaves them as they are.
        columns: What is done to every feature before: nothing (``"plain"``), the
            ``"root"`` or the ``"log"`` of 1 and its size, with its sign, or its
            ``"ranks"`` among the training set's, which are 32 steps.

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
    mean_rest: Tensor  # what float32 cannot hold of the mean
    scale: Tensor
    knots: Tensor  # (33, F) quantiles of the training set
    frequencies: Tensor  # (F, 512)
    phases: Tensor  # (512,)

    def __init__(
        self,
        features: int,
        embed_dim: int,
        kind: Kind = "linear",
        dropout: float = 0.0,
        standardise: Standardise = "one",
        columns: Transform = "plain",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "features": features,
            "embed_dim": embed_dim,
            "kind": kind,
            "dropout": dropout,
            "standardise": standardise,
            "columns": columns,
        }
        self.kind, self.standardise, self.columns = kind, standardise, columns
        if columns == "ranks":
            self.register_buffer("knots", torch.zeros(N_RANKS + 1, features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("mean_rest", torch.zeros(features))
        n_scales = features if standardise == "column" else ()
        self.register_buffer("scale", torch.ones(n_scales))
        width = features
        if kind == "fourier":
            self.register_buffer("frequencies", torch.zeros(features, N_WAVES))
            self.register_buffer("phases", torch.zeros(N_WAVES))
            width = N_WAVES
        self.matrix = nn.Linear(width, embed_dim)
        self.dropout = nn.Dropout(0.0 if kind == "mlp" else dropout)
        self.branch: nn.Module | None = None
        if kind == "mlp":
            self.branch = hidden_branch(features, embed_dim, dropout)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Takes mean and scale from the (N, F) features of the training set; the mean
        squared entry becomes 1.
        """
        if self.standardise == "none":
            return
        rows = features.cpu().double()  # MPS has no float64
        if self.columns == "ranks":
            places = torch.linspace(0, len(rows) - 1, N_RANKS + 1).round().long()
            self.knots.copy_(rows.sort(0).values[places])
        rows = self.transformed(rows)
        mean = rows.mean(0)
        self.mean.copy_(mean)
        self.mean_rest.copy_(mean - self.mean.cpu().double())
        centred = rows - mean
        if self.standardise == "one":
            size = torch.linalg.vector_norm(centred) / centred.numel() ** 0.5
            self.scale.copy_(size if float(size) > 0 else torch.ones(()))
            return
        deviation = torch.linalg.vector_norm(centred, dim=0) / len(centred) ** 0.5
        is_float = features.is_floating_point()
        rounding = 8 * torch.finfo(features.dtype).eps if is_float else 0.0
        is_constant = deviation <= rounding * mean.abs()
        self.scale.copy_(deviation.masked_fill(is_constant, 1.0))

    @torch.no_grad()
    def draw_waves(self, features: Tensor, bandwidth: float, seed: int) -> None:
        """Draws the waves of a ``"fourier"`` head.

        Args:
            features: (N, F) ones of the training set, after ``fit``.
            bandwidth: Width of the kernel, in median distances of two rows.
            seed: The two sides have waves of their own.
        """
        rows = self.scaled(features)
        distances = torch.pdist(rows[spread(len(rows), min(N_DISTANT, len(rows)))])
        apart = distances[distances > 0]
        width = bandwidth * (float(apart.median()) if len(apart) else 1.0)
        generator = torch.Generator().manual_seed(seed)
        self.frequencies.normal_(generator=generator).div_(width)
        self.phases.uniform_(0, 2 * math.pi, generator=generator)

    @torch.no_grad()
    def set_matrix(self, mean: Tensor, matrix: Tensor) -> None:
        """Makes a head without a branch give (standardised features - mean) @ matrix,
        then zeros.

        Args:
            mean: (F,).
            matrix: (F, D') with D' at most D.
        """
        width = matrix.shape[1]
        self.matrix.weight.zero_()[:width] = matrix.T
        self.matrix.bias.zero_()[:width] = -(mean @ matrix)

    @torch.no_grad()
    def start_from(self, solved: Head, features: Tensor) -> None:
        """Begins with the matrix of a solved head of the same features, as large as the
        own one was on (n, F) ``features``; it is in its first columns. In eval mode.

        With f transformed features, (f - m) / s scaled here and (f - m') / s' in the
        solved head of matrix W' and bias c', W = W' s / s' and c = c' + W'(m - m') / s'
        give the same rows.
        """
        size = self(features).square().mean()
        matrix = solved.matrix.weight[: len(self.matrix.weight)]
        bias = solved.matrix.bias[: len(matrix)]
        shift = self.mean - solved.mean + (self.mean_rest - solved.mean_rest)
        self.matrix.weight.zero_()[: len(matrix)] = matrix * self.scale / solved.scale
        self.matrix.bias.zero_()[: len(matrix)] = bias + matrix @ (shift / solved.scale)
        ratio = (size / self(features).square().mean().clamp_min(1e-30)).sqrt()
        self.matrix.weight.mul_(ratio)
        self.matrix.bias.mul_(ratio)

    def transformed(self, features: Tensor) -> Tensor:
        """The features as ``columns`` says."""
        if self.columns == "plain":
            return features
        if self.columns == "root":
            return features.sign() * features.abs().sqrt()
        if self.columns == "log":
            return features.sign() * features.abs().log1p()
        ranks = torch.zeros_like(features)
        for low, high in zip(self.knots[:-1], self.knots[1:], strict=True):
            step = (high - low).clamp_min(1e-30)
            ranks = ranks + ((features - low) / step).clamp(0, 1)
        return ranks / N_RANKS

    def standardised(self, features: Tensor) -> Tensor:
        """The float32 numbers that the matrix takes: scaled features, or waves of
        them.
        """
        rows = self.scaled(features)
        if self.kind != "fourier":
            return rows
        return torch.cos(rows @ self.frequencies + self.phases)

    def scaled(self, features: Tensor) -> Tensor:
        """The float32 features without mean and scale; float64 ones lose their mean
        before they are rounded.
        """
        features = self.transformed(features)
        if features.dtype == torch.float64:
            mean = self.mean.double() + self.mean_rest.double()
            centred = (features - mean).float()
        else:
            centred = features - self.mean - self.mean_rest
        return centred / self.scale

    def forward(self, features: Tensor) -> Tensor:
        rows = self.standardised(features)
        out: Tensor = self.matrix(self.dropout(rows))
        return out if self.branch is None else out + self.branch(rows)


def hidden_branch(features: int, embed_dim: int, dropout: float) -> nn.Module:
    """A hidden layer, whose last matrix starts at zero."""
    hidden = nn.Linear(features, 2 * embed_dim)
    last = nn.Linear(2 * embed_dim, embed_dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(hidden, nn.GELU(), nn.Dropout(dropout), last)


class Members(nn.Module):
    """(n, F) features to (n, D) unit rows: those of several heads side by side, as long
    as one, so that a cosine of two rows is the mean of the heads' cosines.

    With a ``bank``, unit rows of the other side, an item x loses b(x) = strength ·
    (m(x) − mean of m), where m is the mean cosine of its ten nearest rows of the bank:
    half of it is CSLS (Conneau et al. 2018). As a dot product alone knows it, the rows
    have four columns more: (x, −b(x)/s, s, r, 0) on one side and (y, s, −b(y)/s, 0, r)
    on the other have the product x·y − b(x) − b(y), and r gives all rows one length. A
    query's bias moves all answers alike.

    ``cut``: columns that are kept of those side by side, by the orthogonal ``axes``;
    ``rows``: size of the bank.
    """

    axes: Tensor
    bank: Tensor
    usual: Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        *,
        cut: int = 0,
        side: Literal[0, 1] = 0,
        rows: int = 0,
        strength: float = 0.5,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        width = sum(head.options["embed_dim"] for head in heads)
        if cut:
            self.register_buffer("axes", torch.zeros(width, cut))
            width = cut
        if rows:
            self.register_buffer("bank", torch.zeros(rows, width))
            self.register_buffer("usual", torch.zeros(()))
        self.options: dict[str, Any] = {
            "features": heads[0].options["features"],
            "embed_dim": width + 4 * (rows > 0),
            "kind": "members",
            "dropout": 0.0,
            "members": [head.options for head in heads],
            "cut": cut,
            "hubs": {"side": side, "rows": rows, "strength": strength},
        }

    def forward(self, features: Tensor) -> Tensor:
        return self.joined([F.normalize(head(features), dim=1) for head in self.heads])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """As ``forward``, of the unit rows of all heads."""
        rows = self.cut(side_by_side(parts))
        hubs = self.options["hubs"]
        if not hubs["rows"]:
            return rows
        excess = hubs["strength"] * (self.nearness(rows) - self.usual)
        bias = excess.clamp(-MAX_BIAS, MAX_BIAS).unsqueeze(1) / SHARE
        share = torch.full_like(bias, SHARE)
        filler = (MAX_BIAS - bias**2).clamp_min(0).sqrt()  # gives rows one length
        zero = torch.zeros_like(filler)
        if hubs["side"] == 0:
            extra = [-bias, share, filler, zero]
        else:
            extra = [share, -bias, zero, filler]
        return torch.cat([rows, *extra], 1)

    def cut(self, rows: Tensor) -> Tensor:
        """Unit rows of as many columns as are kept."""
        return F.normalize(rows @ self.axes, dim=1) if self.options["cut"] else rows

    def nearness(self, rows: Tensor) -> Tensor:
        """(n,) the mean cosine of the nearest rows of the bank."""
        nearest = (rows @ self.bank.T).topk(min(N_NEAREST, len(self.bank)), 1)
        near: Tensor = nearest.values.mean(1)
        return near


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Unit rows of several heads as one unit row each."""
    rows: Tensor = torch.cat([*parts], 1) / len(parts) ** 0.5
    return rows


AnyHead = Head | Members
Heads = tuple[AnyHead, AnyHead]


def head_of(options: Mapping[str, Any]) -> AnyHead:
    """A head with these ``options``, its weights not yet filled."""
    if "members" not in options:
        return Head(**options)
    heads = [Head(**head) for head in options["members"]]
    return Members(heads, cut=options["cut"], **options["hubs"])


@torch.no_grad()
def unit_rows(head: AnyHead, features: Tensor) -> Tensor:
    """(n, D) unit rows, without a graph."""
    return F.normalize(head(features), dim=1)


@torch.no_grad()
def fit_members(
    a: Members, b: Members, parts_a: Sequence[Tensor], parts_b: Sequence[Tensor]
) -> None:
    """Takes axes, banks and usual nearness of both sides from the unit rows of all
    heads for some training pairs.
    """
    rows_a, rows_b = side_by_side(parts_a), side_by_side(parts_b)
    n_kept = a.options["cut"]
    if n_kept:
        # principal directions of both sides, not centred: cosines are compared
        both = torch.cat([rows_a, rows_b])
        axes = torch.linalg.eigh((both.T @ both).double())[1][:, -n_kept:]
        a.axes.copy_(axes)
        b.axes.copy_(axes)
    if a.options["hubs"]["rows"]:
        rows_a, rows_b = a.cut(rows_a), b.cut(rows_b)
        a.bank.copy_(rows_b)
        b.bank.copy_(rows_a)
        a.usual.copy_(a.nearness(rows_a).mean())
        b.usual.copy_(b.nearness(rows_b).mean())
