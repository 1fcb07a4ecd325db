"""By which of the two paths a call is computed."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import torch

from cloob.functional import reference, streamed
from cloob.functional.checks import one_of
from cloob.functional.private import in_transform, is_exporting, lowers_products

Backend = Literal["auto", "reference", "streamed"]
Products = Literal["float32", "bfloat16"]
# Without retrieval both paths take about equal time at 64 to 256 pairs, above it the
# streamed one is faster (benchmarks/objective.py --sizes 64 128 256 512 1024; 2 CPU
# cores, D = 512). With retrieval the plain form loses the gradient of rows in a narrow
# cone to rounding (benchmarks/results/precision), so that always streams.
STREAM_FROM = 256


def check_products(backend: str, matmul: str) -> None:
    """Refuses unknown ways of computing, and bfloat16 where nothing would use it."""
    one_of("backend", backend, get_args(Backend))
    one_of("matmul", matmul, get_args(Products))
    if matmul == "bfloat16" and backend == "reference":
        raise ValueError("matmul='bfloat16' needs backend='streamed' or 'auto'")


def choose_backend(
    backend: Backend,
    matmul: Products,
    hopfield: bool,
    n_candidates: int,
    device: torch.device,
) -> ModuleType:
    """The module that computes a call against so many candidates: ``reference``, or
    ``streamed`` in tiles.
    """
    if backend != "auto" or matmul == "bfloat16":
        return reference if backend == "reference" else streamed
    # While torch.compile traces, torch.func and TF32 are unknown.
    compiling = torch.compiler.is_compiling()
    needs_reference = is_exporting() if compiling else in_transform()
    if needs_reference:
        return reference
    # A backward pass inside autocast or under TF32 would round the products of the
    # reference.
    rounds = torch.is_autocast_enabled(device.type) or (
        not compiling and lowers_products()
    )
    if hopfield or rounds or n_candidates >= STREAM_FROM:
        return streamed
    return reference
