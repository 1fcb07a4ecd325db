"""A record as tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def lay_out(title: str, columns: Columns, rows: Sequence[Row]) -> str:
    """Lines of a table; nothing but its title without rows."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    widths = [max([len(head), *(len(line[i]) for line in cells)]) for i, head in enumerate(columns)]
    lines = [[*columns], *cells]
    return "\n".join([title, *("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)])


def tables(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """All that was measured, and what was left out."""
    rows = {name: [row for row in part["rows"] if "skipped" not in row] for name, part in parts.items()}
    told = [_environment(rows.get("environment", []))]
    told.append(_tests(rows.get("tests", [])))
    objective = [row for row in rows.get("objective", []) if "n" in row]
    told += [_objective(objective, kind) for kind in ("cloob", "clip", "siglip")]
    told.append(_steps(rows.get("steps", [])))
    told.append(_evaluation(rows.get("evaluation", [])))
    told.append(
        lay_out(
            "parts",
            {
                "part": lambda row: row["part"],
                "seconds": lambda row: f"{row['seconds']:.0f} of {row['budget']:.0f}",
                "ended": lambda row: row["ended"],
            },
            [{"part": name, **part} for name, part in parts.items()],
        )
    )
    left_out = [
        f"  {name}: {row['skipped']}: {row['why']}"
        for name, p in parts.items()
        for row in p["rows"]
        if "skipped" in row
    ]
    return "\n\n".join([*told, "\n".join(["left out", *(left_out or ["  nothing"])])]) + "\n"


def _environment(rows: Sequence[Row]) -> str:
    return ", ".join(f"{key} {value}" for row in rows for key, value in row.items() if value is not None)


def _tests(rows: Sequence[Row]) -> str:
    counts = {what: sum(row["outcome"] == what for row in rows) for what in ("passed", "failed", "skipped")}
    title = "tests: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    columns: Columns = {
        "test": lambda row: row["test"],
        "outcome": lambda row: row["outcome"],
        "why": lambda row: row.get("why", "")[:90],
    }
    return lay_out(title, columns, [row for row in rows if row["outcome"] != "passed"])


def _objective(rows: Sequence[Row], kind: str) -> str:
    some = sorted((row for row in rows if row["kind"] == kind), key=lambda row: (row["dim"], row["n"], row["median_s"]))
    columns: Columns = {
        "D": lambda row: f"{row['dim']:,}",
        "N": lambda row: f"{row['n']:,}",
        "what": lambda row: row["what"],
        "products": lambda row: row["arithmetic"],
        "ms": lambda row: f"{1000 * row['median_s']:.2f}",
        "extra MB": lambda row: _megabytes(row),
    }
    if kind == "cloob":
        columns = {
            **columns,
            "floor ms": lambda row: f"{1000 * row['floor_s']:.2f}",
            "time / floor": lambda row: f"{row['median_s'] / row['floor_s']:.2f}",
        }
    return lay_out(f"objective, forward and backward: {kind}", columns, some)


def _steps(rows: Sequence[Row]) -> str:
    columns: Columns = {
        "model": lambda row: row["model"],
        "what": lambda row: row["what"],
        "pairs": lambda row: f"{row['pairs']:,}",
        "pairs/s": lambda row: f"{row['pairs_per_second']:.0f}",
        "/ open_clip_train": lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "extra MB": lambda row: _megabytes(row),
    }
    return lay_out("training step", columns, rows)


def _evaluation(rows: Sequence[Row]) -> str:
    columns: Columns = {
        "what": lambda row: row["what"],
        "model": lambda row: row.get("model", f"{row.get('pictures', 0):,} × {row.get('captions', 0):,}"),
        "products": lambda row: row.get("arithmetic", "float32"),
        "a second": lambda row: f"{row['per_second']:.0f}" if "per_second" in row else "",
        "s": lambda row: f"{row['median_s']:.3f}" if "median_s" in row else "",
        "extra MB": lambda row: _megabytes(row),
    }
    return lay_out("evaluation", columns, rows)


def _megabytes(row: Row) -> str:
    return "" if row.get("extra_bytes") is None else f"{row['extra_bytes'] / 1e6:.1f}"
