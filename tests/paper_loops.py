"""The paper's formulas (arXiv:2110.11316, Eq. 3 to 5) over plain lists: the oracle that
shares no code with us.

Every loop also takes complex numbers. ``value_and_slope`` uses that for exact
derivatives: the imaginary part of f(x + ih·d), divided by a tiny h, is the derivative
along d.
"""

import cmath
import itertools
import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

Number = float | complex
Rows = Sequence[Sequence[Number]]
MEMBERS = [
    *itertools.product(("infoloob", "infonce"), (True, False)),
    ("sigmoid", False),
]
MEMBER_IDS = [
    f"{contrast}{'-hopfield' if hopfield else ''}" for contrast, hopfield in MEMBERS
]


def normalised(rows):
    """Of unit length."""
    return rows / rows.norm(dim=1, keepdim=True)


def unit(n, d, seed=0, dtype=torch.float64):
    """(n, d) random unit rows."""
    rows = torch.randn(
        n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return normalised(rows).to(dtype)


def pairs(n, d, noise=2.0, seed=0, dtype=torch.float64):
    """Two (n, d) sides of n pairs, cosines about 1 / (1 + noise²): early in training,
    nothing is saturated.
    """
    common = unit(n, d, seed)
    x, y = (normalised(common + noise * unit(n, d, seed + k)) for k in (1, 2))
    return x.to(dtype), y.to(dtype)


def by_type(name):
    return lambda number: getattr(cmath if isinstance(number, complex) else math, name)(
        number
    )


exp, log, sqrt = map(by_type, ("exp", "log", "sqrt"))


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=True))


def log_sum_exp(values):
    highest = max(value.real for value in values)
    return highest + log(sum(exp(value - highest) for value in values))


def retrieval_loop(state, stored, beta):
    """Eq. 4 and 5, query by query."""
    found = []
    for query in state:
        logits = [beta * dot(query, pattern) for pattern in stored]
        total = log_sum_exp(logits)
        weights = [exp(logit - total) for logit in logits]
        average = [
            sum(w * p[k] for w, p in zip(weights, stored, strict=True))
            for k in range(len(query))
        ]
        length = sqrt(dot(average, average))
        found.append([v / length if abs(length) > 0 else 0.0 for v in average])
    return found


class TooClose(Exception):
    """A similarity lies so near a margin that rounding decides on which side."""


def similarities(
    anchors, candidates, offset=0, ids=None, candidate_ids=None, exclude_above=None
):
    """For each anchor that of its positive and those of its negatives: other ids, above
    the positive by a margin.
    """
    found = []
    candidate_ids = ids if candidate_ids is None else candidate_ids
    for i, anchor in enumerate(anchors):
        positive = dot(anchor, candidates[i + offset])
        negatives = []
        for j, candidate in enumerate(candidates):
            if j == i + offset or (
                ids is not None
                and candidate_ids is not None
                and ids[i] == candidate_ids[j]
            ):
                continue
            gap = (
                0.0
                if exclude_above is None
                else complex(dot(anchor, candidate) - positive).real - exclude_above
            )
            if exclude_above is not None and abs(gap) < 1e-2:
                raise TooClose
            if gap <= 0:
                negatives.append(dot(anchor, candidate))
        found.append((positive, negatives))
    return found


def contrast_loop(contrast, anchors, candidates, inv_tau, *masks, **named):
    """One direction of Eq. 3, anchor by anchor; an anchor without negatives adds
    nothing.
    """
    losses = []
    for positive, others in similarities(anchors, candidates, *masks, **named):
        negatives = [inv_tau * other for other in others]
        if contrast == "infonce":
            losses.append(
                log_sum_exp([inv_tau * positive, *negatives]) - inv_tau * positive
            )
        else:
            losses.append(
                log_sum_exp(negatives) - inv_tau * positive if negatives else 0.0
            )
    return sum(losses) / len(losses)


def sigmoid_loop(anchors, candidates, inv_tau, bias, *masks, **named):
    """SigLIP's loss (arXiv:2303.15343, Eq. 1), pair by pair; others that are no
    negatives are left out.
    """
    losses = []
    for positive, negatives in similarities(anchors, candidates, *masks, **named):
        signed = [
            -(inv_tau * positive + bias),
            *(inv_tau * negative + bias for negative in negatives),
        ]
        losses += [log_sum_exp([0.0, value]) for value in signed]  # ln(1 + e^…)
    return sum(losses) / len(anchors)


def scores_loop(scores, contrast, shares, weights, masked):
    """One direction of a contrast of a list of rows of scores, positive by positive:
    ``shares`` and ``masked`` are lists of rows too, ``weights`` one of numbers or rows.
    """
    total = 0.0
    for row, of_row, weight, out in zip(scores, shares, weights, masked, strict=True):
        for j, (score, share) in enumerate(zip(row, of_row, strict=True)):
            factor = weight[j] if isinstance(weight, list) else weight
            if contrast == "sigmoid":
                total += factor * share * log_sum_exp([0.0, -score])
                negative = 0.0 if out[j] else factor * (1 - share)
                total += negative * log_sum_exp([0.0, score])
                continue
            others = [s for k, s in enumerate(row) if k != j and not out[k]]
            if share and others:
                own = [score] if contrast == "infonce" else []
                total += factor * share * (log_sum_exp([*others, *own]) - score)
    return total / len(scores)


def targets_loop(
    x, y, inv_tau, beta, contrast, hopfield, shares, weights, ids, bias, scale
):
    """The objective with soft targets: pair j is a share of the positive of pair i, in
    both directions.
    """
    u_x = x
    u_y = y
    v_x = x
    v_y = y
    if hopfield:
        u_x = retrieval_loop(x, x, beta)
        u_y = retrieval_loop(y, x, beta)
        v_x = retrieval_loop(x, y, beta)
        v_y = retrieval_loop(y, y, beta)
    masked = [[ids is not None and a == b for b in ids or x] for a in ids or x]
    sides = []
    for anchors, candidates in ((u_x, u_y), (v_y, v_x)):
        scores = [[inv_tau * dot(a, c) + bias for c in candidates] for a in anchors]
        sides.append(scores_loop(scores, contrast, shares, weights, masked))
    return sum(sides) / inv_tau if scale == "paper" else sum(sides) / 2


def objective_loop(
    x,
    y,
    inv_tau,
    beta,
    *,
    contrast="infoloob",
    hopfield=True,
    scale="paper",
    bias=-10.0,
    ids=None,
    exclude_above=None,
):
    """Eq. 3 with the authors' factor τ, or the mean of both directions."""
    u_x = x
    u_y = y
    v_x = x
    v_y = y
    if hopfield:
        u_x = retrieval_loop(x, x, beta)
        u_y = retrieval_loop(y, x, beta)
        v_x = retrieval_loop(x, y, beta)
        v_y = retrieval_loop(y, y, beta)
    sides = ((u_x, u_y), (v_y, v_x))
    masks = {"ids": ids, "exclude_above": exclude_above}
    if contrast == "sigmoid":
        return sum(sigmoid_loop(a, c, inv_tau, bias, **masks) for a, c in sides) / 2
    both = sum(contrast_loop(contrast, a, c, inv_tau, **masks) for a, c in sides)
    return both / inv_tau if scale == "paper" else both / 2


def value_and_slope(loop, inputs, along):
    """The value of a loop over ``inputs``, and its derivative along a direction of the
    same shapes.
    """
    h = 1e-30
    both = (
        torch.complex(t.double(), h * d.double())
        for t, d in zip(inputs, along, strict=True)
    )
    found = complex(loop(*(t.tolist() for t in both)))
    return found.real, found.imag / h


def value_and_gradients(loss, *inputs, **options):
    """The loss, and its gradient by each input (zeros where it does not depend on
    it).
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    value = loss(*leaves, **options)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        value.detach(),
        *(
            torch.zeros_like(t) if g is None else g
            for t, g in zip(leaves, gradients, strict=True)
        ),
    ]


def relative_error(got, expected):
    """‖got − expected‖ / ‖expected‖, in float64; 0 where both are zero."""
    difference = (got.double() - expected.double()).norm()
    size = expected.double().norm()
    return float(difference / size) if size > 0 else float(difference)


def joint(gradients):
    """All gradients as one vector: rounding is relative to its norm, not to that of a
    part that nearly cancels.
    """
    return torch.cat([g.double().flatten() for g in gradients])


def count_flops(work):
    """Operations of the matrix products in ``work``; torch by itself does not count
    those in place.
    """

    def addmm(total, a, b, **others):
        return 2 * a[0] * a[1] * b[1]

    def baddbmm(total, a, b, **others):
        return a[0] * addmm(total, a[1:], b[1:])

    in_place = {torch.ops.aten.addmm_: addmm, torch.ops.aten.baddbmm_: baddbmm}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return counter.get_total_flops()
