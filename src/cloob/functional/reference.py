"""The contrasts and Hopfield retrieval as the paper writes them: the oracle of all
other paths.

InfoLOOB and InfoNCE (Eq. 3 of arXiv:2110.11316) draw an anchor to its positive and push
it from the other candidates. InfoNCE keeps the positive in the denominator, so that its
gradient carries a factor 1 − p and dies once p, the softmax probability of the
positive, nears one; InfoLOOB leaves it out and does not saturate. SigLIP's sigmoid loss
(arXiv:2303.15343) classifies every anchor and candidate by itself as a pair or none.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import Contrast
from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import outside_autocast
from cloob.functional.scores import Targets, contrast_scores, diagonal


class Pairing(TypedDict, total=False):
    """Which candidates are no negatives of an anchor, see :func:`info_loob`."""

    positive_offset: int
    ids: Tensor | None
    candidate_ids: Tensor | None
    exclude_above: float | None


@outside_autocast
def weighted_contrast(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    bias: float | Tensor = 0.0,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """One direction of a contrast with soft targets, or a weight for every anchor.

    Other arguments as in :func:`info_loob`; ``targets`` and ``weights`` as in
    :func:`cloob.functional.contrast_scores`, of the anchors. Candidates of the anchor's
    own id are no negatives, also where ``targets`` make them positives.
    """
    logits = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    scores = logits.values + scalar("bias", bias, logits.values, positive=False)
    if targets is None:
        targets = diagonal(len(scores), positive_offset, scores)
    return contrast_scores(
        scores, contrast, targets=targets, weights=weights, mask=logits.excluded()
    )


@outside_autocast
def hopfield_retrieval(state: Tensor, stored: Tensor, beta: float | Tensor) -> Tensor:
    """One update of a modern Hopfield network, renormalised: ``norm(softmax(β · state
    storedᵀ) stored)``.

    A state pattern becomes an average of the stored patterns, weighted by their
    similarity to it (Ramsauer et al. 2021; Eq. 4 and 5). Features that co-occur in the
    memory reinforce each other, so the retrieved patterns have a richer covariance.

    Args:
        state: (N, D) state (query) patterns, unit rows.
        stored: (M, D) stored patterns, unit rows.
        beta: Inverse temperature β > 0. Large β returns the nearest pattern, small β
            the mean of the memory; compare it with ln M.

    Returns:
        (N, D) retrieved patterns, unit rows, float32 (float64 for float64 input). An
        average that is exactly zero (antipodal stored patterns under equal weights, an
        empty memory) stays zero, with zero gradient.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or β is not positive and
            finite.
    """
    state, stored = as_rows(state=state, stored=stored)
    beta = scalar("beta", beta, state)
    association = (beta * state @ stored.T).softmax(dim=-1)  # (N, M)
    average = association @ stored
    norms = average.norm(dim=-1, keepdim=True)
    smallest = torch.finfo(norms.dtype).tiny
    unit = average / norms.clamp_min(smallest)
    return torch.where(norms == 0, 0.0, unit)  # NaN stays


def retrieve(
    x: Tensor, y: Tensor, beta: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 4 and 5: U_x, U_y from the image memory x and V_x, V_y from the text memory
    y; the index names the query.
    """
    u_x = hopfield_retrieval(x, x, beta)
    u_y = hopfield_retrieval(y, x, beta)
    v_x = hopfield_retrieval(x, y, beta)
    v_y = hopfield_retrieval(y, y, beta)
    return u_x, u_y, v_x, v_y


@outside_autocast
def info_loob(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
) -> Tensor:
    """InfoLOOB: ``−1/N Σ_i ln( exp(τ⁻¹ a_i·c_i) / Σ_{j≠i} exp(τ⁻¹ a_i·c_j) )``; it can
    be negative.

    Args:
        anchors: (N, D) anchors a.
        candidates: (M, D) candidates c. The positive of anchor i is candidate ``i +
            positive_offset``.
        inv_tau: Inverse temperature τ⁻¹ > 0. The value carries no factor τ; the paper's
            objective multiplies by it.
        positive_offset: Row of the first anchor's positive among the candidates.
        ids: (N,) integer id of every pair. Candidates of the anchor's own id are no
            negatives (duplicate captions).
        candidate_ids: (M,) ids of the candidates; ``ids`` where N = M.
        exclude_above: Margin m. A candidate with ``a_i·c_j > a_i·c_i + m`` is no
            negative: it is taken for a second positive that nobody marked, as in
            GISTEmbed (arXiv:2402.16829) with the model as its own guide.

    Returns:
        0-d mean over the anchors, float32 (float64 for float64 input). An anchor whose
        every other candidate is left out has no negative; it adds 0 to the sum and
        counts in N.

    Raises:
        ValueError: Shapes, dtypes, devices or ids do not fit, M < 2, or τ⁻¹ is not
            positive and finite.
    """
    logits = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    return logits.info_loob()


@outside_autocast
def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
) -> Tensor:
    """InfoNCE: ``−1/N Σ_i ln( exp(τ⁻¹ a_i·c_i) / Σ_j exp(τ⁻¹ a_i·c_j) )``, one
    direction of CLIP's cross-entropy.

    Arguments, returned value and errors as in :func:`info_loob`.
    """
    logits = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    return logits.info_nce()


@outside_autocast
def softmax_both(
    x: Tensor,
    y: Tensor,
    inv_tau: float | Tensor,
    *,
    contrast: Contrast,
    ids: Tensor | None = None,
    exclude_above: float | None = None,
) -> Tensor:
    """InfoLOOB or InfoNCE of x against y plus that of y against x, from one product."""
    of_x = _logits(x, y, inv_tau, 0, ids, None, exclude_above)
    of_y = of_x.transposed()
    if contrast == "infoloob":
        return of_x.info_loob() + of_y.info_loob()
    return of_x.info_nce() + of_y.info_nce()


@outside_autocast
def sigmoid_loss(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    bias: float | Tensor = -10.0,
    *,
    positive_offset: int = 0,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    exclude_above: float | None = None,
) -> Tensor:
    """SigLIP's loss: ``−1/N Σ_i Σ_j ln σ( z_ij (τ⁻¹ a_i·c_j + b) )``, z_ij = 1 for the
    positive, −1 for all others.

    Arguments, returned value and errors as in :func:`info_loob`, and ``bias``: b, any
    finite number, about −ln M at the start, since nearly all candidates are no pair of
    the anchor. Candidates that are no negatives are left out of the sum, the positive
    stays.
    """
    logits = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    b = scalar("bias", bias, logits.values, positive=False)
    no_negatives = logits.positives()
    excluded = logits.excluded()
    if excluded is not None:
        no_negatives = no_negatives | excluded
    as_negatives = F.logsigmoid(-(logits.values + b))
    negatives = as_negatives.masked_fill(no_negatives, 0.0).sum(dim=1)
    positive = F.logsigmoid(logits.positive() + b)
    return -(positive + negatives).mean()


class _Logits(NamedTuple):
    """(N, M) logits of one direction."""

    values: Tensor
    offset: int  # the column of the first row's positive
    same_ids: Tensor | None  # (N, M) bool
    margin: Tensor | None  # by which a negative may exceed the positive

    def transposed(self) -> _Logits:
        """Those of the other direction, of as many rows as columns."""
        same_ids = None if self.same_ids is None else self.same_ids.T
        return _Logits(self.values.T, 0, same_ids, self.margin)

    def positive(self) -> Tensor:
        """(N,) logits of the positives."""
        return self.values.diagonal(self.offset)

    def positives(self) -> Tensor:
        """(N, M) bool: which the positives are."""
        n, m = self.values.shape
        columns = torch.arange(m, device=self.values.device)
        return columns[None, :] == columns[self.offset : self.offset + n, None]

    def excluded(self) -> Tensor | None:
        """(N, M) bool: what else is no negative, None for nothing."""
        if self.margin is None:
            return self.same_ids
        above = self.values > self.positive()[:, None] + self.margin
        return above if self.same_ids is None else above | self.same_ids

    def info_loob(self) -> Tensor:
        """The mean of ln Σ_{j≠i} exp(s_ij) − s_ii."""
        left_out = self.positives()
        excluded = self.excluded()
        if excluded is not None:
            # A lone anchor keeps its positive: ln(e^s / e^s) = 0 with zero gradient,
            # instead of ln 0.
            positives = left_out
            left_out = positives | excluded
            lone = left_out.all(dim=1, keepdim=True)
            left_out = left_out & ~(lone & positives)
        negatives = self.values.masked_fill(left_out, -torch.inf)
        return (negatives.logsumexp(dim=1) - self.positive()).mean()

    def info_nce(self) -> Tensor:
        """The mean of ln Σ_j exp(s_ij) − s_ii."""
        candidates = self.values
        excluded = self.excluded()
        if excluded is not None:
            left_out = excluded & ~self.positives()
            candidates = candidates.masked_fill(left_out, -torch.inf)
        return -candidates.log_softmax(dim=1).diagonal(self.offset).mean()


def _logits(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    positive_offset: int,
    ids: Tensor | None,
    candidate_ids: Tensor | None,
    exclude_above: float | None,
) -> _Logits:
    """The logits of one direction, its arguments checked."""
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, anchors)
    values = inv_tau * anchors @ candidates.T
    same_ids: Tensor | None = None
    both_ids = check_ids(ids, candidate_ids, n, m, anchors.device)
    if both_ids is not None:
        same_ids = both_ids[0][:, None] == both_ids[1]
    margin = None if exclude_above is None else inv_tau * exclude_above
    return _Logits(values, positive_offset, same_ids, margin)


def check_contrast(
    anchors: Tensor, candidates: Tensor, positive_offset: int
) -> tuple[int, int]:
    """(N, M), if each anchor has a positive and a negative."""
    n, m = len(anchors), len(candidates)
    if n < 1 or m < 2 or not 0 <= positive_offset <= m - n:
        sizes = f"{n} anchors, {m} candidates and positive_offset {positive_offset}"
        needed = (
            "at least one anchor is expected, and for each its positive and a negative"
            " among the candidates"
        )
        raise ValueError(f"{sizes}: {needed}")
    return n, m
