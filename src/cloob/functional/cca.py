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

All is float64 but for ``single`` numbers, by which one chooses. Of many pairs no row
is kept: they come in blocks, each a ``PairMoments``, which add. Of fewer pairs than
columns the rows are kept: their singular value decomposition gives the same directions
without an (F, F) matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor


class _AnyPrecision:
    """Numbers of pairs in float64, or in float32 where they only choose."""

    def single(self) -> Self:
        """The same in float32: a third of the time, and some six digits."""
        tensors = {k: v.float() for k, v in vars(self).items() if torch.is_tensor(v)}
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class PairMoments(_AnyPrecision):
    """Weight, means and centred second moments of pairs of rows; those of disjoint sets
    add (Chan et al. 1983).
    """

    count: float  # number of pairs, or the sum of their weights
    mean_a: Tensor  # (F_a,) float64, as all of these
    mean_b: Tensor  # (F_b,)
    aa: Tensor  # (F_a, F_a): the sum over pairs of (a - mean_a)ᵀ (a - mean_a)
    bb: Tensor  # (F_b, F_b)
    ab: Tensor  # (F_a, F_b)
    rounding: float  # of the numbers that came in, relative

    @classmethod
    def of(cls, a: Tensor, b: Tensor, weights: Tensor | None = None) -> PairMoments:
        """The moments of (n, F_a) and (n, F_b) rows with (n,) weights of 0 or more; n
        is 1 or more, and a weight of 2 counts as a pair that is there twice.
        """
        rows = CentredRows.of(a, b, weights)
        means = rows.mean_a, rows.mean_b
        a, b = rows.a, rows.b
        return cls(rows.count, *means, a.T @ a, b.T @ b, a.T @ b, rows.rounding)

    def __add__(self, other: PairMoments) -> PairMoments:
        count = self.count + other.count
        step_a = other.mean_a - self.mean_a
        step_b = other.mean_b - self.mean_b
        weight = self.count * other.count / count
        return PairMoments(
            count,
            self.mean_a + step_a * (other.count / count),
            self.mean_b + step_b * (other.count / count),
            (self.aa + other.aa).addr_(step_a, step_a, alpha=weight),
            (self.bb + other.bb).addr_(step_b, step_b, alpha=weight),
            (self.ab + other.ab).addr_(step_a, step_b, alpha=weight),
            max(self.rounding, other.rounding),
        )


@dataclass(frozen=True)
class CentredRows(_AnyPrecision):
    """Pairs of rows without their mean, times the root of their weight."""

    count: float
    mean_a: Tensor  # (F_a,) float64, as all of these
    mean_b: Tensor
    a: Tensor  # (n, F_a)
    b: Tensor  # (n, F_b)
    rounding: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, weights: Tensor | None = None) -> CentredRows:
        """Those of (n, F_a) and (n, F_b) rows."""
        rounding = max(_rounding(a.dtype), _rounding(b.dtype))
        a, b = a.double(), b.double()
        if weights is None:
            mean_a, mean_b = a.mean(0), b.mean(0)
            return cls(len(a), mean_a, mean_b, a - mean_a, b - mean_b, rounding)
        weights = weights.double()
        count = float(weights.sum())
        share = weights / max(count, torch.finfo(weights.dtype).tiny)
        mean_a, mean_b = share @ a, share @ b
        root = weights.sqrt().unsqueeze(1)
        a, b = root * (a - mean_a), root * (b - mean_b)
        return cls(count, mean_a, mean_b, a, b, rounding)


class CanonicalDirections(NamedTuple):
    """The directions of both sides, strongest first; D = min(F_a, F_b), or fewer of
    few pairs.
    """

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
    pairs: PairMoments | CentredRows,
    ridges: Iterable[float],
    *,
    by_column: bool = False,
) -> Iterator[CanonicalDirections]:
    """The directions for one ridge after another, from one decomposition a side: a
    ridge costs an SVD.

    Args:
        pairs: Moments of the pairs, or their rows, which cost less where there are
            fewer of them than columns.
        ridges: Shares r > 0 of a side's mean variance that are added to its variances
            (see above).
        by_column: Divide every column by its deviation first; the matrices take columns
            as they are.

    Example:
        >>> import torch
        >>> from cloob.functional.cca import PairMoments, canonical_directions
        >>> cause = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> a, b = cause @ torch.ones(3, 8).triu(), cause @ torch.ones(3, 5).tril()
        >>> directions = next(canonical_directions(PairMoments.of(a, b), [1e-6]))
        >>> directions.correlations.round(decimals=3).tolist()
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """
    rounding_a = pairs.rounding * pairs.mean_a.abs()
    rounding_b = pairs.rounding * pairs.mean_b.abs()
    if isinstance(pairs, PairMoments):
        side_a = _side_of_moments(pairs.aa / pairs.count, rounding_a, by_column)
        side_b = _side_of_moments(pairs.bb / pairs.count, rounding_b, by_column)
        scales = torch.outer(side_a.scale, side_b.scale)
        covariance = pairs.ab / pairs.count / scales
        cross = side_a.vectors.T @ covariance @ side_b.vectors
    else:
        side_a = _side_of_rows(pairs.a, pairs.count, rounding_a, by_column)
        side_b = _side_of_rows(pairs.b, pairs.count, rounding_b, by_column)
        scores_a = (pairs.a / side_a.scale) @ side_a.vectors
        scores_b = (pairs.b / side_b.scale) @ side_b.vectors
        cross = scores_a.T @ scores_b / pairs.count
    for ridge in ridges:
        root_a, root_b = side_a.whitening(ridge), side_b.whitening(ridge)
        whitened = root_a.unsqueeze(1) * cross * root_b
        u, correlations, vt = _svd(whitened)
        a = side_a.vectors @ (root_a.unsqueeze(1) * u)
        b = side_b.vectors @ (root_b.unsqueeze(1) * vt.T)
        largest = a.gather(0, a.abs().argmax(0, keepdim=True))
        signs = largest.sign()  # a direction's largest entry is above 0
        yield CanonicalDirections(
            a * signs / side_a.scale.unsqueeze(1),
            b * signs / side_b.scale.unsqueeze(1),
            correlations,
        )


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ; in float32 by the smaller Gram matrix, in a third of the time: there
    rows of Vᵀ whose value is about 0 are not of unit length, and their weight is 0.
    """
    if matrix.dtype == torch.float64:
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u, values, vt
    if matrix.shape[0] > matrix.shape[1]:
        u, values, vt = _svd(matrix.T)
        return vt.T, values, u.T
    squares, u = _eigh(matrix @ matrix.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    u = u.flip(1)
    return u, values, (u.T @ matrix) / values.clamp_min(1e-6).unsqueeze(1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors. Of some float32 matrices that have many eigenvalues
    around zero LAPACK finds none, or NaN.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError is one
        is_found = False
    else:
        is_found = bool(values.isfinite().all())
    if not is_found:
        values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


class _Side(NamedTuple):
    """One side's covariance, of columns divided by ``scale``, in its eigenvectors."""

    scale: Tensor  # (F,)
    values: Tensor  # (K,) eigenvalues above zero
    vectors: Tensor  # (F, K)
    mean_variance: Tensor  # over all F

    def whitening(self, ridge: float) -> Tensor:
        """(K,) inverse roots of the eigenvalues with the ridge."""
        return (self.values + ridge * self.mean_variance).rsqrt()


def _side_of_moments(covariance: Tensor, rounding: Tensor, by_column: bool) -> _Side:
    scale = _divisors(covariance.diagonal(), rounding, by_column)
    values, vectors = _eigh(covariance / torch.outer(scale, scale))
    values = values.clamp_min(torch.finfo(values.dtype).tiny)
    return _Side(scale, values, vectors, values.mean())


def _side_of_rows(
    rows: Tensor, count: float, rounding: Tensor, by_column: bool
) -> _Side:
    """By a QR decomposition of the transposed rows, and the SVD of its small factor."""
    if len(rows) >= rows.shape[1]:
        return _side_of_moments(rows.T @ rows / count, rounding, by_column)
    scale = _divisors(rows.square().sum(0) / count, rounding, by_column)
    divided = rows / scale
    basis, small = torch.linalg.qr(divided.T)
    vectors, roots, _ = torch.linalg.svd(small, full_matrices=False)
    values = (roots.square() / count).clamp_min(torch.finfo(roots.dtype).tiny)
    mean_variance = divided.square().sum() / count / rows.shape[1]
    return _Side(scale, values, basis @ vectors, mean_variance)


def _divisors(variances: Tensor, rounding: Tensor, by_column: bool) -> Tensor:
    """The columns' deviations, or ones; what is left of a constant column is
    rounding.
    """
    if not by_column:
        return torch.ones_like(variances)
    deviations = variances.sqrt()
    return deviations.masked_fill(deviations <= rounding, 1.0)


def _rounding(dtype: torch.dtype) -> float:
    """How far a mean of numbers of a type may be from theirs, relative."""
    return 1e-13 if dtype == torch.float64 or not dtype.is_floating_point else 1e-6
