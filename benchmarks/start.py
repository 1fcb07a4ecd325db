"""The start of each command: ``--help`` and a mistake in its words, beside Python's own start and the imports.

    python -m benchmarks.start [--repeats 5]

Rows: ``python -c pass``, importing torch, importing torch and open_clip, open_clip as cloob imports it,
``cloob --version``, and for each command ``--help`` and an option that there is none of (exit code 2, one line). Each
is a process of its own, all in turn, ``--repeats`` times after one round that is not counted (which is counted where
``--repeats`` is 0). CPU seconds (user and system, of the process and its children) are the figure on a machine that
others use; wall seconds are beside them. Medians. Prints a Markdown table and writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from benchmarks.processes import Cost, measure, medians

from cloob.cli import COMMANDS


def commands() -> dict[str, tuple[list[str], int]]:
    """The words and the exit code of each row."""
    cloob = [sys.executable, "-m", "cloob"]
    rows = {
        "python -c pass": ([sys.executable, "-c", "pass"], 0),
        "import torch": ([sys.executable, "-c", "import torch"], 0),
        "import torch, open_clip": ([sys.executable, "-c", "import torch, open_clip"], 0),
        "open_clip by cloob": ([sys.executable, "-c", "from cloob.models.towers import open_clip; open_clip()"], 0),
        "cloob --version": ([*cloob, "--version"], 0),
        "cloob --help": ([*cloob, "--help"], 0),
    }
    for name in COMMANDS:
        rows[f"cloob {name} --help"] = ([*cloob, name, "--help"], 0)
        rows[f"cloob {name}, a mistake"] = ([*cloob, name, "--no-such-option"], 2)
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| process | CPU, s | wall, s |", "|---|---:|---:|"]
    return "\n".join(
        [*lines, *(f"| {name} | {r['cpu_seconds']:.2f} | {r['seconds']:.2f} |" for name, r in rows.items())]
    )


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start")
    arguments = parser.parse_args()
    costs: dict[str, list[Cost]] = {}
    for repeat in range(arguments.repeats + 1):
        for name, (words, code) in commands().items():
            cost = measure(words, code, lines=1 if code else None)
            if repeat or not arguments.repeats:
                costs.setdefault(name, []).append(cost)
    rows = medians(costs)
    about = machine("open_clip_torch", "torchvision", "timm") | {"repeats": arguments.repeats}
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": [{"name": name, **row} for name, row in rows.items()]}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
