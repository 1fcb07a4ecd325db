"""How embeddings lie on the sphere: the measures of the CLOOB paper and related ones.

Every function takes (N, D) rows, computes in float64 in blocks of ``chunk`` rows, and
returns a 0-d tensor in the input's dtype (float32 for a lower precision). ValueError
for rows that are not finite, too few or of another shape.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, check_rows, scalar


def covariance_spectrum(embeddings: Tensor) -> Tensor:
    """(D,) eigenvalues of the centred covariance of the embeddings (divided by N),
    largest first.

    Equal rows have a spectrum of exact zeros.
    """
    (rows,) = _rows(2, embeddings=embeddings)
    # the covariance does not depend on the origin; so equal rows become exact zeros
    rows = rows - rows[:1]
    rows = rows - rows.mean(0)
    return _like(
        torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0).clamp_min(0),
        embeddings,
    )


def effective_eigenvalues(embeddings: Tensor, threshold: float = 0.99) -> Tensor:
    """The smallest k with λ₁ + … + λ_k ≥ threshold · Σ λ of the covariance (Fürst et
    al. 2022, section 5).

    int64 in [0, min(N − 1, D)]; 0 when all rows are equal. A small k means that the
    embeddings fill a thin slice of their space; in the paper it rises most for InfoLOOB
    with Hopfield retrieval.
    """
    spectrum = covariance_spectrum(_rows(2, embeddings=embeddings)[0])
    # Eigenvalues below the rounding of the largest are zeros: without this a threshold
    # of 1 would count noise.
    noise = spectrum[0] * max(embeddings.shape) * torch.finfo(torch.float64).eps
    sums = torch.where(spectrum > noise, spectrum, 0).cumsum(0)
    return (sums < threshold * sums[-1]).sum() + (sums[-1] > 0)


def ajne(embeddings: Tensor, chunk: int = 1024) -> Tensor:
    """Ajne's statistic for uniformity of directions on the sphere; lower is more
    uniform.

    A_N = N/4 − 1/(πN) Σ_{i<j} arccos(x_i·x_j), the average over all hemispheres of
    (points inside − N/2)² / N: 0 for antipodal pairs, 1/4 in expectation for uniform
    points, N/4 when all points coincide. It grows with N, so compare equal N only, and
    is blind to axial clustering. Ajne 1968 (Biometrika 55) on the circle, Prentice 1978
    (Annals of Statistics 6) on the sphere; Fürst et al. 2022 use it on the towers'
    outputs.
    """
    x = _rows(2, embeddings=embeddings, zeros=False)[0]
    x = x / x.norm(dim=1, keepdim=True)
    n, angles = len(x), x.new_zeros(())
    for start in range(0, n, chunk):
        cosines = _pairs_above_diagonal(x[start : start + chunk] @ x[start:].T)
        angles = angles + cosines.clamp(-1, 1).arccos().sum()
    return _like((n / 4 - angles / (math.pi * n)).clamp_min(0), embeddings)


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean distance of positive pairs, E ‖x − y‖^α; lower is closer (Wang & Isola 2020,
    arXiv:2005.10242).

    Row i of ``y`` is the positive of row i of ``x``; in [0, 2^α] for unit rows.
    """
    a, b = _rows(1, x=x, y=y)
    return _like((a - b).norm(dim=1).pow(alpha).mean(), x)


def uniformity(x: Tensor, t: float = 2.0, chunk: int = 1024) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs; lower is more uniform
    (Wang & Isola 2020).

    ln E_{i<j} exp(−t ‖x_i − x_j‖²), in [−4t, 0] for unit rows; 0 when all rows are
    equal.
    """
    rows = _rows(2, x=x)[0]
    # distances do not depend on the origin, and equal rows get distances of exact zero
    rows = rows - rows[:1]
    n, squares, parts = len(rows), rows.square().sum(1), []
    for start in range(0, n, chunk):
        stop = start + chunk
        distances = (
            squares[start:stop, None]
            + squares[start:]
            - 2 * rows[start:stop] @ rows[start:].T
        )
        parts.append(
            torch.logsumexp(-t * _pairs_above_diagonal(distances).clamp_min(0), 0)
        )
    return _like(torch.logsumexp(torch.stack(parts), 0) - math.log(n * (n - 1) / 2), x)


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance between the centres of two modalities, ‖mean x − mean y‖ (Liang et al.
    2022, arXiv:2203.02053).

    In [0, 2] for unit rows, of which the modalities may have unequal numbers.
    """
    a, b = _rows(1, same_rows=False, x=x, y=y)
    return _like((a.mean(0) - b.mean(0)).norm(), x)


def saturation(
    anchors: Tensor, candidates: Tensor, inv_tau: float | Tensor, chunk: int = 1024
) -> Tensor:
    """The factor 1 − p that InfoNCE's gradient carries, on average; near 0 the loss has
    saturated.

    p_i = exp(τ⁻¹ a_i·c_i) / Σ_j exp(τ⁻¹ a_i·c_j) is the softmax probability of the
    positive, candidate i of anchor i (Fürst et al. 2022, section 3). The value, in [0,
    1], rises with N; compare equal N only.
    """
    a, c = _rows(2, anchors=anchors, candidates=candidates)
    scale = scalar("inv_tau", inv_tau, a)
    total = a.new_zeros(())
    for start in range(0, len(a), chunk):
        logits = scale * (a[start : start + chunk] @ c.T)
        log_p = logits.diagonal(start) - torch.logsumexp(logits, 1)
        # 1 − p without the cancellation of p near 1
        total = total - torch.expm1(log_p).sum()
    return _like(total / len(a), anchors)


def _pairs_above_diagonal(block: Tensor) -> Tensor:
    """The entries of the pairs i < j, flat, of a block on the diagonal."""
    return block[torch.ones_like(block, dtype=torch.bool).triu(1)]


def _rows(
    at_least: int, same_rows: bool = True, zeros: bool = True, **named: Tensor
) -> list[Tensor]:
    """The matrices in float64, checked; MPS has none."""
    matrices = [
        (x.cpu() if x.device.type == "mps" else x).double() for x in as_rows(**named)
    ]
    counts = [len(x) for x in matrices]
    if min(counts) < at_least or (same_rows and len(set(counts)) > 1):
        numbers = " and ".join(
            f"{name} {count}" for name, count in zip(named, counts, strict=True)
        )
        alike = ", all alike," if same_rows else ""
        raise ValueError(
            f"numbers of rows: {numbers}; at least {at_least}{alike} are expected"
        )
    for name, x in zip(named, matrices, strict=True):
        check_rows(name, x, zeros=zeros)
    return matrices


def _like(value: Tensor, reference: Tensor) -> Tensor:
    return (value if reference.dtype == torch.float64 else value.float()).to(
        reference.device
    )
