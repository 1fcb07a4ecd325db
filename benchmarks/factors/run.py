"""One run: two small encoders, one of the library's objectives, and the best of ten
looks at the held-out pairs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.factors import measures, plan
from benchmarks.factors.model import Encoders, objective_of
from benchmarks.factors.plan import Run
from benchmarks.factors.world import Sample, draw

LOOKS = 10
_APART = 1_000_000
"""Added to the seed of a cell's encoders and order, so that these are drawn apart from
its world.
"""


def rate(step: int, total: int, peak: float) -> float:
    return peak * min(
        (step + 1) / (total / 10), 0.5 * (1 + math.cos(math.pi * step / total))
    )


def train(run: Run) -> dict[str, Any]:
    """Does a run and returns its record.

    Only a cell is asked about zero-shot; a search's run knows recall alone.
    """
    started = time.process_time()
    world, setting = run.world, run.setting
    sample = draw(world, run.seed)
    # In the search both come from one stream, as they did in all runs at first: see the
    # page.
    seed = run.seed if run.stage == "search" else run.seed + _APART
    torch.manual_seed(seed)
    encoders, objective = Encoders(), objective_of(run.method, setting)
    parameters = [*encoders.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, weight_decay=setting.weight_decay, fused=True
    )
    order = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    total = round(world.seen * setting.length / world.batch)
    looks = {round(total * (k + 1) / LOOKS) for k in range(LOOKS)}
    best, curve = (-1.0, 0, encoders, objective), []
    for step in range(total):
        while len(waiting) < world.batch:
            waiting = torch.cat(
                [waiting, torch.randperm(len(sample.train), generator=order)]
            )
        indices, waiting = waiting[: world.batch], waiting[world.batch :]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, setting.lr)
        x, y = (
            encoders.pictures(sample.train.pictures[indices]),
            encoders.captions(sample.train.captions[indices]),
        )
        loss = objective(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in looks:
            line = look(encoders, sample, run.stage == "cells")
            curve.append({"step": step + 1, "loss": loss.item(), **line})
            if line["held_out_recall"] > best[0]:
                best = (
                    line["held_out_recall"],
                    step + 1,
                    copy.deepcopy(encoders),
                    copy.deepcopy(objective),
                )
    record = {
        "id": run.id,
        "config": run.config(),
        "recall": best[0],
        "best_step": best[1],
        "steps": total,
    }
    if run.stage == "cells":
        with torch.no_grad():
            record |= measures.all_of_it(sample, best[2], best[3], world.batch)
        record |= {"inv_tau": float(best[3].inv_tau.detach()), "curve": curve}
    return rounded(record) | {"cpu_seconds": round(time.process_time() - started, 1)}


@torch.no_grad()
def look(encoders: Encoders, sample: Sample, full: bool) -> dict[str, Any]:
    """The recall on held-out pairs; of a cell the zero-shot accuracy as well, which
    chooses nothing.
    """
    pairs = sample.held_out
    recall = measures.mean_recall(
        encoders.pictures(pairs.pictures), encoders.captions(pairs.captions)
    )
    line = {"held_out_recall": recall}
    if full:
        pictures, values = sample.test
        by_factor = measures.zero_shot(
            encoders.pictures(pictures), values, encoders.captions(sample.prompts)
        )
        line["zero_shot"] = sum(by_factor) / len(by_factor)
    return line


def rounded(value: Any) -> Any:
    """The same with five digits behind the point; the configuration, which names the
    run, stays as it is.
    """
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {
            key: each if key == "config" else rounded(each)
            for key, each in value.items()
        }
    return value


def study(
    *_: Path,
) -> tuple[Callable[[], Iterable[Run]], Callable[[Run], dict[str, Any]]]:
    """What is to be done by now, and how a run is done; the world is drawn, so no data
    is needed.
    """

    def listed() -> Iterator[Run]:
        scores, superseded = plan.scores(plan.STUDY)
        # What an earlier form of the search has run has its record under "superseded".
        return (
            run
            for run in plan.runs(scores, superseded)
            if run.stage != "search" or run.id not in scores
        )

    return listed, train
