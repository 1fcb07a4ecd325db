"""Which functions compute the objective: those that keep N×N matrices, those that stream, or kernels that stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cloob.errors import InputError, require
from cloob.functional import reference, streamed
from cloob.functional.reference import Parts

Backend = Literal["auto", "reference", "streamed", "triton"]
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
        backend: Which, or ``"auto"``, which never takes ``"triton"``: no measurement shows those kernels to be faster.
        matmul: The dtype to multiply in, None for the rows' own.
        n_candidates: Rows that each anchor is contrasted with.
        hopfield: Whether rows are retrieved.
        unit_rows: Nobody has to look whether the rows are of unit length.

    Raises:
        InputError: ``"triton"`` where there is no CUDA or no package of that name.
    """
    streams = matmul is not None or n_candidates >= (STREAM_HOPFIELD_FROM if hopfield else STREAM_FROM)
    if backend == "reference" or (backend == "auto" and not streams):
        return REFERENCE
    functions = _triton() if backend == "triton" else STREAMED
    objective = partial(functions.objective, matmul=matmul, unit_rows=unit_rows)
    return Implementation(objective, streamed.with_options(functions.parts, matmul, unit_rows))


def _triton() -> Implementation:
    """The Triton kernels.

    Raises:
        InputError: There is no CUDA, and nothing that stands for it, or the package triton is not installed.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("backend='triton' needs a CUDA device, and torch sees none; backend='streamed' needs none")
    require("triton", "triton")
    from cloob.functional import kernels  # the package triton is an extra

    return Implementation(kernels.cloob_triton, kernels.PARTS)
