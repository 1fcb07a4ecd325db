"""``python -m benchmarks.factors {run|status|pack|tables}``: the study of the world of factors.

Every run ends as one file under ``runs/``, which ``pack`` puts into ``records.jsonl.gz``. What has a record is not run
again, so ``run`` may be stopped and started at any time, by one process at a time. It works at the lowest priority, on
one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from benchmarks.factors import plan, searched
from benchmarks.factors.searched import STUDY
from benchmarks.pictograms import records


def go(results: Path, limit: int | None = None) -> None:
    """Does what is open, in the plan's order, until nothing is left or ``limit`` runs are done."""
    from benchmarks.factors.training import train
    from benchmarks.pictograms.study import say

    scores, superseded = searched.scores(results)
    done = scores.keys() | records.read("cells", results)
    while limit is None or limit > 0:
        run = next((run for run in plan.runs(scores, superseded) if run.id not in done), None)
        if run is None:
            return
        record = train(run)
        records.write(run.stage, record, results)
        done = done | {run.id}
        if run.stage == "search":
            scores[run.id] = record["recall"]
        mean = sum(record.get("zero_shot", [])) / len(record.get("zero_shot", [0]))
        say(f"{run.stage} {run.id}: {record['recall']:.4f} {mean:.4f} ({record['cpu_seconds']} s)")
        limit = None if limit is None else limit - 1


def status(results: Path) -> str:
    """How many of the runs that are known by now are done, world by world."""
    scores, superseded = searched.scores(results)
    cells = records.read("cells", results)
    counts: Counter[tuple[str, str, bool]] = Counter()
    for run in plan.runs(scores, superseded):
        counts[plan.slug(run.world), run.stage, run.id in scores or run.id in cells] += 1
    lines = []
    for world in map(plan.slug, plan.worlds()):
        parts = [
            f"{stage} {counts[world, stage, True]}, open {counts[world, stage, False]}" for stage in ("search", "cells")
        ]
        lines.append(f"{world}: {'; '.join(parts)}")
    stages = [records.read(stage, results) for stage in ("search", "superseded")]
    seconds = sum(record["cpu_seconds"] for of_stage in (*stages, cells) for record in of_stage.values())
    return "\n".join([*lines, f"{seconds / 3600:.2f} CPU-core hours so far"])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.factors", description=__doc__)
    parser.add_argument("command", choices=("run", "status", "pack", "tables"))
    parser.add_argument("--study", type=Path, default=STUDY, help="folder of the records")
    parser.add_argument("--limit", type=int, help="so many runs at most")
    options = parser.parse_args(arguments)
    if options.command == "status":
        print(status(options.study))
    elif options.command == "pack":
        records.pack(options.study)
    elif options.command == "tables":
        from benchmarks.factors import figures, tables

        tables.write(options.study)
        figures.write(options.study)
    else:
        import torch
        from benchmarks.pictograms.study import yield_to_others

        yield_to_others()
        torch.set_num_threads(1)
        go(options.study, options.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
