"""Tables of whole programs: data, training step, evaluation, retrieval, start of the commands."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.numbers import beside, megabytes, number
from benchmarks.pictograms.markdown import table

Record = dict[str, Any]


def data(record: Record) -> str:
    """Samples a second of each contender, a table for each form of data."""
    parts = []
    for form in dict.fromkeys(row["data"] for row in record["rows"]):
        lines = []
        for row in record["rows"]:
            if row["data"] == form:
                both = (beside(number(row[key]), row.get(f"{key}_ratio")) for key in ("per_second", "per_cpu_second"))
                lines.append([str(row["workers"]), row["name"], *both])
        parts.append(f"{form}:\n\n{table(['workers', 'what', 'samples/s (ratio)', 'samples/CPU s (ratio)'], lines)}")
    return "\n\n".join([*parts, *_tokens(record.get("tokens", {}))])


def _tokens(tokens: Record) -> list[str]:
    """A caption's tokens, the first time and when the caption comes again."""
    names = [key.removesuffix("_first_us") for key in tokens if key.endswith("_first_us")]
    lines = [[name, *(number(tokens[f"{name}_{when}_us"]) for when in ("first", "again"))] for name in names]
    return [f"A caption's tokens:\n\n{table(['what', 'first, µs', 'again, µs'], lines)}"] if lines else []


def train_step(record: Record) -> str:
    """Images a second of whole trainings, with the ratios of the same rounds."""
    peers = list(dict.fromkeys(key for row in record["rows"] for key in row if key.startswith("ratio_")))
    lines = [
        [row["name"], number(row["images_per_second"]), *(f"{row[p]:.2f}" if p in row else "–" for p in peers)]
        for row in record["rows"]
    ]
    return table(["what", "images/s", *(f"÷ {p.removeprefix('ratio_')}" for p in peers)], lines)


def text_padding(record: Record) -> str:
    """A step with all tokens and with those before the padding."""
    lines = [
        [
            row["tower"],
            " → ".join(map(str, row["tokens"])),
            number(row["seconds_padded"]),
            number(row["seconds_trimmed"]),
            f"{row['ratio']:.2f}",
        ]
        for row in record["rows"]
    ]
    return table(["towers", "tokens", "padded, s", "trimmed, s", "padded ÷ trimmed"], lines)


def evaluate(record: Record) -> str:
    """Seconds of ours and of CLIP_benchmark's, by case and by what is timed."""
    lines = []
    for row in record["rows"]:
        for part in ("command", "evaluation", "again"):
            if part in row:
                both = [
                    number(row[part][n]["median_s"]) if n in row[part] else "–" for n in ("cloob", "clip_benchmark")
                ]
                ratio = row[part].get("ratio")
                lines.append([row["case"], part, *both, "–" if ratio is None else f"{ratio:.2f}"])
    return table(["case", "what", "cloob, s", "CLIP_benchmark, s", "theirs ÷ ours"], lines)


def retrieval(record: Record) -> str:
    """Time and memory of the ranks, with and without the matrix of all scores; the load where a row has it."""
    lines = []
    for row in record["rows"]:
        sizes = (megabytes(row[key]) for key in ("peak_bytes", "bytes_of_all_scores"))
        load = f" (load {row['load']:.1f})" if "load" in row else ""
        lines.append([f"{row['n']:,}", row["name"], f"{number(row['seconds'])}{load}", *sizes])
    return table(["N", "what", "s", "peak, MB", "all scores, MB"], lines)


def start(record: Record) -> str:
    """CPU and wall seconds of a process, from its start to its end."""
    lines = [[row["name"], number(row["cpu_seconds"]), number(row["seconds"])] for row in record["rows"]]
    return table(["what", "CPU s", "s"], lines)
