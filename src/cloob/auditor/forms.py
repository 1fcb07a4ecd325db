"""What a contrastive loss may be: right forms and wrong ones, as formulas that are
fitted to the values of a loss.

Rows are (B, N, D), B batches of N pairs; scales are (G,), so that G settings of a form
are computed at once; a value is (G, B). All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIZES = (5, 8)  # pairs of the batches that forms are fitted to
BOTH = (("x", "y"), ("y", "x"))
CLOOB = (("U_x", "U_y"), ("V_y", "V_x"))
DIRECTION = "one direction"
EXCHANGED = "U and V exchanged"
OTHER = "other terms"
N_REFINED = 8  # forms that are nearest on the grid
MAX_STEPS = 60


class Terms(NamedTuple):
    """What is contrasted: pairs of anchors and candidates, plain rows x, y or rows
    retrieved from the memory of x (U) or of y (V) by a query.
    """

    pairs: tuple[tuple[str, str], ...]
    fault: str | None = None
    message: str = ""

    @property
    def retrieves(self) -> bool:
        """Whether rows are retrieved."""
        return "_" in self.pairs[0][0]


TERMS = (
    Terms(BOTH),
    Terms(CLOOB),
    Terms(BOTH[:1], DIRECTION, "x is contrasted with all y, and no y with all x"),
    Terms(BOTH[1:], DIRECTION, "y is contrasted with all x, and no x with all y"),
    Terms(CLOOB[:1], DIRECTION, "the term of the memory of y is missing"),
    Terms(CLOOB[1:], DIRECTION, "the term of the memory of x is missing"),
    Terms(
        (("U_y", "U_x"), ("V_x", "V_y")),
        EXCHANGED,
        "the anchors are U_y and V_x instead of U_x and V_y",
    ),
    Terms(
        (("U_x", "V_x"), ("V_y", "U_y")),
        EXCHANGED,
        "one query is contrasted in two memories: U_x with V_x instead of U_y",
    ),
    Terms(
        (("U_x", "V_y"), ("V_y", "U_x")),
        EXCHANGED,
        "U_x is contrasted with V_y, rows of two memories, instead of U_y",
    ),
    Terms(
        (("U_x", "U_y"), ("U_y", "U_x"), ("V_x", "V_y"), ("V_y", "V_x")),
        OTHER,
        "each memory is contrasted both ways: four terms, the paper has two",
    ),
    Terms(
        (("U_x", "U_y"), ("U_y", "U_x")),
        OTHER,
        "the memory of x stands for that of y",
    ),
    Terms(
        (("V_x", "V_y"), ("V_y", "V_x")),
        OTHER,
        "the memory of y stands for that of x",
    ),
)


class Group(NamedTuple):
    """Batches of one size, and the values of the loss for them."""

    x: Tensor  # (B, N, D)
    y: Tensor
    values: Tensor  # (B,)


@dataclass(frozen=True)
class Form:
    """A contrast of some terms; ``unit``: retrieved rows are made unit again."""

    contrast: str
    terms: Terms
    unit: bool = True

    def values(self, x: Tensor, y: Tensor, scales: Tensor) -> Tensor:
        """(G, B) sums of the terms' means, for (G, n_scales) of ln τ⁻¹, ln β, bias."""
        columns = scales[:, :, None, None, None].unbind(dim=1)
        plain = {"x": x[None], "y": y[None]}
        sides = {side for pair in self.terms.pairs for side in pair}
        rows = {side: self.rows_of(side, plain, columns) for side in sides}
        total = x.new_zeros(())
        for anchors, candidates in self.terms.pairs:
            cosines = rows[anchors] @ rows[candidates].transpose(-1, -2)
            logits = columns[0].exp() * cosines
            if self.contrast == "sigmoid":
                logits = logits + columns[-1]
            total = total + costs(self.contrast, logits).mean(dim=-1)
        return total

    def rows_of(
        self, side: str, plain: dict[str, Tensor], columns: Sequence[Tensor]
    ) -> Tensor:
        """(G, B, N, D) rows of a side: ``x`` and ``y`` are the plain ones; ``U_y`` are
        what y retrieves from the memory of x, ``V_x`` what x retrieves from that of y.
        """
        if side in plain:
            return plain[side]
        memory = plain["x" if side[0] == "U" else "y"]
        query = plain[side[2]]
        similarity = columns[1].exp() * (query @ memory.transpose(-1, -2))
        retrieved = similarity.softmax(dim=-1) @ memory
        return F.normalize(retrieved, dim=-1) if self.unit else retrieved


def costs(contrast: str, logits: Tensor) -> Tensor:
    """(…, N) losses of the anchors of (…, N, N) logits, positives on the diagonal."""
    positive = logits.diagonal(dim1=-2, dim2=-1)
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    if contrast == "sigmoid":
        pushed = F.softplus(logits).masked_fill(own, 0.0).sum(dim=-1)
        return F.softplus(-positive) + pushed
    if contrast == "infoloob":
        logits = logits.masked_fill(own, -torch.inf)
    return logits.logsumexp(dim=-1) - positive


def all_forms() -> list[Form]:
    """The simplest first; of two that fit equally well the first is meant."""
    forms = []
    for unit in (True, False):
        for terms in TERMS:
            if not terms.retrieves and not unit:
                continue
            forms += [Form("infoloob", terms, unit), Form("infonce", terms, unit)]
            if terms.fault is None and unit:
                forms.append(Form("sigmoid", terms))
    return forms


class Fit(NamedTuple):
    """A form with its scales, (n_scales,), the factor of every number of pairs, and
    how far its values and gradients are from the loss's, relative to their size.
    """

    form: Form
    scales: Tensor
    factors: list[float]
    value_error: float
    gradient_error: float = math.nan  # until it is measured

    @property
    def inv_tau(self) -> float:
        """τ⁻¹."""
        return math.exp(float(self.scales[0]))

    @property
    def beta(self) -> float | None:
        """β, None without retrieval."""
        return math.exp(float(self.scales[1])) if self.form.terms.retrieves else None

    @property
    def power(self) -> int:
        """0 of a mean over the pairs, 1 of a sum."""
        growth = math.log(max(self.factors[1] / self.factors[0], 1e-9))
        return round(growth / math.log(SIZES[1] / SIZES[0]))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The 0-d value for (N, D) rows."""
        factor = self.factors[1] * (len(x) / SIZES[1]) ** self.power
        x, y = x.double()[None], y.double()[None]
        return factor * self.form.values(x, y, self.scales[None])[0, 0]


def fit(groups: Sequence[Group]) -> Fit:
    """The form that comes nearest to the values of a loss; a group for every size."""
    on_grid = [best_of(form, grid(form), groups) for form in all_forms()]
    limit = sorted(fitted.value_error for fitted in on_grid)[N_REFINED - 1]
    nearest = [fitted for fitted in on_grid if fitted.value_error <= limit]
    refined = [refine(fitted, groups) for fitted in nearest]
    best = min(fitted.value_error for fitted in refined)
    return next(
        fitted for fitted in refined if fitted.value_error <= max(3 * best, 1e-9)
    )


def grid(form: Form) -> Tensor:
    """(G, n_scales) scales to begin with."""
    axes = [torch.linspace(math.log(1.5), math.log(150.0), 9)]
    if form.terms.retrieves:
        axes.append(torch.linspace(math.log(0.8), math.log(80.0), 7))
    if form.contrast == "sigmoid":
        axes.append(torch.linspace(-16.0, 4.0, 9))
    return torch.cartesian_prod(*axes).double().reshape(-1, len(axes))


def best_of(form: Form, scales: Tensor, groups: Sequence[Group]) -> Fit:
    """The best of (G, n_scales) scales, with the best factors."""
    errors, factors = residuals(form, scales, groups)
    sizes = errors.square().mean(dim=1).sqrt().nan_to_num(math.inf)
    best = int(sizes.argmin())
    return Fit(form, scales[best], factors[best].tolist(), float(sizes[best]))


def residuals(
    form: Form, scales: Tensor, groups: Sequence[Group]
) -> tuple[Tensor, Tensor]:
    """(G, B) differences to the loss's values relative to their size, after the best
    factor for every group, (G, groups).
    """
    differences, factors = [], []
    size = torch.cat([group.values for group in groups]).square().mean().sqrt()
    for x, y, values in groups:
        sums = form.values(x, y, scales).expand(len(scales), -1)
        factor = (sums @ values) / sums.square().sum(dim=1).clamp_min(1e-300)
        differences.append((factor[:, None] * sums - values) / size)
        factors.append(factor)
    return torch.cat(differences, dim=1), torch.stack(factors, dim=1)


def refine(fitted: Fit, groups: Sequence[Group]) -> Fit:
    """Levenberg's method from a fit of the grid."""
    damping, change = 1e-3, 1e-5
    n = len(fitted.scales)
    moves = change * torch.cat([torch.zeros(1, n), torch.eye(n)]).double()
    for _ in range(MAX_STEPS):
        errors, _ = residuals(fitted.form, fitted.scales + moves, groups)
        slopes = ((errors[1:] - errors[:1]) / change).T
        normal = slopes.T @ slopes
        normal += damping * torch.diag(normal.diagonal().clamp_min(1e-12))
        step = torch.linalg.solve(normal, slopes.T @ errors[0])
        tried = best_of(fitted.form, (fitted.scales - step)[None], groups)
        if tried.value_error < fitted.value_error:
            fitted, damping = tried, damping / 10
        else:
            damping *= 10
        if damping > 1e7:
            break
    return fitted
