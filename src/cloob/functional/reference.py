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
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple, TypedDict, Unpack, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.family import CONTRASTS, Contrast
from cloob.functional.checks import as_rows, check_ids, one_of, scalar
from cloob.functional.private import outside_autocast
from cloob.functional.scores import Targets, contrast_scores, diagonal

Scale = Literal["paper", "unit"]


class Pairing(TypedDict, total=False):
    """Which candidates are no negatives of an anchor, see :func:`info_loob`."""

    positive_offset: int
    ids: Tensor | None
    candidate_ids: Tensor | None
    exclude_above: float | None


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
    directions = Directions(
        backend,
        contrast,
        bias=bias,
        exclude_above=exclude_above,
        matmul=matmul,
        targets=targets,
        weights=weights,
    )
    if not hopfield:
        both = directions.of_plain(x, y, inv_tau, ids=ids)
        return combine(both, inv_tau, scale)
    fast: dict[str, object] = {}
    if beta_of_unit_rows is not None or matmul is not None:
        fast = {"beta_of_unit_rows": beta_of_unit_rows, "matmul": matmul}
    u_x, u_y, v_x, v_y = backend.retrieve(x, y, beta, **fast)
    both = directions.of_retrieved((u_x, v_y), (u_y, v_x), inv_tau, ids=ids)
    return combine(both, inv_tau, scale)


@dataclass(frozen=True)
class Directions:
    """The directions of a contrast by the functions of a backend, and by this module's
    where it has none; with targets or weights by its ``weighted_contrast``.
    """

    backend: ModuleType
    contrast: Contrast
    bias: float | Tensor
    exclude_above: float | None
    matmul: torch.dtype | None
    targets: Targets | None
    weights: Tensor | None

    @property
    def weigh(self) -> bool:
        """Whether pairs have soft targets or weights."""
        return self.targets is not None or self.weights is not None

    def one(
        self,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """The loss of one direction."""
        if self.weigh:
            return self._weighted(anchors, candidates, inv_tau, **pairing)
        row = CONTRASTS[self.contrast]
        function = getattr(self.backend, row.function, None)
        options = self.options(fast=function is not None)
        if function is None:
            function = getattr(sys.modules[__name__], row.function)
        if not row.softmax:
            options["bias"] = self.bias
        loss: Tensor = function(anchors, candidates, inv_tau, **options, **pairing)
        return loss

    def of_retrieved(
        self,
        anchors: tuple[Tensor, Tensor],
        candidates: tuple[Tensor, Tensor],
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """The sum of two directions, each with logits of its own."""
        two: Tensor
        in_one_sweep = self.of_backend("softmax_two")
        if in_one_sweep is not None and len(candidates[0]) == len(candidates[1]):
            stacks = torch.stack(anchors), torch.stack(candidates)
            two = in_one_sweep(*stacks, inv_tau, **self.options(fast=True), **pairing)
            return two
        images = self.one(anchors[0], candidates[0], inv_tau, **pairing)
        return images + self.one(anchors[1], candidates[1], inv_tau, **pairing)

    def of_plain(
        self, x: Tensor, y: Tensor, inv_tau: float | Tensor, ids: Tensor | None
    ) -> Tensor:
        """The sum of both directions without retrieval, whose logits are each other's
        transpose.
        """
        both: Tensor
        of_one_product = self.of_backend("softmax_both")
        if of_one_product is not None:
            both = of_one_product(x, y, inv_tau, ids=ids, **self.options(fast=True))
            return both
        images = self.one(x, y, inv_tau, ids=ids)
        if self.are_equal:
            return 2 * images
        return images + self.one(y, x, inv_tau, ids=ids)

    @property
    def are_equal(self) -> bool:
        """Whether both directions are one sum without retrieval: where no softmax runs
        over rows or columns.
        """
        softmax = CONTRASTS[self.contrast].softmax
        return not (softmax or self.weigh) and self.exclude_above is None

    def of_backend(self, name: str) -> Callable[..., Tensor] | None:
        """The backend's function of two directions of InfoLOOB or InfoNCE, if it has
        one.
        """
        if self.weigh or self.contrast not in ("infoloob", "infonce"):
            return None
        function = getattr(self.backend, name, None)
        return function and partial(function, contrast=self.contrast)

    def options(self, *, fast: bool) -> dict[str, object]:
        """What a function is handed besides rows, τ⁻¹ and pairing."""
        options: dict[str, object] = {}
        if self.exclude_above is not None:
            options["exclude_above"] = self.exclude_above
        if fast and self.matmul is not None:
            options["matmul"] = self.matmul
        return options

    def _weighted(
        self,
        anchors: Tensor,
        candidates: Tensor,
        inv_tau: float | Tensor,
        **pairing: Unpack[Pairing],
    ) -> Tensor:
        """One direction with targets or weights."""
        if self.targets is not None and self.exclude_above is not None:
            raise ValueError(
                "exclude_above compares with the positive, and targets name several:"
                " leave one out"
            )
        if self.matmul is not None:
            raise ValueError("targets and weights need matmul='float32'")
        loss: Tensor = self.backend.weighted_contrast(
            anchors,
            candidates,
            inv_tau,
            contrast=self.contrast,
            bias=0.0 if CONTRASTS[self.contrast].softmax else self.bias,
            exclude_above=self.exclude_above,
            targets=self.targets,
            weights=self.weights,
            **pairing,
        )
        return loss


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
    return torch.where(
        norms == 0, 0.0, average / norms.clamp_min(smallest)
    )  # NaN stays


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
    logits = _logits(x, y, inv_tau, 0, ids, None, exclude_above)
    both = (logits, logits.transposed())
    if contrast == "infoloob":
        return both[0].info_loob() + both[1].info_loob()
    return both[0].info_nce() + both[1].info_nce()


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
    left_out = logits.positives()
    excluded = logits.excluded()
    if excluded is not None:
        left_out = left_out | excluded
    of_all = F.logsigmoid(-(logits.values + b))
    of_negatives = of_all.masked_fill(left_out, 0.0).sum(dim=1)
    return -(F.logsigmoid(logits.positive() + b) + of_negatives).mean()


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
        place = torch.arange(m, device=self.values.device)
        return place[None, :] == place[self.offset : self.offset + n, None]

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
            every = excluded | left_out
            lone = every.all(dim=1, keepdim=True)
            left_out = every & ~(lone & left_out)
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


def combine(both: Tensor, inv_tau: float | Tensor, scale: Scale) -> Tensor:
    """The sum of both directions as the loss: τ · sum (``"paper"``) or mean
    (``"unit"``).
    """
    if scale == "paper":
        return both / scalar("inv_tau", inv_tau, both)
    return both / 2
