"""A contrast of any matrix of scores, with soft targets: cosines times τ⁻¹, or what a
hyperbolic, Gaussian or token-wise similarity gives.

Row i is an anchor, column j a candidate, s_ij their score, and p_ij the share of
candidate j in the anchor's positive. With the gap between a positive and all others,

    g_ij = ln Σ_{k≠j} exp(s_ik) − s_ij,

a positive j costs g_ij in InfoLOOB and ln(1 + exp g_ij) in InfoNCE, and an anchor
Σ_j p_ij of that. So both are exact where a positive dominates: nothing is subtracted
after ``exp``. That the sum over "all but j" is exact for every j at once takes a second
sum, the one without the row's largest term; every other j leaves that term in, so that
``Σ_k exp(s_ik) − exp(s_ij)`` is at least half of the whole and loses one bit at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import Contrast
from cloob.functional.checks import lifted, one_of
from cloob.functional.private import outside_autocast, readable

SUM_TOLERANCE = 1e-3  # of the shares of a row; rounded in bfloat16 they are within it


class Positives(NamedTuple):
    """What belongs to an anchor: (N, k) columns with their (N, k) shares, or, with
    columns None, (N, M) shares of all columns.
    """

    columns: Tensor | None
    shares: Tensor

    def of(self, matrix: Tensor) -> Tensor:
        """The entries of an (N, M) matrix that are positives."""
        return matrix if self.columns is None else matrix.gather(1, self.columns)

    def negatives(self, scores: Tensor) -> Tensor:
        """(N, M) 1 − p, of every candidate of ``scores``."""
        if self.columns is None:
            return 1 - self.shares
        return torch.ones_like(scores).scatter_add(1, self.columns, -self.shares)


Targets = Tensor | tuple[Tensor, Tensor] | Positives
"""(N, M) shares, or (N, k) int64 columns and their (N, k) shares."""


@outside_autocast
def contrast_scores(
    scores: Tensor,
    contrast: Contrast = "infoloob",
    *,
    targets: Targets | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One direction of a contrast of scores: ``1/N Σ_i w_i ℓ_i``. For the other
    direction give ``scores.T``.

    With the shares p_i of an anchor's positive (``targets``), and C_i its candidates
    that are not masked,

    - ``"infoloob"``: ``ℓ_i = −Σ_j p_ij ln( exp(s_ij) / Σ_{k∈C_i, k≠j} exp(s_ik) )``.
      Every positive leaves the denominator of its own term, and stays in those of the
      others: this is the expectation of InfoLOOB (Eq. 3 of arXiv:2110.11316) over a
      positive drawn from p_i. Mask the positives, and they stay in no denominator.
    - ``"infonce"``: the same with ``exp(s_ij)`` added to the denominator, the
      cross-entropy of p_i and the softmax. With shares from the similarities of one
      side this is CWCL (arXiv:2309.14580).
    - ``"sigmoid"``: ``ℓ_i = −Σ_j ( p_ij ln σ(s_ij) + (1 − p_ij) ln σ(−s_ij) )``,
      SigLIP's loss (arXiv:2303.15343) for p_ij of 0 and 1, S2L (arXiv:2409.08302) for
      others. Here p_ij are probabilities of their own, and need no sum.

    Args:
        scores: (N, M) scores, with all that multiplies them (τ⁻¹) and is added (a
            bias). −inf is a candidate that is none.
        contrast: ``"infoloob"``, ``"infonce"`` or ``"sigmoid"``.
        targets: (N, M) shares p ≥ 0 whose rows sum to 1, or a tuple of (N, k) int64
            columns and their (N, k) shares. None: the positive of row i is column i,
            and columns from N on are further candidates.
        weights: (N,) factors w_i ≥ 0 of the rows, 1 if None; 0 leaves an anchor out,
            and its positive stays a candidate of the others. The sigmoid also takes (N,
            M) factors of every ``p_ij ln σ(s_ij) + (1 − p_ij) ln σ(−s_ij)``.
        mask: (N, M) bool, True where a candidate is no negative of the row. A positive
            counts as one, masked or not.

    Returns:
        0-d loss, float32 (float64 for float64 scores), also under autocast. It is
        finite for all finite scores, and its gradient too, as long as differences of
        scores are numbers of that dtype. A positive without any negative adds 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, N < 1 or M < 2; N > M without
            targets; shares or weights that are negative or not finite, rows of shares
            that do not sum to 1, columns that there are not (read on the CPU alone,
            where no device waits).
        TypeError: One of them is no tensor.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}; a tensor is expected")
    one_of("contrast", contrast, ("infoloob", "infonce", "sigmoid"))
    if scores.ndim != 2 or not scores.is_floating_point():
        actual = f"scores has shape {tuple(scores.shape)} and dtype {scores.dtype}"
        raise ValueError(f"{actual}; a floating-point matrix (N, M) is expected")
    n, m = scores.shape
    if n < 1 or m < 2:
        raise ValueError(f"scores has shape {(n, m)}; a row and two columns are needed")

    scores = scores.to(lifted(scores))
    may_read = is_readable(scores)
    sigmoid = contrast == "sigmoid"
    positives = read_targets(
        targets, (n, m), scores, sum_to_1=not sigmoid, may_read=may_read
    )
    factors = read_weights(weights, (n, m), scores, by_entry=sigmoid, may_read=may_read)
    check_mask(mask, scores)
    if sigmoid:
        losses = sigmoid_rows(scores, positives, factors, mask)
    else:
        losses = softmax_rows(contrast, scores, positives, factors, mask)
    # Divided before it is summed: a sum of large numbers overflows before their mean.
    return (losses / n).sum()


def softmax_rows(
    contrast: Contrast,
    scores: Tensor,
    positives: Positives,
    weights: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """InfoLOOB's or InfoNCE's (N,) weighted losses."""
    candidates = scores if mask is None else scores.masked_fill(mask, -torch.inf)
    others, lone = leave_one_out(candidates, positives.columns)
    gaps = others - positives.of(scores)
    costs = gaps if contrast == "infoloob" else -F.logsigmoid(-gaps)
    return weights * weighted_sum(positives.shares, costs.masked_fill(lone, 0.0))


def sigmoid_rows(
    scores: Tensor, positives: Positives, weights: Tensor, mask: Tensor | None
) -> Tensor:
    """The sigmoid loss's (N,) weighted losses; ``weights`` (N,) or (N, M)."""
    negatives = positives.negatives(scores)
    if mask is not None:
        negatives = negatives.masked_fill(mask, 0.0)
    shares = positives.shares
    if weights.ndim == 2:
        shares, negatives = positives.of(weights) * shares, weights * negatives
    drawn = weighted_sum(shares, -F.logsigmoid(positives.of(scores)))
    pushed = weighted_sum(negatives, -F.logsigmoid(-scores))
    return drawn + pushed if weights.ndim == 2 else weights * (drawn + pushed)


def leave_one_out(scores: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N, k) ``ln Σ_{k≠j} exp(s_ik)`` for the columns j of a row (all if None), and a
    bool where nothing is left to sum, and the number is none.
    """
    highest, top = scores.max(dim=1, keepdim=True)
    is_top = torch.arange(scores.shape[1], device=scores.device)[None, :] == top
    below_top = scores.masked_fill(is_top, -torch.inf)
    empty = below_top.amax(dim=1, keepdim=True) == -torch.inf
    # A sum of nothing has a gradient that is no number, also where it is not used.
    without_top = below_top.masked_fill(empty, 0.0).logsumexp(dim=1, keepdim=True)

    nothing = highest == -torch.inf
    shift = highest.detach().masked_fill(nothing, 0.0)
    terms = (scores - shift).exp()
    left_out = terms
    if columns is not None:
        is_top = is_top.gather(1, columns)
        left_out = terms.gather(1, columns)
    has_no_top = is_top | nothing
    # At least 1, exp of the top one, where the column is not that one itself.
    sums = terms.sum(dim=1, keepdim=True) - left_out
    without_column = sums.masked_fill(has_no_top, 1.0).log() + shift
    return torch.where(is_top, without_top, without_column), empty & has_no_top


def weighted_sum(shares: Tensor, costs: Tensor) -> Tensor:
    """(N,) ``Σ_j p_ij c_ij``; what has no share may cost infinitely much."""
    return (shares * costs.masked_fill(shares == 0, 0.0)).sum(dim=1)


def diagonal(n: int, offset: int, like: Tensor) -> Positives:
    """The positive of row i is column ``i + offset``."""
    columns = torch.arange(offset, offset + n, device=like.device)[:, None]
    return Positives(columns, torch.ones_like(columns, dtype=like.dtype))


def read_targets(
    targets: Targets | None,
    shape: tuple[int, int],
    like: Tensor,
    *,
    sum_to_1: bool,
    may_read: bool,
) -> Positives:
    """The targets as positives of a matrix of scores of this shape; what was read
    before stays as it is.

    ``sum_to_1``: rows must. ``may_read``: values are checked too, for which a device
    waits.
    """
    if isinstance(targets, Positives):
        return targets
    n, m = shape
    if targets is None:
        if n > m:
            raise ValueError(f"{n} rows and {m} columns: rows beyond need targets")
        return diagonal(n, 0, like)
    columns, shares = targets if isinstance(targets, tuple) else (None, targets)
    if columns is None:
        check_shape("targets", shares, shape, like)
    else:
        check_columns(columns, shape, like, may_read=may_read)
        check_shape("shares of targets", shares, tuple(columns.shape), like)
    shares = shares.to(like.dtype)
    if may_read:
        check_shares(shares, sum_to_1=sum_to_1)
    return Positives(columns, shares)


def check_columns(
    columns: Tensor, shape: tuple[int, int], like: Tensor, *, may_read: bool
) -> None:
    """Refuses columns of targets that are no (n, k) int64, or, if values may be read,
    that there are not.
    """
    n, m = shape
    if not isinstance(columns, Tensor):
        raise TypeError(f"columns of targets are a {type(columns).__name__}, no tensor")
    fits = columns.ndim == 2 and len(columns) == n and columns.shape[1] > 0
    if not fits or columns.dtype != torch.int64 or columns.device != like.device:
        actual = f"columns of targets have shape {tuple(columns.shape)} and dtype"
        raise ValueError(
            f"{actual} {columns.dtype} on {columns.device}; ({n}, k) int64 on"
            f" {like.device} is expected"
        )
    if not may_read:
        return
    first, last = int(columns.min()), int(columns.max())
    if not 0 <= first <= last < m:
        raise ValueError(f"targets name columns {first} to {last} of {m}")


def check_shape(
    name: str, actual: Tensor, shape: tuple[int, ...], like: Tensor
) -> None:
    """Refuses what is no tensor, and one of another shape or device."""
    if not isinstance(actual, Tensor):
        kind = type(actual).__name__
        raise TypeError(f"{name} is a {kind}; a tensor of shape {shape} is expected")
    if actual.shape != shape or actual.device != like.device or actual.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(actual.shape)} on {actual.device}; {shape} on"
            f" {like.device} is expected"
        )


def check_shares(shares: Tensor, *, sum_to_1: bool) -> None:
    """Refuses shares that are negative, not finite, or whose rows do not sum to 1; it
    reads them.
    """
    shares = shares.detach()
    least, greatest = shares.aminmax()
    if not 0 <= float(least) <= float(greatest) <= 1 + SUM_TOLERANCE:
        raise ValueError(
            f"targets lie between {float(least):.4g} and {float(greatest):.4g}; shares"
            " between 0 and 1 are expected"
        )
    if sum_to_1:
        off = (shares.double().sum(dim=1) - 1).abs()
        if float(off.max()) > SUM_TOLERANCE:
            row = int(off.argmax())
            raise ValueError(
                f"targets of row {row} sum to {float(shares[row].sum()):.4g}; 1 is"
                " expected: divide every row by its sum"
            )


def read_weights(
    weights: Tensor | None,
    shape: tuple[int, int],
    like: Tensor,
    *,
    by_entry: bool = False,
    may_read: bool,
) -> Tensor:
    """The (N,) weights of rows, ones for None, or ``by_entry`` also (N, M)."""
    if weights is None:
        return like.new_ones(shape[0])
    whole = by_entry and isinstance(weights, Tensor) and weights.ndim == 2
    check_shape("weights", weights, shape if whole else shape[:1], like)
    weights = weights.to(like.dtype)
    if may_read:
        least, greatest = weights.detach().aminmax()
        if not 0 <= float(least) <= float(greatest) < torch.inf:
            raise ValueError(
                f"weights lie between {float(least):.4g} and {float(greatest):.4g};"
                " finite numbers from 0 on are expected"
            )
    return weights


def check_mask(mask: Tensor | None, scores: Tensor) -> None:
    """Refuses a mask that is no bool of the shape of the scores."""
    if mask is None:
        return
    check_shape("mask", mask, tuple(scores.shape), scores)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; torch.bool is expected")


def is_readable(tensor: Tensor) -> bool:
    """Whether a value can be read, and no device waits for it."""
    return tensor.device.type == "cpu" and readable()
