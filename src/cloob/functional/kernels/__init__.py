"""The streamed objective as Triton kernels: the same value and gradient, each tile finished before it leaves the chip.

It computes what :mod:`cloob.functional.streamed` does, tile by tile, for rows on a CUDA device that are not float64.
The derivation is there, and so are the functions that take and check the arguments. That path writes each tile by a
matrix product, then reads, scales, exponentiates and rounds it by four more operations, which carry numbers to and fro.
Here the product's own program does all of that:

====================================  =====================================================  ==========
what, for a tile of n × m             kernel                                                 operations
====================================  =====================================================  ==========
retrieval, E of both directions       ``retrieval_tiles.exponentials``                       2nmD
retrieval, E right and Eᵀ left        ``products.both_sides``                                4nmD
its gradient, E and T                 ``retrieval_tiles.pull``                               6nmD
its gradient, four products           ``products.both_sides``                                8nmD
contrast, a strip of exponentials     ``softmax.exponentials``                               2nmD
contrast, the strip's normalisation   ``softmax.rescale``                                    none
contrast, the gradient of both sides  ``products.both_sides``                                4nmD
====================================  =====================================================  ==========

X·Yᵀ is gone through whole, X·Xᵀ and Y·Yᵀ by the tiles on and above the diagonal: 20 N²D + 2 · 10 N²D, and twice
6 N²D for the contrasts, together 52 N²D (and 8 N T D for the halves of diagonal tiles of T = 4,096 rows).

Memory traffic, in bfloat16: a number of a tile is written once and read by its row's and its column's programs, 6 bytes
(E forward, E and T backward: 36 N² bytes in all); a number of a strip costs 10 (20 N² for both contrasts). Together
56 N² bytes, of which a tile's 32 MiB may stay in the L2 cache. Against 52 N²D operations that is 0.93 D operations a
byte, 475 at D = 512, where an H100 balances at about 300: the products are to be the limit, not the memory.

A test compiles the kernels for NVIDIA cards (sm_80, sm_90), and under Triton's interpreter they are correct. **They
have not run on a GPU yet**, no time has been measured, and ``backend="auto"`` never takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloob.functional.checks import outside_autocast
from cloob.functional.kernels.contrast import info_loob, info_nce
from cloob.functional.kernels.retrieval import hopfield_retrieval, retrieve
from cloob.functional.kernels.sigmoid import sigmoid_loss
from cloob.functional.reference import Contrast, Parts, Scale, of_parts
from cloob.functional.streamed import with_options
from cloob.functional.streamed.tiles import eager

__all__ = ["cloob_triton", "hopfield_retrieval", "info_loob", "info_nce", "retrieve", "sigmoid_loss"]

PARTS = Parts(retrieve, hopfield_retrieval, info_loob, info_nce, sigmoid_loss)


@eager
@outside_autocast
def cloob_triton(
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
    matmul: torch.dtype | None = None,
    unit_rows: bool = False,
) -> Tensor:
    """:func:`cloob.functional.streamed.cloob_streamed` by Triton kernels, for rows on a CUDA device, no float64."""
    parts = with_options(PARTS, matmul, unit_rows)
    member: dict[str, Any] = {"contrast": contrast, "hopfield": hopfield, "scale": scale, "bias": bias}
    return of_parts(parts, image_features, text_features, inv_tau, beta, ids=ids, **member)
