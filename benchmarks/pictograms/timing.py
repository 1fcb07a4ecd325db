"""What a step of each method costs, all methods of a tower side by side, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import processor
from benchmarks.pictograms.cache import Data
from benchmarks.pictograms.cells import CELL_EPOCHS, METHODS, SEARCH_SEED, TOWERS, Cell, Scores, chosen_setting
from benchmarks.pictograms.running import Run

ROUNDS = 6


def time_steps(data: Data, scores: Scores, report: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a training step with the chosen settings.

    In each round each method makes a step of the first half of its run and one of the second, where retrieval may have
    joined; the first round does not count.

    Returns:
        ``seconds``: tower -> method -> medians over the rounds of a step of the first and of the second half, CPU
        seconds of one core with one thread; ``settings`` likewise, as slugs; ``machine``.
    """
    torch.set_num_threads(1)  # two wait for each other, and process_time counts the waiting
    seconds: dict[str, dict[str, list[float]]] = {}
    settings: dict[str, dict[str, str]] = {}
    for tower in TOWERS:
        runs = {}
        for method in METHODS:
            setting = chosen_setting(method, scores, tower)[0]
            cell = Cell("cells", method, tower, SEARCH_SEED, CELL_EPOCHS, setting)
            runs[method] = Run(cell, data, Path("never-written"), full=False)
        times: dict[str, list[tuple[float, ...]]] = {method: [] for method in METHODS}
        for round_ in range(ROUNDS + 1):
            for method, run in runs.items():
                spent = tuple(_step(run, place, round_) for place in (0, run.total // 2))
                if round_:
                    times[method].append(spent)
        seconds[tower] = {
            method: [round(statistics.median(half), 4) for half in zip(*found, strict=True)]
            for method, found in times.items()
        }
        settings[tower] = {method: run.cell.setting.slug for method, run in runs.items()}
        report(f"{tower}: " + ", ".join(f"{method} {value} s" for method, value in seconds[tower].items()))
    machine = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"machine": machine, "seconds": seconds, "settings": settings}


def _step(run: Run, place: int, round_: int) -> float:
    size = run.cell.setting.batch_size
    run.step = place
    start = time.process_time()
    run.train_on(round_, np.arange(size) + round_ * size)
    return time.process_time() - start
