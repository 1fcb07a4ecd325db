"""Retrieval from a modern Hopfield memory (Eq. 4 and 5 of arXiv:2110.11316; Ramsauer et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from cloob.functional.checks import as_rows, scalar
from cloob.functional.modes import outside_autocast


@outside_autocast
def hopfield_retrieval(state: Tensor, stored: Tensor, beta: float | Tensor) -> Tensor:
    """One update of a continuous Hopfield network, renormalised: ``norm(softmax(β · state storedᵀ) stored)``.

    Each state pattern is replaced by an average of the stored patterns, weighted by their similarity to it. Features
    that co-occur in the memory reinforce each other, so the covariance of the retrieved patterns is richer.

    Args:
        state: (N, D) state (query) patterns, unit rows.
        stored: (M, D) stored patterns, unit rows.
        beta: Inverse temperature β > 0. Large β returns the nearest pattern, small β the mean of the memory; the
            matched pattern has to win e^{β·s} against M others, so β has to be seen against ln M.

    Returns:
        (N, D) retrieved patterns, unit rows, float32 (float64 for float64 input). An average that is exactly zero
        (antipodal stored patterns under equal weights, an empty memory) stays zero, with zero gradient.

    Raises:
        TypeError: Not tensors.
        ValueError: Shapes, dtypes or devices do not fit, or β is not positive and finite.
    """
    state, stored = as_rows(state=state, stored=stored)
    beta = scalar("beta", beta, state)
    association = (beta * state @ stored.T).softmax(dim=-1)  # (N, M)
    average = association @ stored
    norms = average.norm(dim=-1, keepdim=True)
    return torch.where(norms == 0, 0.0, average / norms.clamp_min(torch.finfo(norms.dtype).tiny))  # NaN stays
