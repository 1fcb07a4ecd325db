"""Tables of the objective: time, memory, ranks, gradient caching, exactness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.figures.numbers import beside, megabytes, number
from benchmarks.pictograms.markdown import table

Record = dict[str, Any]
_BANDS = (0.2, 0.6, 0.9, 1.0)
"""Upper ends of the mean similarities that are told together."""


def objective(record: Record) -> str:
    """Time and memory of each contender at each size, beside the plain form's; its rate beside the machine's own."""
    lines = []
    for row in record["rows"]:
        if row["name"] == "GEMM":
            continue
        n, memory, rate = f"{row['n']:,}", row.get("extra_bytes"), row.get("rate_ratio")
        time = beside(number(row["median_s"]), row.get("time_ratio"))
        held = "–" if memory is None else beside(megabytes(memory), row.get("memory_ratio"))
        lines.append([n, row["name"], time, held, "–" if rate is None else f"{rate:.2f}"])
    return table(["N", "what", "s (÷ plain)", "MB (÷ plain)", "rate ÷ GEMM's"], lines)


def ranks(record: Record) -> str:
    """Work and time of a rank, then what it holds and receives; ratios to one rank."""
    alone = {row["name"]: row for row in record["rows"] if row["ranks"] == 1}

    def cell(row: Record, key: str, shown: Callable[[float], str], ratio: bool = True) -> str:
        value = row.get(key)
        if value is None:
            return "–"
        base = alone.get(row["name"], {}).get(key) if ratio else None
        return beside(shown(value), value / base if base else None)

    work, held = [], []
    for row in record["rows"]:
        start = [row["name"], str(row["ranks"])]
        operations = cell(row, "flops", lambda value: number(value / 1e9))
        work.append([*start, operations, cell(row, "cpu_s", number), cell(row, "wall_s", number)])
        received = cell(row, "received_bytes", lambda value: f"{value / 1e6:.1f}", ratio=False)
        held.append([*start, cell(row, "extra_bytes", megabytes), received])
    head = ["what", "ranks"]
    first = table([*head, "Gflop a rank (÷ one)", "CPU s a rank (÷ one)", "wall s (÷ one)"], work)
    return f"{first}\n\n{table([*head, 'MB a rank (÷ one)', 'MB received by a rank'], held)}"


def gradient_cache(record: Record) -> str:
    """A training step by micro-batch size."""
    lines = []
    for row in record["rows"]:
        micro = f"{row['micro_batch_size']:,}" if row["micro_batch_size"] else "the whole batch"
        lines.append([micro, megabytes(row["activations"]), megabytes(row["peak"]), number(row["seconds"])])
    head = ["pairs at a time", "activations, MB", "peak, MB", "s"]
    return f"Model {record['model']}, {record['batch_size']:,} pairs a step.\n\n{table(head, lines)}"


def precision(record: Record) -> str:
    """The worst relative error of the gradient in each band of mean similarity."""
    paths = [key for key in record["rows"][0] if key not in ("hopfield", "dim", "similarity", "noise")]
    lines = []
    for hopfield in (True, False):
        for low, high in zip((-1.0, *_BANDS), _BANDS, strict=False):
            rows = [r for r in record["rows"] if r["hopfield"] == hopfield and low < r["similarity"] <= high]
            if rows:
                lines.append(["with" if hopfield else "without", f"to {high:g}", *_worst(rows, paths)])
    return table(["retrieval", "similarity", *paths], lines)


def _worst(rows: Sequence[Record], paths: Sequence[str]) -> list[str]:
    return [f"{max(row[path] for row in rows):.1e}" for path in paths]
