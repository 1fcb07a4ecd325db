"""One run: two small encoders, one of the library's objectives, and the best of ten
looks at the held-out pairs.

The measures behind the other claims of ``tables.md`` (probes, what retrieval averages,
what is known by heart) are in the history (``measures.py`` at commit a117483b).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.factors.cells import Run
from benchmarks.factors.model import Encoders, objective_of
from benchmarks.factors.world import FACTORS, Pairs, Sample, draw
from torch import Tensor

from cloob.functional import ranking

LOOKS = 10
RECALLS = (1, 10, 100)
_APART = 1_000_000
"""Added to the seed of the encoders and of the order, so that these are drawn apart
from the world.
"""

cell_of = Run.from_config


def runner(*_: Path) -> Callable[[Run], dict[str, Any]]:
    """How a run is done; the world is drawn, so no data is needed."""
    return train


def train(run: Run) -> dict[str, Any]:
    """Does a run and returns its record; held-out recall chooses the look."""
    started = time.process_time()
    world = run.world
    sample = draw(world, run.seed)
    seed = run.seed + _APART
    torch.manual_seed(seed)
    encoders = Encoders()
    objective = objective_of(run.method, run.setting)
    optimizer = torch.optim.AdamW(
        [*encoders.parameters(), *objective.parameters()],
        lr=0.0,
        weight_decay=run.setting.weight_decay,
        fused=True,
    )
    total = round(world.seen * run.setting.length / world.batch)
    looks = {round(total * (k + 1) / LOOKS) for k in range(LOOKS)}
    batches = endless_batches(len(sample.train), world.batch, seed)
    curve: list[dict[str, Any]] = []
    best: dict[str, Any] = {"held_out_recall": -1.0}
    for step in range(total):
        indices = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, run.setting.lr)
        pictures = encoders.pictures(sample.train.pictures[indices])
        captions = encoders.captions(sample.train.captions[indices])
        objective.progress = step / total
        loss = objective(pictures, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in looks:
            line = {"step": step + 1, "loss": loss.item(), **look(encoders, sample)}
            curve.append(line)
            if line["held_out_recall"] > best["held_out_recall"]:
                best = line
                best_encoders = copy.deepcopy(encoders)
                inv_tau = float(objective.inv_tau.detach())
    with torch.no_grad():
        by_factor = zero_shot(best_encoders, sample)
        seen = sample.train.first(len(sample.held_out))
        train_recall = mean_recall(best_encoders, seen)
    record = {
        "id": run.id,
        "config": run.config(),
        "recall": round(best["held_out_recall"], 5),
        "best_step": best["step"],
        "steps": total,
        "zero_shot": [round(share, 5) for share in by_factor],
        "train_recall": round(train_recall, 5),
        "inv_tau": inv_tau,
        "curve": curve,
    }
    return record | {"cpu_seconds": round(time.process_time() - started, 1)}


def rate(step: int, total: int, peak: float) -> float:
    warm_up = (step + 1) / (total / 10)
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    return peak * min(warm_up, cosine)


def endless_batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices below n; an epoch's rest goes into the next batch."""
    order = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(n, generator=order)])
        yield waiting[:size]
        waiting = waiting[size:]


@torch.no_grad()
def look(encoders: Encoders, sample: Sample) -> dict[str, float]:
    """The recall on held-out pairs, and the zero-shot accuracy, which chooses
    nothing.
    """
    by_factor = zero_shot(encoders, sample)
    return {
        "held_out_recall": mean_recall(encoders, sample.held_out),
        "zero_shot": sum(by_factor) / len(by_factor),
    }


def mean_recall(encoders: Encoders, pairs: Pairs) -> float:
    """Mean of recall@1, @10 and @100 both ways, the pairs taken as given."""
    pictures = encoders.pictures(pairs.pictures)
    captions = encoders.captions(pairs.captions)
    ids = torch.arange(len(pairs))[:, None].expand(-1, 2).contiguous()
    ranks = ranking.mutual_ranks(pictures, captions, ids)
    found = [ranking.topk_accuracy(way, k) for way in ranks for k in RECALLS]
    return sum(found) / len(found)


def zero_shot(encoders: Encoders, sample: Sample) -> list[float]:
    """By factor, how often the caption that names the picture's own value alone is the
    nearest of V.
    """
    pictures, values = sample.test
    embedded = encoders.pictures(pictures)
    prompts = encoders.captions(sample.prompts)
    return [
        ranking.topk_accuracy(ranking.ranks(embedded, prompts[f], values[:, f]), 1)
        for f in range(FACTORS)
    ]
