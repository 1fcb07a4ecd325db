"""Linear probe: logistic regression on (n, F) features of the image tower, by CLIP's
protocol, which CLOOB's follow.

Radford et al. 2021, appendix A.3: L-BFGS with at most 1000 iterations and an L2 penalty
whose strength is swept on a validation split, from 10⁻⁶ to 10⁶ in eighths of a decade
by halving around the best of a coarse sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from cloob.errors import InputError, require
from cloob.functional import ranking
from cloob.functional.bootstrap import bootstrap_interval

_COARSE = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
_SMALL = 4_000_000
_MAX_VALIDATION_SHOTS = 4
_VALIDATION = 0.2  # of the training images, without shots
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class ProbeOptions:
    """How probes are fitted."""

    shots: int | None = None  # training images a class; None takes all
    # one fit each; a seed draws the validation split and the shots
    seeds: tuple[int, ...] = (0,)


class Probe(NamedTuple):
    """A fitted probe."""

    # (C, F + 1) float64, the last column the bias; NaN for a class without training
    # images
    weight: Tensor
    strength: float  # C of scikit-learn, the inverse of the penalty
    validation_acc1: float  # at that strength
    n_train: int  # images of the last fit


def fit_probe(
    features: Tensor,
    labels: Tensor,
    n_classes: int,
    *,
    options: ProbeOptions | None = None,
    seed: int = 0,
) -> Probe:
    """Fits a probe, the strength of its penalty chosen on images that are not fitted;
    NaN rows are left out.

    With ``shots`` k, k images a class are fitted and up to min(k, 4) others a class
    choose the strength; the last fit stays with the k. Without, a fifth of every class
    chooses, and the last fit takes all.
    """
    options = options or ProbeOptions()
    readable = torch.isfinite(features).all(1).nonzero()[:, 0]
    fitted, held_out = _split(readable, labels, options, seed)
    n_seen = len(torch.unique(labels[readable]))
    if n_seen < 2 or len(held_out) == 0:
        raise InputError(
            "a linear probe needs readable training images of two classes or more, and"
            f" of one of them more than {options.shots or 1}, to choose the strength of"
            f" the penalty on; there are {n_seen} classes"
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
    last = fitted if options.shots is not None else readable
    return Probe(fit(last, best), 10**best, scores[best], len(last))


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


def probe_numbers(
    fits: Sequence[tuple[Tensor, Probe]],
    labels: Tensor,
    n_classes: int,
    options: ProbeOptions,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a set, means over the seeds, from the (n,) ranks of the test
    images and the probe of every seed.

    Intervals are over images, ``acc1_sd`` is over seeds (None for one).
    """
    ranks = torch.stack([each for each, _ in fits])
    probes = [probe for _, probe in fits]
    recalls = [
        float(ranking.per_class_recall(each < 1, labels, n_classes).nanmean())
        for each in ranks
    ]
    accuracies = (ranks < 1).double().mean(dim=1)
    numbers: dict[str, Any] = {
        "acc1": float(accuracies.mean()),
        "acc5": float((ranks < 5).double().mean()),
        "mean_per_class_recall": sum(recalls) / len(recalls),
    }
    for k in (1, 5):
        of_images = (ranks < k).double().mean(dim=0)
        interval = bootstrap_interval(of_images, level=level, seed=seed)
        numbers[f"acc{k}_interval"] = list(interval)
    numbers["acc1_sd"] = float(accuracies.std()) if len(fits) > 1 else None
    numbers["n"] = len(labels)
    numbers["n_classes"] = n_classes
    numbers["n_train"] = probes[0].n_train
    numbers["shots"] = options.shots
    numbers["seeds"] = list(options.seeds)
    numbers["strength"] = [probe.strength for probe in probes]
    validated = [probe.validation_acc1 for probe in probes]
    numbers["validation_acc1"] = sum(validated) / len(validated)
    return numbers


def _split(
    readable: Tensor, labels: Tensor, options: ProbeOptions, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to hold out, ascending, drawn class by class."""
    generator = torch.Generator().manual_seed(seed)
    fitted, held_out = [readable[:0]], [readable[:0]]
    for label in torch.unique(labels[readable]).tolist():
        rows = readable[labels[readable] == label]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        if options.shots is None:
            n_held = min(max(round(_VALIDATION * len(rows)), 1), len(rows) - 1)
            n_fitted = len(rows) - n_held
        else:
            n_fitted = min(options.shots, len(rows))
            n_held = min(options.shots, _MAX_VALIDATION_SHOTS, len(rows) - n_fitted)
        fitted.append(rows[:n_fitted])
        held_out.append(rows[n_fitted : n_fitted + n_held])
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
