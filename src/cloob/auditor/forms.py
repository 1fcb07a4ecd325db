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
LENGTH = "rows not of unit length"


class Terms(NamedTuple):
    """What is contrasted: pairs of anchors and candidates, plain rows x, y or rows
    retrieved from the memory of x (U) or of y (V) by a query.
    """

    pairs: tuple[tuple[str, str], ...]
    retrieves: bool
    fault: str | None = None
    says: str = ""


TERMS = (
    Terms(BOTH, retrieves=False),
    Terms(CLOOB, retrieves=True),
    Terms(
        BOTH[:1], False, DIRECTION, "x is contrasted with all y, and no y with all x"
    ),
    Terms(
        BOTH[1:], False, DIRECTION, "y is contrasted with all x, and no x with all y"
    ),
    Terms(CLOOB[:1], True, DIRECTION, "the term of the memory of y is missing"),
    Terms(CLOOB[1:], True, DIRECTION, "the term of the memory of x is missing"),
    Terms(
        (("U_y", "U_x"), ("V_x", "V_y")),
        True,
        EXCHANGED,
        "the anchors are U_y and V_x instead of U_x and V_y",
    ),
    Terms(
        (("U_x", "V_x"), ("V_y", "U_y")),
        True,
        EXCHANGED,
        "one query is contrasted in two memories: U_x with V_x instead of U_y",
    ),
    Terms(
        (("U_x", "V_y"), ("V_y", "U_x")),
        True,
        EXCHANGED,
        "U_x is contrasted with V_y, rows of two memories, instead of U_y",
    ),
    Terms(
        (("U_x", "U_y"), ("U_y", "U_x"), ("V_x", "V_y"), ("V_y", "V_x")),
        True,
        OTHER,
        "each memory is contrasted both ways: four terms, the paper has two",
    ),
    Terms(
        (("U_x", "U_y"), ("U_y", "U_x")),
        True,
        OTHER,
        "the memory of x stands for that of y",
    ),
    Terms(
        (("V_x", "V_y"), ("V_y", "V_x")),
        True,
        OTHER,
        "the memory of y stands for that of x",
    ),
)


@dataclass(frozen=True)
class Form:
    """A contrast of some terms; ``unit``: retrieved rows are made unit again."""

    contrast: str
    terms: Terms
    unit: bool = True

    def values(self, x: Tensor, y: Tensor, scales: Tensor) -> Tensor:
        """(G, B) sums of the terms' means, for (G, n_scales) of ln τ⁻¹, ln β, bias."""
        tau = scales[:, 0].exp()[:, None, None, None]
        rows = {"x": x[None], "y": y[None]}
        if self.terms.retrieves:
            beta = scales[:, 1].exp()[:, None, None, None]
            wanted = {side for pair in self.terms.pairs for side in pair}
            for side in wanted:
                memory = rows["x" if side[0] == "U" else "y"]
                found = retrieved(rows[side[2]], memory, beta)
                rows[side] = F.normalize(found, dim=-1) if self.unit else found
        total = x.new_zeros(())
        for anchors, candidates in self.terms.pairs:
            logits = tau * (rows[anchors] @ rows[candidates].transpose(-1, -2))
            if self.contrast == "sigmoid":
                logits = logits + scales[:, -1][:, None, None, None]
            total = total + costs(self.contrast, logits).mean(dim=-1)
        return total


def retrieved(query: Tensor, memory: Tensor, beta: Tensor) -> Tensor:
    """(G, B, N, D) averages of the memory by softmax(β · similarity)."""
    return (beta * (query @ memory.transpose(-1, -2))).softmax(dim=-1) @ memory


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
            contrasts = ["infoloob", "infonce"]
            if terms.fault is None and unit:
                contrasts.append("sigmoid")
            forms += [Form(contrast, terms, unit) for contrast in contrasts]
    return forms


class Fit(NamedTuple):
    """A form with its scales, (n_scales,), the factor of every number of pairs, and
    how far its values are from the loss's, relative to their size.
    """

    form: Form
    scales: Tensor
    factors: list[float]
    error: float

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
        first, last = self.factors
        small, large = SIZES
        return round(math.log(max(last / first, 1e-9)) / math.log(large / small))

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The 0-d value for (N, D) rows."""
        factor = self.factors[-1] * (len(x) / SIZES[-1]) ** self.power
        x, y = x.double()[None], y.double()[None]
        return factor * self.form.values(x, y, self.scales[None])[0, 0]


def fit(groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Fit:
    """The form that comes nearest to the values of a loss.

    ``groups`` are (B, N, D) rows x and y with the (B,) values of the loss; every group
    has an N of its own.
    """
    tried = [grid_fit(form, groups) for form in all_forms()]
    nearest = sorted(tried, key=lambda found: found.error)[:8]
    refined = [refine(found, groups) for found in tried if found in nearest]
    best = min(found.error for found in refined)
    return next(found for found in refined if found.error <= max(3 * best, 1e-9))


def grid_fit(form: Form, groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Fit:
    """The best of a grid of scales."""
    axes = [torch.linspace(math.log(1.5), math.log(150.0), 9)]
    if form.terms.retrieves:
        axes.append(torch.linspace(math.log(0.8), math.log(80.0), 7))
    if form.contrast == "sigmoid":
        axes.append(torch.linspace(-16.0, 4.0, 9))
    scales = torch.cartesian_prod(*axes).double().reshape(-1, len(axes))
    errors, factors = residuals(form, scales, groups)
    sizes = errors.square().mean(dim=1).sqrt()
    best = int(sizes.argmin())
    return Fit(form, scales[best], factors[best].tolist(), float(sizes[best]))


def residuals(
    form: Form, scales: Tensor, groups: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(G, B) differences to the loss's values relative to their size, after the best
    factor for every group, (G, groups).
    """
    differences, factors = [], []
    size = torch.cat([values for *_, values in groups]).square().mean().sqrt()
    for x, y, values in groups:
        found = form.values(x, y, scales).expand(len(scales), -1)
        factor = (found @ values) / found.square().sum(dim=1).clamp_min(1e-300)
        differences.append((factor[:, None] * found - values) / size)
        factors.append(factor)
    return torch.cat(differences, dim=1), torch.stack(factors, dim=1)


def evaluate(
    form: Form, scales: Tensor, groups: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Fit:
    """The form at some scales, with the best factors."""
    errors, factors = residuals(form, scales[None], groups)
    error = float(errors.square().mean().sqrt())
    return Fit(form, scales, factors[0].tolist(), error if error >= 0 else math.inf)


def refine(found: Fit, groups: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Fit:
    """Levenberg's method from a fit of the grid."""
    damping = 1e-3
    for _ in range(60):
        step = levenberg_step(found, damping, groups)
        tried = evaluate(found.form, found.scales - step, groups)
        if tried.error < found.error:
            found, damping = tried, damping / 10
        else:
            damping *= 10
        if damping > 1e7:
            break
    return found


def levenberg_step(
    found: Fit, damping: float, groups: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """What to take off the scales."""
    change = 1e-5
    moves = torch.cat([torch.zeros(1, len(found.scales)), torch.eye(len(found.scales))])
    errors, _ = residuals(found.form, found.scales + change * moves.double(), groups)
    slopes = ((errors[1:] - errors[:1]) / change).T
    normal = slopes.T @ slopes
    normal += damping * torch.diag(normal.diagonal().clamp_min(1e-12))
    step: Tensor = torch.linalg.solve(normal, slopes.T @ errors[0])
    return step
