"""The start of a command beside Python's own and the imports; with an index, the time
to the first result of a search.

    python -m benchmarks.start [INDEX] [--query "a red flower"] [--repeats 5]

Each row is a process of its own, all in turn, ``--repeats`` times after one round that
is not counted. CPU seconds (user and system, of the process and its children) are the
figure on a machine that others use; wall seconds are beside them. Medians. Prints a
Markdown table; without an index it writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.figures import number
from benchmarks.machine import machine

PYTHON, CLOOB = [sys.executable, "-c"], [sys.executable, "-m", "cloob"]
LOAD = (
    "import sys, cloob; i = cloob.Index.open(sys.argv[1]);"
    " cloob.load_model(i.model().spec)"
)
ROWS: dict[str, list[str]] = {
    "python -c pass": [*PYTHON, "pass"],
    "import torch": [*PYTHON, "import torch"],
    "import torch, open_clip": [*PYTHON, "import torch, open_clip"],
    "open_clip by cloob": [
        *PYTHON,
        "from cloob.models.towers import open_clip; open_clip()",
    ],
    "cloob --help": [*CLOOB, "--help"],
    "cloob train --help": [*CLOOB, "train", "--help"],
    "cloob train, a mistake": [*CLOOB, "train", "--no-such-option"],
}


def searches(index: str, query: str) -> dict[str, list[str]]:
    search = [*CLOOB, "search", index]
    return {
        "import torch, open_clip": ROWS["import torch, open_clip"],
        "load the model": [*PYTHON, LOAD, index],
        "search by words": [*search, query],
        "search by --like": [*search, "--like", "1"],
        "search, a mistake": [*search, query, "--cutoff", "high"],
    }


def measure(words: list[str], code: int) -> tuple[float, float]:
    """CPU and wall seconds of a command that must end with this exit code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    wall, after = (
        time.perf_counter() - began,
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    if done.returncode != code:
        raise SystemExit(
            f"{' '.join(words)}: exit code {done.returncode}, {code}"
            f" expected\n{done.stderr[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", nargs="?")
    parser.add_argument("--query", default="a red flower")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "start"
    )
    arguments = parser.parse_args()
    commands = searches(arguments.index, arguments.query) if arguments.index else ROWS
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for repeat in range(arguments.repeats + 1):
        for name, words in commands.items():
            cost = measure(words, 2 if name.endswith("a mistake") else 0)
            if repeat:
                costs[name].append(cost)
    medians = {
        name: [statistics.median(kind) for kind in zip(*some, strict=True)]
        for name, some in costs.items()
    }
    rows = [
        {"name": name, "cpu_seconds": cpu, "seconds": wall}
        for name, (cpu, wall) in medians.items()
    ]
    record = {
        "machine": (
            machine("open_clip_torch", "torchvision", "timm")
            | {"repeats": arguments.repeats}
        ),
        "rows": rows,
    }
    print("| process | CPU s | wall s |\n| --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['name']} | {number(row['cpu_seconds'])} |"
            f" {number(row['seconds'])} |"
        )
    if not arguments.index:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
