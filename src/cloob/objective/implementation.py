"""Which functions compute the objective: those that keep N×N matrices, or those that stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cloob.functional import reference, streamed
from cloob.functional.reference import Parts

Backend = Literal["auto", "reference", "streamed"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

# At 64 to 256 pairs both paths take about equal time, above the streamed one is faster (benchmarks/objective.py --sizes
# 64 128 256 512 1024; 2 CPU cores, D = 512). With Hopfield retrieval and rows in a narrow cone, where untrained towers
# begin, the plain form loses the gradient to rounding (benchmarks/precision.py), so there it ends earlier.
STREAM_FROM = 256
STREAM_HOPFIELD_FROM = 64


class Implementation(NamedTuple):
    """One way to compute the objective, and the parts of it that a gather over ranks comes between."""

    objective: Callable[..., Tensor]
    parts: Parts


REFERENCE = Implementation(reference.cloob_reference, reference.PARTS)
STREAMED = Implementation(streamed.cloob_streamed, streamed.PARTS)


def choose_implementation(
    backend: Backend, matmul: torch.dtype | None, n_candidates: int, *, hopfield: bool, unit_rows: bool = False
) -> Implementation:
    """The functions for so many candidates.

    Args:
        backend: Which, or ``"auto"`` for the faster one.
        matmul: The dtype to multiply in, None for the rows' own.
        n_candidates: Rows that each anchor is contrasted with.
        hopfield: Whether rows are retrieved.
        unit_rows: Nobody has to look whether the rows are of unit length.
    """
    streams = matmul is not None or n_candidates >= (STREAM_HOPFIELD_FROM if hopfield else STREAM_FROM)
    if backend == "reference" or (backend == "auto" and not streams):
        return REFERENCE
    objective = partial(STREAMED.objective, matmul=matmul, unit_rows=unit_rows)
    return Implementation(objective, streamed.with_options(STREAMED.parts, matmul, unit_rows))
