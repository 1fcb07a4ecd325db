"""The contrasts, Hopfield retrieval and the objective as the paper writes them: the
oracle of all other paths.

InfoLOOB and InfoNCE (Eq. 3 of arXiv:2110.11316) draw an anchor to its positive and push
it from the other candidates. InfoNCE keeps the positive in the denominator, so that its
gradient carries a factor 1 − p and dies once p, the softmax probability of the
positive, nears one; InfoLOOB leaves it out and does not saturate. SigLIP's sigmoid loss
(arXiv:2303.15343) classifies every anchor and candidate by itself as a pair or none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import CONTRASTS, Contrast
from cloob.functional.checks import as_rows, check_ids, one_of, scalar
from cloob.functional.private import outside_autocast
from cloob.functional.scores import Targets, contrast_scores, diagonal

Scale = Literal["paper", "unit"]


def cloob_reference(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor = 8.0,
    *,
    contrast: Contrast = "infoloob",
    hopfield: bool = True,
    scale: Scale = "paper",
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    exclude_above: float | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The objective of a batch of N pairs; every N×N matrix is built and kept for the
    backward pass.

    Args:
        image_features: (N, D) image embeddings X, unit rows.
        text_features: (N, D) text embeddings Y, unit rows; row i belongs to image i.
        inv_tau: Inverse temperature τ⁻¹ > 0 of the contrast.
        beta: Inverse temperature β > 0 of the retrieval; unused without it.
        contrast: ``"infoloob"``, ``"infonce"`` or ``"sigmoid"``.
        hopfield: Contrast retrieved embeddings (CLOOB) or the plain ones (CLIP,
            SigLIP).
        scale: ``"paper"`` is τ · (sum of both directions), as the authors' code;
            ``"unit"`` their mean, as CLIP. Paper = unit · 2τ, so at τ⁻¹ = 30 unit is 15
            times as large. The sigmoid loss has no ``"paper"`` scale.
        bias: b of the sigmoid loss; unused by the others, in which it cancels.
        ids: (N,) integer ids; pairs of equal id are not each other's negatives.
        exclude_above: Margin by which a candidate may exceed the positive and still be
            a negative; None for any, see :func:`info_loob`. It compares what is
            contrasted: retrieved embeddings with retrieval.
        targets: (N, N) shares T, or (N, k) columns and their (N, k) shares: pair j is a
            share T_ij of the positive of pair i, of its image among the texts and of
            its text among the images. See :func:`cloob.functional.contrast_scores`.
        weights: (N,) factors of both terms of every pair.

    Returns:
        0-d loss, float32 (float64 for float64 input).

    Raises:
        ValueError: As the functions it calls; N < 2; an unknown ``contrast`` or
            ``scale``, or two that do not fit.
    """
    return pair_loss(
        sys.modules[__name__],
        image_features,
        text_features,
        inv_tau,
        beta,
        contrast=contrast,
        hopfield=hopfield,
        scale=scale,
        bias=bias,
        ids=ids,
        exclude_above=exclude_above,
        targets=targets,
        weights=weights,
    )


def pair_loss(
    backend: ModuleType,
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor,
    *,
    contrast: Contrast = "infoloob",
    hopfield: bool = True,
    scale: Scale = "paper",
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    exclude_above: float | None = None,
    targets: Targets | None = None,
    weights: Tensor | None = None,
    beta_of_unit_rows: float | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """The objective by the functions of a backend: this module, or ``streamed``, which
    alone takes the last two.
    """
    check_member(contrast, scale, hopfield)
    x, y = check_pairs(image_features, text_features)
    weighs = targets is not None or weights is not None
    both_directions = both_directions_of(backend, contrast, hopfield)
    if both_directions is not None and not weighs:
        both = both_directions(
            x, y, inv_tau, ids=ids, exclude_above=exclude_above, matmul=matmul
        )
        return combine(both, inv_tau, scale)
    direction = direction_of(
        backend,
        contrast,
        bias=bias,
        exclude_above=exclude_above,
        matmul=matmul,
        targets=targets,
        weights=weights,
    )
    u_x, u_y, v_x, v_y = x, y, x, y
    if hopfield:
        fast: dict[str, Any] = {}
        if beta_of_unit_rows is not None or matmul:
            fast = {"beta_of_unit_rows": beta_of_unit_rows, "matmul": matmul}
        u_x, u_y, v_x, v_y = backend.retrieve(x, y, beta, **fast)
    images = direction(u_x, u_y, inv_tau, ids=ids)
    symmetric = not weighs and is_symmetric(contrast, hopfield, exclude_above)
    texts = images if symmetric else direction(v_y, v_x, inv_tau, ids=ids)
    return combine(images + texts, inv_tau, scale)


def both_directions_of(
    backend: ModuleType, contrast: str, hopfield: bool
) -> Callable[..., Tensor] | None:
    """The backend's function of both directions from one product of logits, if it has
    one; with retrieval there are two products.
    """
    if hopfield:
        return None
    return getattr(backend, f"{CONTRASTS[contrast].function}_both", None)


def direction_of(
    backend: ModuleType,
    contrast: str,
    *,
    bias: float | Tensor,
    exclude_above: float | None,
    matmul: torch.dtype | None,
    targets: Targets | None,
    weights: Tensor | None,
) -> Callable[..., Tensor]:
    """One direction of a contrast by the backend's function, or the plain one where the
    backend has none; with targets or weights by its ``weighted_contrast``.
    """
    row = CONTRASTS[contrast]
    options: dict[str, Any] = {"exclude_above": exclude_above}
    if not row.softmax:
        options["bias"] = bias
    if targets is not None or weights is not None:
        if targets is not None and exclude_above is not None:
            raise ValueError(
                "exclude_above compares with the positive, and targets name several:"
                " leave one out"
            )
        if matmul is not None:
            raise ValueError("targets and weights need matmul='float32'")
        options |= {"contrast": contrast, "targets": targets, "weights": weights}
        function = backend.weighted_contrast
    else:
        fast = getattr(backend, row.function, None)
        function = fast or getattr(sys.modules[__name__], row.function)
        options["matmul"] = matmul if fast else None
    used = {name: value for name, value in options.items() if value is not None}
    return partial(function, **used)


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
    logits, _, same = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    masked = same if ids is not None or exclude_above is not None else None
    if targets is None:
        targets = diagonal(len(logits), positive_offset, logits)
    scores = logits + scalar("bias", bias, logits, positive=False)
    return contrast_scores(
        scores, contrast, targets=targets, weights=weights, mask=masked
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
    # NaN stays
    return torch.where(
        norms == 0, 0.0, average / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    )


def retrieve(
    x: Tensor, y: Tensor, beta: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 4 and 5: U_x, U_y from the image memory x and V_x, V_y from the text memory
    y; the index names the query.
    """
    u_x, u_y, v_x, v_y = (
        hopfield_retrieval(query, memory, beta) for memory in (x, y) for query in (x, y)
    )
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
    logits, positives, same = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    positive = logits.diagonal(positive_offset)
    # A lone anchor keeps its positive: ln(e^s / e^s) = 0 with zero gradient, instead of
    # ln 0.
    lone = same.all(dim=1, keepdim=True) & positives
    return (
        logits.masked_fill(same & ~lone, -torch.inf).logsumexp(dim=1) - positive
    ).mean()


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
    logits, positives, same = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
    positive = logits.diagonal(positive_offset)
    return (
        logits.masked_fill(same & ~positives, -torch.inf).logsumexp(dim=1) - positive
    ).mean()


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
    logits, _, same = _logits(
        anchors, candidates, inv_tau, positive_offset, ids, candidate_ids, exclude_above
    )
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
    """(N, M) logits, and two masks of them: the positives, and these with all else that
    is no negative.
    """
    anchors, candidates = as_rows(anchors=anchors, candidates=candidates)
    n, m = check_contrast(anchors, candidates, positive_offset)
    inv_tau = scalar("inv_tau", inv_tau, anchors)
    logits = inv_tau * anchors @ candidates.T
    place = torch.arange(m, device=logits.device)
    same = positives = (
        place[None, :m] == place[positive_offset : positive_offset + n, None]
    )
    if both := check_ids(ids, candidate_ids, n, m, anchors.device):
        same = same | (both[0][:, None] == both[1][None, :])
    if exclude_above is not None:
        same = same | (
            logits > logits.diagonal(positive_offset)[:, None] + inv_tau * exclude_above
        )
    return logits, positives, same


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


def check_pairs(
    image_features: Tensor, text_features: Tensor, at_least: int = 2
) -> list[Tensor]:
    """Both sides of the batch as float32 or float64 matrices of equal shape."""
    x, y = as_rows(image_features=image_features, text_features=text_features)
    if len(x) != len(y) or len(x) < at_least:
        problem = (
            f"{len(x)} image_features and {len(y)} text_features: pairs are expected,"
            f" at least {at_least} of them"
        )
        raise ValueError(
            f"{problem}; for a last batch of one give the loader drop_last=True"
        )
    return [x, y]


def check_member(contrast: str, scale: str, hopfield: bool) -> None:
    """Refuses what is no member of the family: τ · sum takes the τ⁻¹ out of a logit,
    but not out of one with a bias; the sigmoid loss has no form with retrieval.
    """
    one_of("contrast", contrast, tuple(CONTRASTS))
    one_of("scale", scale, get_args(Scale))
    if not CONTRASTS[contrast].softmax and scale == "paper":
        raise ValueError(
            f"scale='paper' is that of the softmax contrasts; {contrast=} needs"
            " scale='unit'"
        )
    if not CONTRASTS[contrast].softmax and hopfield:
        raise ValueError(
            f"hopfield=True is for the softmax contrasts; {contrast=} needs"
            " hopfield=False"
        )


def is_symmetric(
    contrast: str, hopfield: bool, exclude_above: float | None = None
) -> bool:
    """Whether both directions are one sum: without a softmax over rows or columns X·Yᵀ
    alone counts.
    """
    return not (CONTRASTS[contrast].softmax or hopfield) and exclude_above is None


def combine(both: Tensor, inv_tau: float | Tensor, scale: Scale) -> Tensor:
    """The sum of both directions as the loss: τ · sum (``"paper"``) or mean
    (``"unit"``).
    """
    if scale == "paper":
        return both / scalar("inv_tau", inv_tau, both)
    return both / 2
