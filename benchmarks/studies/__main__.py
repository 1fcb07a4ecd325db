"""Runs of a study, from plans, into its records.

    python -m benchmarks.studies STUDY plan [--stage cells] > plan.jsonl
    python -m benchmarks.studies STUDY run plan.jsonl [--data DIR]
    python -m benchmarks.studies STUDY pack

A plan has a line of JSON for each run: what its record holds as ``config``. ``plan``
prints those of the recorded runs; edit them for other seeds or settings. ``run`` does
what has no record yet, one run after the other, at the lowest priority; every run ends
as one file under ``runs/`` in the study's folder, so it may be stopped at any time.
``pack`` puts these files into ``records.jsonl.gz``. The searches that led to the
recorded settings are in the history (``benchmarks/*/plan.py`` at commit a117483b).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.studies import records

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ("pictograms", "frozen", "factors")


def print_plan(folder: Path, stage: str) -> None:
    for record in records.read(stage, folder).values():
        print(json.dumps(record["config"]))


def run(study: str, folder: Path, plan: Path, data: Path) -> None:
    """Does the runs of a plan that have no record."""
    os.nice(19)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    module: Any = importlib.import_module(f"benchmarks.{study}.run")
    do = module.runner(data, ROOT / "runs" / study)
    done = records.names(folder)
    for line in plan.read_text(encoding="utf-8").splitlines():
        cell = module.cell_of(json.loads(line))
        if (cell.stage, cell.id) in done:
            continue
        print(f"{cell.stage}: {cell.id}", flush=True)
        record = do(cell)
        records.write(cell.stage, record, folder)
        print(f"  {record['cpu_seconds']} CPU s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("plan", help="print the recorded runs as a plan")
    listing.add_argument("--stage", default="cells")
    running = commands.add_parser("run", help="do the runs of a plan")
    running.add_argument("plan", type=Path)
    running.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    commands.add_parser("pack", help="put new records into the packed file")
    options = parser.parse_args()
    folder = ROOT / "benchmarks" / options.study
    if options.command == "plan":
        print_plan(folder, options.stage)
    elif options.command == "run":
        run(options.study, folder, options.plan, options.data)
    else:
        records.pack(folder)


if __name__ == "__main__":
    main()
