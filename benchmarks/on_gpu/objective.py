"""Time and memory of the objective, forward and backward, beside others and beside the floors of the same run.

Two floors. Arithmetic: 52 N²D operations of CLOOB's streamed path at the rate of this card's matrix products, in the
same arithmetic, of this run. Memory: both inputs read and both gradients written once, float32, at the rate of a copy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from benchmarks.objective import PRODUCTS, inputs, step
from benchmarks.on_gpu.losses import Contender, contenders, products
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.timing import extra_bytes, free_bytes, seconds

ARITHMETICS = ("float32", "tf32", "bfloat16")
MOST_REPEATS = 7


def measure(record: Record, device: torch.device, sizes: Sequence[int], dims: Sequence[int]) -> None:
    """Rows of floors, then of each contender at each size, the small ones first.

    Args:
        record: Where rows go.
        device: Where to compute.
        sizes: N, ascending.
        dims: D.
    """
    found, missing = contenders(device)
    for name, why in missing.items():
        record.skip(name, why)
    rates = {dim: _rates(record, device, dim) for dim in dims}
    copied = _copy_rate(record, device)
    took: dict[Contender, tuple[int, float]] = {}  # N²D and seconds of the last size
    for n in sizes:
        for dim in dims:
            some = [one for one in found if _can(one, n, dim, record, device, took)]
            for contender, times, held in _times(some, n, dim, device, record):
                median = statistics.median(times)
                took[contender] = (n * n * dim, median)
                floor = 16 * n * dim / copied
                if contender.kind == "cloob":
                    floor = max(floor, PRODUCTS * n * n * dim / rates[dim][contender.arithmetic])
                record.row(
                    what=contender.name,
                    kind=contender.kind,
                    arithmetic=contender.arithmetic,
                    n=n,
                    dim=dim,
                    median_s=median,
                    min_s=min(times),
                    repeats=len(times),
                    extra_bytes=held,
                    floor_s=floor if contender.kind == "cloob" else None,
                )


def _rates(record: Record, device: torch.device, dim: int) -> dict[str, float]:
    """Operations a second of the two products that the objective consists of, by arithmetic."""
    rows = 8192 if device.type == "cuda" else 1024
    found = {}
    for arithmetic in ARITHMETICS:
        kind = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
        a, b = (torch.randn(rows, dim, device=device, dtype=kind) for _ in range(2))
        s = torch.randn(rows, rows, device=device, dtype=kind)

        def work(a: torch.Tensor = a, b: torch.Tensor = b, s: torch.Tensor = s) -> None:
            torch.mm(a, b.T)
            torch.mm(s, a)

        with products(arithmetic):
            found[arithmetic] = 4.0 * rows * rows * dim / _fastest(work, device)
        record.row(what="GEMM", arithmetic=arithmetic, dim=dim, rows=rows, operations_per_second=found[arithmetic])
    return found


def _copy_rate(record: Record, device: torch.device) -> float:
    """Bytes a second that are read and written by a copy."""
    size = 2**28 if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * size / _fastest(lambda: target.copy_(source), device)
    record.row(what="copy", bytes_per_second=rate)
    return rate


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        work()
    return min(seconds(work, device) for _ in range(10))


def _can(
    contender: Contender,
    n: int,
    dim: int,
    record: Record,
    device: torch.device,
    took: dict[Contender, tuple[int, float]],
) -> bool:
    """Whether there is memory and time for a contender; else it is named as left out."""
    needs = contender.matrices * 4 * n * n
    if needs > 0.9 * free_bytes(device):
        record.skip(_named(contender, n, dim), f"would need about {needs / 2**30:.0f} GiB")
        return False
    before, last = took.get(contender, (n * n * dim, 0.0))
    return record.has_time_for(_named(contender, n, dim), 3 * last * n * n * dim / before, share=0.15)


def _named(contender: Contender, n: int, dim: int) -> str:
    return f"{contender.name}, {contender.kind}, {contender.arithmetic}, N = {n:,}, D = {dim:,}"


def _times(
    some: Sequence[Contender], n: int, dim: int, device: torch.device, record: Record
) -> list[tuple[Contender, list[float], int | None]]:
    """Seconds of interleaved repeats, and memory; one that fails is named as left out."""
    x, y = inputs(n, dim, str(device))
    held: dict[Contender, int | None] = {}
    first: dict[Contender, float] = {}
    for contender in some:
        try:
            with products(contender.arithmetic):
                step(contender.loss, *inputs(256, dim, str(device)))  # kernels are compiled
                held[contender] = extra_bytes(lambda c=contender: step(c.loss, x, y), device)  # type: ignore[misc]
                first[contender] = seconds(lambda c=contender: step(c.loss, x, y), device)  # type: ignore[misc]
        except Exception as error:  # other people's kernels fail in ways of their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            record.skip(_named(contender, n, dim), f"{type(error).__name__}: {reason[:200]}")
            held.pop(contender, None)
    times = {contender: [took] for contender, took in first.items()}
    round_takes = sum(first.values())
    rounds = min(MOST_REPEATS - 1, math.floor(0.1 * record.left() / max(round_takes, 1e-9)))
    for _ in range(rounds):
        for contender, taken in times.items():
            with products(contender.arithmetic):
                taken.append(seconds(lambda c=contender: step(c.loss, x, y), device))  # type: ignore[misc]
    return [(contender, taken, held[contender]) for contender, taken in times.items()]
