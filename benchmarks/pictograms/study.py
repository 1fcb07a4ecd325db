"""Runs the study, or a part: ``python -m benchmarks.pictograms STAGE``.

Stages: search, cells, wrong-search, wrong (both with wrong captions), pack, tables, all, status.

Every run ends as one file under ``runs/``, which ``pack`` puts into ``records.jsonl.gz``. What has a record is not run
again, and a run that was stopped goes on where it was. Several of these may work on one list at a time (``--threads 1``
each): a run is claimed by a file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.pictograms import cells as plan
from benchmarks.pictograms import records, wrong
from benchmarks.pictograms.cells import Cell

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "pictograms"
STAGES = ("search", "cells", wrong.SEARCH, wrong.RUNS)


def open_cells(stage: str, options: argparse.Namespace) -> Iterable[Cell]:
    """The runs of a stage in the order in which they are to be done, as the records stand now."""
    scores = records.search_scores()
    if stage == "search":
        listed = list(plan.search_cells(scores))
    elif stage == "cells":
        listed = plan.grid(scores, options.epochs or plan.CELL_EPOCHS)
    elif stage == wrong.SEARCH:
        searched = records.read(wrong.SEARCH)
        listed = [cell for method in wrong.MEMBERS for cell in wrong.search(method, scores, searched)]
    else:
        listed = list(wrong.cells(scores, records.read(wrong.SEARCH)))
    wanted = {"method": options.method, "tower": options.tower, "seed": options.seed}
    return [c for c in listed if all(not v or str(getattr(c, k)) in v.split(",") for k, v in wanted.items())]


@contextlib.contextmanager
def claimed(cell: Cell) -> Iterator[bool]:
    """Whether this process may do the cell; a claim of a process that is gone counts for nothing."""
    path = WORK / "claims" / f"{cell.stage}--{cell.id}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError, ValueError):
        if not Path(f"/proc/{int(path.read_text())}").exists():
            path.unlink()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


class Stage:
    """Does the runs of a stage, one after the other."""

    def __init__(self, stage: str, options: argparse.Namespace, stop: Callable[[], bool]) -> None:
        self.stage, self.options, self.stop = stage, options, stop
        self.data: Any = None

    def go(self) -> None:
        """Until nothing is left; the list is made anew after each run, and what others are at is waited for.

        What comes next may depend on it: a round of the search on the one before, the cells on the whole search.
        """
        failed: set[str] = set()
        scores = records.search_scores()
        chosen = {m: [plan.chosen_setting(m, scores, t)[1] for t in plan.TOWERS] for m in plan.METHODS}
        unchosen = [method for method, bases in chosen.items() if set(bases) != {"finalists"}]
        if self.stage == "cells" and unchosen and not self.options.provisional:
            say(f"cells: the search is not complete for {', '.join(unchosen)}; finish it, or give --provisional")
            return
        if self.stage == wrong.RUNS:
            searched = records.read(wrong.SEARCH)
            if waiting := [method for method in wrong.MEMBERS if wrong.chosen(method, scores, searched) is None]:
                say(f"wrong: {', '.join(waiting)} left out until {wrong.SEARCH} is complete")
        while not self.stop():
            done = records.read(self.stage)
            for cell in open_cells(self.stage, self.options):
                if cell.id in done or cell.id in failed:
                    continue
                with claimed(cell) as mine:
                    if mine and not records.path(self.stage, cell.id).is_file():
                        if not self._run(cell):
                            failed.add(cell.id)
                        break
            else:
                if all(c.id in done or c.id in failed for c in open_cells(self.stage, self.options)):
                    return
                time.sleep(10)

    def _run(self, cell: Cell) -> bool:
        from benchmarks.pictograms import cache
        from benchmarks.pictograms.running import Run

        from cloob.models.towers import create_model

        full = self.stage in ("cells", wrong.RUNS)
        if self.data is None:
            encoder = create_model(cell.tower, seed=0)
            self.data = cache.load(self.options.data, WORK / "cache", encoder, tests=full)
        say(f"{cell.stage}: {cell.id}")
        state = WORK / "state" / f"{cell.stage}--{cell.id}.pt"
        data = self.data
        if self.stage in (wrong.SEARCH, wrong.RUNS):
            data = cache.with_wrong_captions(data, wrong.SHARE, cell.seed)
        run = Run(cell, data, state, self.options.device, full, say)
        try:
            record = run.go(self.stop)
        except RuntimeError as error:
            say(f"failed: {error}")
            return False
        records.write(cell.stage, record)
        if self.stage == "cells":
            for name, found in self.data.test.items():
                records.write_set(name, np.array(found.labels), len(found.classnames))
            folder = WORK / "models" / cell.id
            shutil.rmtree(folder, ignore_errors=True)
            run.save_towers(folder)
        state.unlink(missing_ok=True)
        refresh()
        first = "".join(f" {name} {s['acc1']:.3f}" for name, s in record.get("zeroshot", {}).items())
        say(f"done: mean recall {record['val']['mean_recall']:.4f}, {record['cpu_seconds']:.0f} CPU s{first}")
        return True


def refresh() -> None:
    """Brings the pages up to date with the records, so that they never disagree for long."""
    from benchmarks.pictograms import tables

    try:
        tables.write(records.STUDY, ROOT)
    except (OSError, ValueError) as error:
        say(f"the pages are as they were: {error}")


def yield_to_others() -> None:
    """Lowest priority; Linux may weigh whole sessions against each other first, so that goes down as well.

    Not the session of a terminal, whose shell would stay slow: only one of this process's own (``setsid``).
    """
    os.nice(19)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def keep_memory() -> None:
    """Lets glibc keep what is freed for the next step: fresh pages took a tenth of a step's CPU time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the highest there is; a token table's gradient is 25 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def say(text: str) -> None:
    """A line of the log, with the time."""
    print(f"{time.strftime('%H:%M:%S')} [{os.getpid()}] {text}", flush=True)


def status(options: argparse.Namespace) -> None:
    """Prints what is done and what is open."""
    for stage in STAGES:
        listed = [cell.id for cell in open_cells(stage, options)]
        done = records.read(stage)
        print(f"{stage}: {len(done)} records; {sum(name not in done for name in listed)} of {len(listed)} listed open")
    scores = records.search_scores()
    for method in plan.METHODS:
        for tower in plan.TOWERS:
            setting, basis = plan.chosen_setting(method, scores, tower)
            print(f"{method}, {tower}: {setting.slug} ({basis})")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictograms", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "pack", "tables", "status", "all"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the benchmark's folder")
    parser.add_argument("--method", default="", help="only these, separated by commas")
    parser.add_argument("--tower", default="", help="only these")
    parser.add_argument("--seed", default="", help="only these")
    parser.add_argument("--epochs", type=int, default=0, help="length of the cells, instead of the study's")
    parser.add_argument("--provisional", action="store_true", help="run cells with what is best before the search ends")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    if options.stage == "status":
        status(options)
        return 0
    if options.stage == "pack":
        records.pack(records.STUDY)
        return 0
    if options.stage != "tables":
        yield_to_others()
        keep_memory()
        # Threads that wait must not spin on a machine that is shared; before torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        from benchmarks.pictograms.running import Interrupted

        torch.set_num_threads(options.threads)
        asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: asked.append(n))
        try:
            for stage in STAGES if options.stage == "all" else (options.stage,):
                Stage(stage, options, lambda: bool(asked)).go()
        except Interrupted:
            say("stopped; the run's state is kept")
            return 0
        if asked:
            return 0
    if options.stage in ("tables", "all"):
        refresh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
