"""How embeddings lie on the sphere: the measures of the CLOOB paper and related ones.

Every function takes (N, D) rows, computes in float64 in blocks of ``CHUNK`` rows, and
returns a 0-d tensor in the input's dtype (float32 for a lower precision). ValueError
for rows that are not finite, too few or of another shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, check_rows, scalar
from cloob.functional.streamed.tiles import blocks

CHUNK = 1024
SHARE = 0.99  # of the variance, in the paper


def covariance_spectrum(embeddings: Tensor) -> Tensor:
    """(D,) eigenvalues of the centred covariance of the embeddings (divided by N),
    largest first.

    Equal rows have a spectrum of exact zeros.
    """
    (rows,) = _in_float64(2, embeddings=embeddings)
    return _like(_spectrum(rows), embeddings)


def effective_eigenvalues(embeddings: Tensor) -> Tensor:
    """The smallest k with λ₁ + … + λ_k ≥ 0.99 Σ λ of the covariance (Fürst et al. 2022,
    section 5).

    int64 in [0, min(N − 1, D)]; 0 when all rows are equal. A small k means that the
    embeddings fill a thin slice of their space; in the paper it rises most for InfoLOOB
    with Hopfield retrieval.
    """
    (rows,) = _in_float64(2, embeddings=embeddings)
    sums = _spectrum(rows).cumsum(0)
    total = sums[-1]
    return (sums < SHARE * total).sum() + (total > 0)


def ajne(embeddings: Tensor) -> Tensor:
    """Ajne's statistic for uniformity of directions on the sphere; lower is more
    uniform.

    A_N = N/4 − 1/(πN) Σ_{i<j} arccos(x_i·x_j), the average over all hemispheres of
    (points inside − N/2)² / N: 0 for antipodal pairs, 1/4 in expectation for uniform
    points, N/4 when all points coincide. It grows with N, so compare equal N only, and
    is blind to axial clustering. Ajne 1968 (Biometrika 55) on the circle, Prentice 1978
    (Annals of Statistics 6) on the sphere; Fürst et al. 2022 use it on the towers'
    outputs.
    """
    (x,) = _in_float64(2, embeddings=embeddings)
    check_rows("embeddings", x)
    x = x / x.norm(dim=1, keepdim=True)
    n = len(x)
    angles = x.new_zeros(())
    for rows in blocks(n, CHUNK):
        cosines = _above_diagonal(x[rows] @ x[rows.start :].T)
        angles += cosines.clamp(-1, 1).arccos().sum()
    statistic = n / 4 - angles / (math.pi * n)
    return _like(statistic.clamp_min(0), embeddings)


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, E ‖x − y‖²; lower is closer (Wang and
    Isola 2020, arXiv:2005.10242).

    Row i of ``y`` is the positive of row i of ``x``; in [0, 4] for unit rows.
    """
    a, b = _in_float64(1, x=x, y=y)
    _check_pairs(x=a, y=b)
    return _like((a - b).square().sum(dim=1).mean(), x)


def uniformity(x: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs; lower is more uniform
    (Wang & Isola 2020).

    ln E_{i<j} exp(−2 ‖x_i − x_j‖²), in [−8, 0] for unit rows; 0 when all rows are
    equal.
    """
    (rows,) = _in_float64(2, x=x)
    # distances do not depend on the origin, and equal rows get distances of exact zero
    rows = rows - rows[:1]
    squares = rows.square().sum(1)
    n = len(rows)
    potentials = []
    for block in blocks(n, CHUNK):
        products = rows[block] @ rows[block.start :].T
        distances = squares[block, None] + squares[block.start :] - 2 * products
        distances = _above_diagonal(distances).clamp_min(0)
        potentials.append(torch.logsumexp(-2 * distances, 0))
    total = torch.logsumexp(torch.stack(potentials), 0)
    return _like(total - math.log(n * (n - 1) / 2), x)


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance between the centres of two modalities, ‖mean x − mean y‖ (Liang et al.
    2022, arXiv:2203.02053).

    In [0, 2] for unit rows, of which the modalities may have unequal numbers.
    """
    a, b = _in_float64(1, x=x, y=y)
    return _like((a.mean(0) - b.mean(0)).norm(), x)


def saturation(anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor) -> Tensor:
    """The factor 1 − p that InfoNCE's gradient carries, on average; near 0 the loss has
    saturated.

    p_i = exp(τ⁻¹ a_i·c_i) / Σ_j exp(τ⁻¹ a_i·c_j) is the softmax probability of the
    positive, candidate i of anchor i (Fürst et al. 2022, section 3). The value, in [0,
    1], rises with N; compare equal N only.
    """
    a, c = _in_float64(2, anchors=anchors, candidates=candidates)
    _check_pairs(anchors=a, candidates=c)
    scale = scalar("inv_tau", inv_tau, a)
    total = a.new_zeros(())
    for rows in blocks(len(a), CHUNK):
        logits = scale * (a[rows] @ c.T)
        log_p = logits.diagonal(rows.start) - torch.logsumexp(logits, 1)
        # 1 − p without the cancellation of p near 1
        total = total - torch.expm1(log_p).sum()
    return _like(total / len(a), anchors)


def _spectrum(rows: Tensor) -> Tensor:
    """Eigenvalues of the covariance, largest first; zeros where they are rounding."""
    # the covariance does not depend on the origin; so equal rows become exact zeros
    rows = rows - rows[:1]
    rows = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    noise = values[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
    return torch.where(values > noise, values, 0.0)


def _above_diagonal(block: Tensor) -> Tensor:
    """The entries of the pairs i < j, flat, of a block on the diagonal."""
    return block[torch.ones_like(block, dtype=torch.bool).triu(1)]


def _in_float64(at_least: int, **named: Tensor) -> list[Tensor]:
    """The matrices in float64, of finite rows; MPS has none."""
    matrices = []
    for name, rows in zip(named, as_rows(**named), strict=True):
        if len(rows) < at_least:
            raise ValueError(
                f"{name} has {len(rows)} rows; at least {at_least} are expected"
            )
        check_rows(name, rows, zeros=True)
        is_lacking = rows.device.type == "mps"
        matrices.append((rows.cpu() if is_lacking else rows).double())
    return matrices


def _check_pairs(**named: Tensor) -> None:
    """Refuses sides of different numbers of rows."""
    counts = {name: len(rows) for name, rows in named.items()}
    if len(set(counts.values())) > 1:
        numbers = " and ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"numbers of rows: {numbers}; pairs are expected")


def _like(value: Tensor, reference: Tensor) -> Tensor:
    dtype = value.dtype if reference.dtype == torch.float64 else torch.float32
    return value.to(reference.device, dtype)
