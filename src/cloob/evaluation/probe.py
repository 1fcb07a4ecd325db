"""Linear probe: logistic regression on (n, F) features of the image tower, by CLIP's
protocol, which CLOOB's follow.

Radford et al. 2021, appendix A.3: L-BFGS with at most 1000 iterations and an L2 penalty
whose strength is swept on a validation split, from 10⁻⁶ to 10⁶ in eighths of a decade
by halving around the best of a coarse sweep.
"""

from __future__ import annotations

from typing import NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from cloob.errors import InputError, require
from cloob.functional import ranking

_COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_SMALL = 4_000_000
_VALIDATION = 0.2  # of the training images
_MAX_ITERATIONS = 1000


class Probe(NamedTuple):
    """A fitted probe."""

    # (C, F + 1) float64, the last column the bias; NaN for a class without training
    # images
    weight: Tensor
    strength: float  # C of scikit-learn, the inverse of the penalty
    validation_acc1: float  # at that strength
    n_train: int  # images of the last fit


def fit_probe(features: Tensor, labels: Tensor, n_classes: int) -> Probe:
    """Fits a probe, the strength of its penalty chosen on images that are not fitted;
    NaN rows are left out.

    A fifth of every class chooses the strength, and the last fit takes all.
    """
    readable = torch.isfinite(features).all(1).nonzero()[:, 0]
    fitted, held_out = _split(readable, labels)
    n_seen = len(torch.unique(labels[readable]))
    if n_seen < 2 or len(held_out) == 0:
        raise InputError(
            "a linear probe needs readable training images of two classes or more, and"
            " of one of them more than 1, to choose the strength of the penalty on;"
            f" there are {n_seen} classes"
        )
    mean, scale = _moments(features[readable])

    def fit(rows: Tensor, exponent: float) -> Tensor:
        x = (features[rows].double() - mean) / scale
        weight = _fit(x, labels[rows], n_classes, 10**exponent)
        weight[:, :-1] /= scale
        weight[:, -1] -= weight[:, :-1] @ mean
        return weight

    scores: dict[float, float] = {}
    tried = list(_COARSE)
    for step in (1.0, 0.5, 0.25, 0.125, 0.0):
        for exponent in tried:
            if _COARSE[0] <= exponent <= _COARSE[-1] and exponent not in scores:
                weight = fit(fitted, exponent)
                ranks = probe_ranks(weight, features[held_out], labels[held_out])
                scores[exponent] = ranking.topk_accuracy(ranks, 1)
        # the smallest of the best: ties go to the stronger penalty
        best = max(sorted(scores), key=lambda exponent: scores[exponent])
        tried = [best - step, best + step]
    return Probe(fit(readable, best), 10**best, scores[best], len(readable))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every feature, and one scale for all.

    The bias has no penalty, so that taking the mean off changes no optimum and speeds
    L-BFGS up; one number for all features makes the sweep mean the same for towers of
    any scale.
    """
    rows = features.double()
    mean = rows.mean(0)
    variance = (rows - mean).square().mean()
    return mean, variance.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def probe_ranks(weight: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """(n,) ranks of the right classes, from 0; NaN rows and classes without images are
    never right.
    """
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    rows = torch.cat([features.double(), ones], dim=1)
    return ranking.ranks(rows, weight, labels)


def _split(readable: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to hold out, ascending, drawn class by class."""
    generator = torch.Generator().manual_seed(0)
    fitted, held_out = [readable[:0]], [readable[:0]]
    for label in torch.unique(labels[readable]).tolist():
        rows = readable[labels[readable] == label]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n_held = min(max(round(_VALIDATION * len(rows)), 1), len(rows) - 1)
        n_fitted = len(rows) - n_held
        fitted.append(rows[:n_fitted])
        held_out.append(rows[n_fitted:])
    return torch.cat(fitted).sort().values, torch.cat(held_out).sort().values


def _fit(x: Tensor, labels: Tensor, n_classes: int, strength: float) -> Tensor:
    """(C, F + 1) weights of one logistic regression; NaN where a class has no image."""
    linear = require("sklearn.linear_model", "train")
    limits = require("threadpoolctl", "train").threadpool_limits
    unfinished = require("sklearn.exceptions", "train").ConvergenceWarning
    model = linear.LogisticRegression(
        C=strength, max_iter=_MAX_ITERATIONS, solver="lbfgs"
    )
    # Threads that wait for each other cost more than they bring on a matrix of this
    # size (20 times on a busy machine).
    n_threads = 1 if x.numel() < _SMALL else None
    with limits(n_threads), catch_warnings():
        # A limit on the iterations is part of the protocol.
        simplefilter("ignore", unfinished)
        model.fit(x.numpy(), labels.numpy())
    coefficients = torch.from_numpy(model.coef_)
    bias = torch.from_numpy(model.intercept_)
    if len(model.classes_) == 2:  # scikit-learn keeps one row, for the second class
        coefficients = torch.cat([-coefficients / 2, coefficients / 2])
        bias = torch.cat([-bias / 2, bias / 2])
    weight = torch.full((n_classes, x.shape[1] + 1), torch.nan, dtype=torch.float64)
    rows = torch.cat([coefficients, bias[:, None]], dim=1)
    weight[torch.from_numpy(model.classes_)] = rows
    return weight
