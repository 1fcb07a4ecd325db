"""``python -m benchmarks.studies {pictograms|frozen|factors} {run|pack|tables} [--data
DIR]``.

``run`` does what has no record yet, in the order of the study's plan, one run after the
other, at the lowest priority. Every run ends as one file under ``runs/`` in the study's
folder, so a study may be stopped and started at any time. ``pack`` puts these files
into ``records.jsonl.gz``. ``tables`` writes the study's page and figures from the
records.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.studies import records

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ("pictograms", "frozen", "factors")


def go(
    study: Path,
    listed: Callable[[], Iterable[Any]],
    do: Callable[[Any], records.Record],
    limit: int | None = None,
) -> None:
    """Does the first listed run without a record until none is left; what is listed may
    depend on the records.
    """
    done = records.names(study)
    while limit != 0 and (
        run := next((run for run in listed() if (run.stage, run.id) not in done), None)
    ):
        print(f"{run.stage}: {run.id}", flush=True)
        record = do(run)
        records.write(run.stage, record, study)
        done.add((run.stage, run.id))
        print(f"  {record['cpu_seconds']} CPU s", flush=True)
        limit = None if limit is None else limit - 1


def yield_to_others() -> None:
    """Lowest priority, and glibc keeps what is freed for the next step: fresh pages
    took a tenth of a step's time.
    """
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(
            -3, 32 << 20
        )  # M_MMAP_THRESHOLD, the highest there is; a token table's gradient is 25 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("command", choices=("run", "pack", "tables"))
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="the benchmark's folder",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of what is computed once; default: runs/STUDY",
    )
    options = parser.parse_args()
    folder = ROOT / "benchmarks" / options.study
    if options.command == "pack":
        records.pack(folder)
    elif options.command == "tables":
        tables = importlib.import_module(f"benchmarks.{options.study}.tables")
        page = folder / "tables.md"
        page.write_text(
            tables.filled(page.read_text(encoding="utf-8")), encoding="utf-8"
        )
        tables.draw(ROOT / "docs" / "images")
    else:
        yield_to_others()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch

        torch.set_num_threads(1)
        run = importlib.import_module(f"benchmarks.{options.study}.run")
        go(
            folder,
            *run.study(options.data, options.cache or ROOT / "runs" / options.study),
        )


if __name__ == "__main__":
    main()
