"""What ``make bench`` keeps: ``python -m benchmarks.note build/bench`` appends a line
to results.jsonl.

It holds main figures, date, commit and machine. ``python -m benchmarks.figures`` puts
the newest into docs/speed.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

FILE = Path(__file__).with_name("results.jsonl")


def headline(folder: Path) -> dict[str, float]:
    """The figures of the five measurements; those that were left out are missing."""
    found: dict[str, float] = {}

    def rows(name: str) -> list[dict[str, Any]]:
        file = folder / name / "results.json"
        return (
            json.loads(file.read_text(encoding="utf-8"))["rows"]
            if file.is_file()
            else []
        )

    for row in rows("objective"):
        if (row["name"], row["n"]) == ("streamed", 2048):
            found["loss, N = 2,048: seconds"] = row["median_s"]
            found["loss: seconds ÷ plain form"] = row["time_ratio"]
            found["loss: memory ÷ plain form"] = row["memory_ratio"]
    index = json.loads(
        (folder / "search" / "results.json").read_text(encoding="utf-8")
    )["index"]
    for kind in ("web", "camera"):
        found[f"index, {kind}: pictures a second"] = index[kind]["cloob"]["median"]
        found[f"index, {kind}: ÷ open_clip loop"] = index[kind]["cloob over loop"]
    for row in rows("start"):
        if row["name"] in ("cloob --help", "cloob train, a mistake"):
            found[f"{row['name']}: seconds"] = row["seconds"]
    for row in rows("data"):
        if (
            row["name"] == "cloob"
            and row["workers"] == 2
            and row["data"].startswith("WebP")
        ):
            found["data, small WebP: samples a second"] = row["per_second"]
            found["data: samples a second ÷ open_clip_train"] = row["per_second_ratio"]
    for row in rows("train_step"):
        if row["name"] == "cloob":
            found["training: images a second"] = row["images_per_second"]
            found["training: images a second ÷ open_clip_train"] = row[
                "ratio_open_clip_train"
            ]
    return found


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    line = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": machine(),
    }
    line["figures"] = {
        name: float(f"{value:.4g}")
        for name, value in headline(Path(sys.argv[1])).items()
    }
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(json.dumps(line, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
