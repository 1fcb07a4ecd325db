"""One direction of InfoLOOB and of InfoNCE (Eq. 3 of arXiv:2110.11316; Poole et al. 2019; van den Oord et al. 2018).

Both draw an anchor to its positive and push it from the other candidates. They differ in one term: InfoNCE keeps the
positive in the denominator, so that its gradient carries a factor 1 − p and dies once p, the softmax probability of the
positive, nears one; InfoLOOB leaves it out and does not saturate. SigLIP's sigmoid loss (Zhai et al. 2023,
arXiv:2303.15343) classifies every anchor and candidate by itself as a pair or none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.checks import as_rows, check_ids, scalar
from cloob.functional.private import outside_autocast


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
    """InfoLOOB: ``−1/N Σ_i ln( exp(τ⁻¹ a_i·c_i) / Σ_{j≠i} exp(τ⁻¹ a_i·c_j) )``; it can be negative.

    Args:
        anchors: (N, D) anchors a.
        candidates: (M, D) candidates c. The positive of anchor i is candidate ``i + positive_offset``.
        inv_tau: Inverse temperature τ⁻¹ > 0. The value carries no factor τ; the paper's objective multiplies by it.
        positive_offset: Row of the first anchor's positive among the candidates.
        ids: (N,) integer id of each pair. Candidates of the anchor's own id are no negatives (duplicate captions).
        candidate_ids: (M,) ids of the candidates; ``ids`` where N = M.
        exclude_above: Margin m. A candidate with ``a_i·c_j > a_i·c_i + m`` is no negative: it is taken for a second
            positive that nobody marked, as in GISTEmbed (arXiv:2402.16829) with the model as its own guide.

    Returns:
        0-d mean over the anchors, float32 (float64 for float64 input). An anchor whose every other candidate is left
        out has no negative; it adds 0 to the sum and counts in N.

    Raises:
        TypeError: Not tensors.
        ValueError: Shapes, dtypes, devices or ids do not fit, M < 2, or τ⁻¹ is not positive and finite.
    """
    logits, own, same = _logits(anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above)
    positive = logits.diagonal(positive_offset)
    # A lone anchor keeps its positive: ln(e^s / e^s) = 0 with zero gradient, instead of ln 0.
    lone = same.all(dim=1, keepdim=True) & own
    return (logits.masked_fill(same & ~lone, -torch.inf).logsumexp(dim=1) - positive).mean()


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
    """InfoNCE: ``−1/N Σ_i ln( exp(τ⁻¹ a_i·c_i) / Σ_j exp(τ⁻¹ a_i·c_j) )``, one direction of CLIP's cross-entropy.

    Arguments, returned value and errors as in :func:`info_loob`.
    """
    logits, own, same = _logits(anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above)
    positive = logits.diagonal(positive_offset)
    return (logits.masked_fill(same & ~own, -torch.inf).logsumexp(dim=1) - positive).mean()


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
    """SigLIP's loss: ``−1/N Σ_i Σ_j ln σ( z_ij (τ⁻¹ a_i·c_j + b) )``, z_ij = 1 for the positive, −1 for all others.

    Arguments, returned value and errors as in :func:`info_loob`, and ``bias``: b, any finite number, about −ln M at
    the start, since nearly all candidates are no pair of the anchor. Candidates that are no negatives are left out of
    the sum, the positive stays.
    """
    logits, _, same = _logits(anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above)
    positive = logits.diagonal(positive_offset)
    b = scalar("bias", bias, logits, positive=False)
    negatives = F.logsigmoid(-(logits + b)).masked_fill(same, 0.0).sum(dim=1)
    return -(F.logsigmoid(positive + b) + negatives).mean()


def _logits(
    anchors: Tensor,
    candidates: Tensor,
    inv_tau: float | Tensor,
    positive_offset: int,
    ids: Tensor | None,
    candidate_ids: Tensor | None,
    exclude_above: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M) logits, and two masks of them: the positives, and these with all else that is no negative."""
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, anchors)
    logits = inv_tau * anchors @ candidates.T
    place = torch.arange(m, device=logits.device)
    same = own = place[None, :m] == place[positive_offset : positive_offset + n, None]
    if both := check_ids(ids, candidate_ids, n, m, anchors.device):
        same = same | (both[0][:, None] == both[1][None, :])
    if exclude_above is not None:
        same = same | (logits > logits.diagonal(positive_offset)[:, None] + inv_tau * exclude_above)
    return logits, own, same


def check_contrast(anchors: Tensor, candidates: Tensor, positive_offset: int) -> tuple[int, int]:
    """(N, M), if each anchor has a positive and a negative."""
    n, m = len(anchors), len(candidates)
    if n < 1 or m < 2 or not 0 <= positive_offset <= m - n:
        raise ValueError(
            f"{n} anchors, {m} candidates and positive_offset {positive_offset}: at least one anchor is expected, and "
            "for each its positive and a negative among the candidates"
        )
    return n, m
