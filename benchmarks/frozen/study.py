"""The study on frozen encoders: ``python -m benchmarks.frozen {features|run|status|pack|tables} [--cache FOLDER]``.

``features`` fills the cache, ``run`` does what has no record yet, one run after the other and in the order of
``cells.runs``; both go on where they were stopped. Every run ends as one file under ``runs/``; ``pack`` puts them into
``records.jsonl.gz``. ``tables`` puts what the records give into the page.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.frozen import cells as plan
from benchmarks.frozen import worlds
from benchmarks.pictograms import records
from benchmarks.pictograms.selection import zeroshot_mean
from benchmarks.pictograms.study import ROOT, keep_memory, say, yield_to_others

STUDY = Path(__file__).parent


def scores(results: Path = STUDY) -> dict[str, float]:
    """What the search knows."""
    return {name: record["score"] for name, record in records.read("search", results).items()}


def run(options: argparse.Namespace) -> None:
    """Until nothing is left, or until a signal asks to stop: then the present run ends first."""
    from benchmarks.frozen import features
    from benchmarks.frozen.running import run as run_cell

    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: asked.append(n))
    data = features.load(options.cache, maps=False)
    for name, labelled in data.sets.items():
        records.write_set(name, labelled.labels, len(labelled.prompts), STUDY)
    known, done = scores(), set(records.read("cells", STUDY))
    while not asked and (cell := plan.next_cell(known, done, options.world)) is not None:
        say(f"{cell.stage}: {cell.id}")
        record = run_cell(cell, features.load(options.cache, maps=cell.world.head == worlds.FINE_TUNE))
        records.write(cell.stage, record, STUDY)
        if cell.stage == "search":
            known[cell.id] = record["score"]
        else:
            done.add(cell.id)
        shown = f" zero-shot {zeroshot_mean(record):.4f}" if "zeroshot" in record else ""
        say(f"held-out {record['score']:.4f} in epoch {record['best_epoch']}{shown}, {record['cpu_seconds']:.0f} CPU s")


def status() -> None:
    """Prints what is done and what is open."""
    known, done = scores(), records.read("cells", STUDY)
    spent = sum(r["cpu_seconds"] for r in [*records.read("search", STUDY).values(), *done.values()])
    for world in worlds.WORLDS:
        runs, seeds = plan.runs_a_method(world), len(worlds.seeds(world))
        for method in worlds.methods(world):
            n = sum(cell.id in known for _, cell in plan.search(method, world, known))
            cells = sum(cell.id in done for cell in plan.cells_of(method, world, known))
            print(f"{world.slug:24} {method:18} search {n:2} of {runs}, cells {cells} of {seeds}")
    whole = sum(len(worlds.methods(w)) * (plan.runs_a_method(w) + len(worlds.seeds(w))) for w in worlds.WORLDS)
    print(f"{len(known) + len(done)} records, {whole} without other weight decays; {spent / 3600:.2f} CPU hours")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen", description=__doc__)
    parser.add_argument("stage", choices=("features", "run", "status", "pack", "tables"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the benchmark's folder")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "frozen", help="folder of the features")
    parser.add_argument("--world", default="", help="run only worlds whose name begins so, as status prints it")
    options = parser.parse_args(arguments)
    if not any(world.slug.startswith(options.world) for world in worlds.WORLDS):
        parser.error(f"no world's name begins with {options.world!r}")
    if options.stage == "status":
        status()
        return 0
    if options.stage == "pack":
        records.pack(STUDY)
        return 0
    if options.stage == "tables":
        from benchmarks.frozen import figures, tables

        tables.write(STUDY, ROOT)
        figures.write(STUDY, ROOT)
        return 0
    yield_to_others()
    keep_memory()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from benchmarks.frozen import features

    torch.set_num_threads(1)
    if options.stage == "features":
        features.build(options.data, options.cache, say)
    else:
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
