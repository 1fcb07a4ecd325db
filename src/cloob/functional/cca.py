"""Regularised canonical correlation analysis (CCA) in closed form: two matrices that
bring pairs of rows together.

With covariances C_a, C_b and cross-covariance C_ab of N centred pairs (a, b), and a
ridge r on every side,

    R_x = C_x + r · tr(C_x) / F_x · I,    U S Vᵀ = R_a^(-1/2) C_ab R_b^(-1/2),
    A = R_a^(-1/2) U,    B = R_b^(-1/2) V,

the columns of A and B are the canonical directions and S their correlations (Hotelling
1936; with ridges Vinod 1976). Rows a·A·S^p and b·B·S^p are compared by their cosine:
the power p weights a direction by how well both sides agree in it, which is what
"canonical similarity analysis" (CSA, arXiv:2410.07610) does with its weighted cosine.

All is float64, and no row is kept: pairs of any number come in blocks, each a
    ``PairMoments``, which add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairMoments:
    """Number, means and centred second moments of pairs of rows; those of disjoint sets
    add (Chan et al. 1983).
    """

    count: int
    mean_a: Tensor  # (F_a,) float64, as all of these
    mean_b: Tensor  # (F_b,)
    aa: Tensor  # (F_a, F_a): the sum over pairs of (a - mean_a)ᵀ (a - mean_a)
    bb: Tensor  # (F_b, F_b)
    ab: Tensor  # (F_a, F_b)

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> PairMoments:
        """The moments of (n, F_a) and (n, F_b) rows; n is 1 or more."""
        a, b = a.double(), b.double()
        mean_a, mean_b = a.mean(0), b.mean(0)
        a, b = a - mean_a, b - mean_b
        return cls(len(a), mean_a, mean_b, a.T @ a, b.T @ b, a.T @ b)

    def __add__(self, other: PairMoments) -> PairMoments:
        count = self.count + other.count
        step_a, step_b = other.mean_a - self.mean_a, other.mean_b - self.mean_b
        weight = self.count * other.count / count
        return PairMoments(
            count,
            self.mean_a + step_a * (other.count / count),
            self.mean_b + step_b * (other.count / count),
            (self.aa + other.aa).addr_(step_a, step_a, alpha=weight),
            (self.bb + other.bb).addr_(step_b, step_b, alpha=weight),
            (self.ab + other.ab).addr_(step_a, step_b, alpha=weight),
        )


class CanonicalDirections(NamedTuple):
    """The directions of both sides, strongest first; D = min(F_a, F_b)."""

    a: Tensor  # (F_a, D) float64
    b: Tensor  # (F_b, D)
    correlations: Tensor  # (D,), not below 0

    def weighted(self, power: float) -> tuple[Tensor, Tensor]:
        """The (F_a, D) and (F_b, D) matrices whose rows are compared by their
        cosine.
        """
        weights = self.correlations**power
        return self.a * weights, self.b * weights


def canonical_directions(
    moments: PairMoments, ridges: Iterable[float], *, by_column: bool = False
) -> Iterator[CanonicalDirections]:
    """The directions for one ridge after another, from one eigendecomposition a side: a
    ridge costs an SVD.

    Args:
        moments: Those of the pairs.
        ridges: Shares r > 0 of a side's mean variance that are added to its variances
            (see above).
        by_column: Divide every column by its deviation first; the matrices take columns
            as they are.

    Example:
        >>> import torch
        >>> from cloob.functional.cca import PairMoments, canonical_directions
        >>> cause = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> a = cause @ torch.ones(3, 8).triu()
        >>> b = cause @ torch.ones(3, 5).tril()
        >>> moments = PairMoments.of(a, b)
        >>> directions = next(canonical_directions(moments, [1e-6]))
        >>> directions.correlations.round(decimals=3).tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    scale_a, values_a, vectors_a = _side(
        moments.aa / moments.count, moments.mean_a, by_column
    )
    scale_b, values_b, vectors_b = _side(
        moments.bb / moments.count, moments.mean_b, by_column
    )
    cross = (
        vectors_a.T
        @ (moments.ab / moments.count / torch.outer(scale_a, scale_b))
        @ vectors_b
    )
    for ridge in ridges:
        root_a, root_b = (
            (values + ridge * values.mean()).rsqrt() for values in (values_a, values_b)
        )
        u, correlations, vt = torch.linalg.svd(
            root_a.unsqueeze(1) * cross * root_b, full_matrices=False
        )
        a, b = (
            vectors_a @ (root_a.unsqueeze(1) * u),
            vectors_b @ (root_b.unsqueeze(1) * vt.T),
        )
        signs = a.gather(
            0, a.abs().argmax(0, keepdim=True)
        ).sign()  # a direction's largest entry is above 0
        yield CanonicalDirections(
            a * signs / scale_a.unsqueeze(1),
            b * signs / scale_b.unsqueeze(1),
            correlations,
        )


def _side(
    covariance: Tensor, mean: Tensor, by_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The divisors of a side's columns; eigenvalues, above zero, and eigenvectors of
    the quotients' covariance.
    """
    scale = covariance.diagonal().sqrt() if by_column else torch.ones_like(mean)
    scale = scale.masked_fill(
        scale <= 1e-6 * mean.abs(), 1.0
    )  # what is left of a constant column is rounding
    values, vectors = torch.linalg.eigh(covariance / torch.outer(scale, scale))
    return scale, values.clamp_min(torch.finfo(values.dtype).tiny), vectors
