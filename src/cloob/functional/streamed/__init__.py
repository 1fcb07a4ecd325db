"""The same objective and its exact gradient in O(N·D) memory: tiles, computed again in
the backward pass.

N rows left, M rows right, D the embedding dimension. With S = left · rightᵀ and E =
exp(βS), the retrievals of both sides are ``norm(E right)`` and ``norm(Eᵀ left)``. Four
things make this cheaper than it looks:

- The softmax's denominator scales a row, and the renormalisation takes every scale of a
  row away again. So E needs no shift while exp(±β) is a number: its sums accumulate in
  any order, and X·Yᵀ serves both sides' queries.
- For the same reason the gradient G of a row of ``E right`` is orthogonal to it, and
  the usual softmax correction
  vanishes: with T = β E ∘ (G_left rightᵀ + left G_rightᵀ), the gradient of ``left`` is
      ``T right + E G_right`` and that
  of ``right`` is ``Tᵀ left + Eᵀ G_left``.
- X·Xᵀ and Y·Yᵀ are symmetric: tiles above the diagonal stand for those below.
- The contrast is a number, so its gradient is known up to the factor that comes back to
  it: a strip of logits gives both value and gradient, and nothing of it is computed
  again.

A fifth makes it more exact: a softmax ignores what its patterns have in common. Early
in training all embeddings lie in a narrow cone, where the plain form in float32 lost up
to 12 % of the gradient (benchmarks/results/precision) and bfloat16 all of it. So the
contrast takes the mean off candidates and anchors, low-precision retrieval takes it off
the stored patterns, and both put it back in float32.

Without retrieval the second direction's logits are the transpose of the first's, and
both come from one product (``both.py``).

Counting a product (N×D)(D×N) as 2N²D, retrieval and contrast cost 52 N²D forward and
backward, and 8NTD more for the lower halves of the diagonal tiles of T rows, unless all
pairs fit into half a tile: then their softmax is kept. The plain form costs 60 N²D and
keeps every N×N matrix. Without retrieval it is 6 N²D (8 where more than 2²⁶ logits are
computed twice).

Of more pairs unshifted sums are used while β · max‖row‖² ≤ 60 in float32 (600 in
float64); in low precision the centred rows decide. Beyond, retrievals run one by one
with a running row maximum, which is safe for every β. The contrast subtracts every
row's maximum, so every τ⁻¹ is safe; the sigmoid loss needs no shift.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from cloob.functional.pairs import PairContrast, Scale
from cloob.functional.streamed.both import softmax_both
from cloob.functional.streamed.contrast import (
    info_loob,
    info_nce,
    sigmoid_loss,
    softmax_two,
)
from cloob.functional.streamed.retrieval import hopfield_retrieval, retrieve
from cloob.functional.streamed.tiles import eager
from cloob.functional.streamed.weighted import weighted_contrast

__all__ = [
    "cloob_streamed",
    "hopfield_retrieval",
    "info_loob",
    "info_nce",
    "retrieve",
    "sigmoid_loss",
    "softmax_both",
    "softmax_two",
    "weighted_contrast",
]


@eager
def cloob_streamed(
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    beta: float | Tensor = 8.0,
    *,
    hopfield: bool = True,
    scale: Scale = "paper",
    ids: Tensor | None = None,
    beta_of_unit_rows: float | None = None,
    **options: Any,
) -> Tensor:
    """:func:`cloob.functional.cloob_reference` in O(N·D) memory; see there for
    arguments, value and errors.

    With ``beta_of_unit_rows``, which is β as a number, rows are taken to be of unit
    length and not read, so that no device is waited for; unshifted sums are then used
    for β ≤ 58.8 in float32, 9.8 in low precision, and never for an infinite number. It
    can be differentiated once.

    ``matmul=torch.bfloat16`` multiplies in bfloat16 with float32 accumulation. The
    gradient's relative error is then at most 3e-3 without retrieval
    (benchmarks/results/precision). With retrieval it grows as rows become alike (N = D
    = 512, τ⁻¹ = 30, β = 8; in float32 at most a fiftieth of it): 8e-3 up to a mean
    cosine of 0.8, 2e-2 at 0.95, 0.14 at 0.99, and 1.5 at 0.999. The gradient of an
    InfoNCE that has saturated (a loss below about 1e-3) is the rounding of its logits.
    """
    return PairContrast(sys.modules[__name__], **options).loss(
        image_features,
        text_features,
        inv_tau,
        beta,
        hopfield=hopfield,
        scale=scale,
        ids=ids,
        beta_of_unit_rows=beta_of_unit_rows,
    )
