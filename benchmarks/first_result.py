"""From a fresh process to the first result: ``cloob search`` beside importing torch and open_clip.

    python -m benchmarks.first_result IDX "a red flower" [--repeats 5]

Runs each command in a process of its own, all in turn, ``--repeats`` times after one round that is not counted. CPU
seconds (user and system, of the process and its children) are the figure on a machine that others use; wall seconds are
beside them. Medians. Writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.processes import Cost, measure, medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("query")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "first_result")
    arguments = parser.parse_args()
    search = [sys.executable, "-m", "cloob", "search", arguments.index]
    load = "import sys, cloob; i = cloob.Index.open(sys.argv[1]); cloob.load_model(i.model().spec)"
    commands = {
        "import torch and open_clip": [sys.executable, "-c", "import torch, open_clip"],
        "load the model": [sys.executable, "-c", load, arguments.index],
        "search by words": [*search, arguments.query],
        "search by --like": [*search, "--like", "1"],
        "a mistake": [*search, arguments.query, "--cutoff", "high"],
    }
    times: dict[str, list[Cost]] = {name: [] for name in commands}
    for repeat in range(arguments.repeats + 1):
        for name, words in commands.items():
            cost = measure(words, code=2 if name == "a mistake" else 0)
            if repeat:
                times[name].append(cost)
    rows = medians(times)
    base = rows["import torch and open_clip"]["cpu_seconds"]
    for name, row in rows.items():
        row["times the imports"] = round(row["cpu_seconds"] / base, 2)
        print(f"{name:28} {row['cpu_seconds']:6.2f} s CPU  {row['seconds']:6.2f} s  {row['times the imports']:.2f} ×")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
