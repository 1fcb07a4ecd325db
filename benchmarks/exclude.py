"""Does `exclude_above` help?

Linear heads on the frozen study's features, with 0, 20 and 40 % of the captions
swapped.

For each share, objective and margin two seeds; held-out pairs that are as wrong choose
the epoch. Judged by recall among the validation pairs with their own captions, and by
the mean zero-shot accuracy of the study's sets.

    python -m benchmarks.exclude --cache FOLDER   # of python -m benchmarks.frozen, with
    its features
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from benchmarks.frozen.data import Data, load
from benchmarks.frozen.heads import EMBED_DIM, Heads, View, embedded
from benchmarks.frozen.plan import World
from benchmarks.machine import processor
from benchmarks.pictograms.run import recalls, score_set
from torch.nn import functional as F

from cloob.data.order import EpochOrder, ShardSizes
from cloob.objective import make_objective
from cloob.training.config.parts import OptimConfig
from cloob.training.optim import make_optimizer, make_schedule

PAIRS, EPOCHS, BATCH, SEEDS = 6_000, 12, 256, (0, 1)
JUDGED_EVERY = 2  # epochs
SHARES, OBJECTIVES, MARGINS = (0.0, 0.2, 0.4), ("infoloob", "cloob"), (None, 0.2, 0.0)
RECORD = Path(__file__).with_name("results") / "exclude" / "results.json"


def run(
    data: Data, share: float, name: str, margin: float | None, seed: int
) -> dict[str, float]:
    """The scores of one training, in %."""
    view = View(data, World("linear", "swap", share, PAIRS), seed)
    images, texts, val = data.pairs["train"].images, data.table, data.pairs["val"]
    heads = Heads((images.shape[1], texts.shape[1]), "linear", seed, EMBED_DIM)
    heads.visual.fit(images[view.pictures])
    heads.text.fit(texts[view.rows])
    objective = make_objective(name, inv_tau=15.0, beta=8.0, exclude_above=margin)
    config = OptimConfig(lr=1e-3)
    optimizer, steps = (
        make_optimizer(heads, objective, config, torch.device("cpu")),
        PAIRS // BATCH,
    )
    schedule = make_schedule(config, EPOCHS * steps)
    torch.manual_seed(seed)
    best: tuple[float, dict[str, torch.Tensor]] = (-math.inf, {})
    for epoch in range(EPOCHS):
        order = EpochOrder([ShardSizes((PAIRS,))], seed).epoch(epoch)(np.arange(PAIRS))
        heads.train()
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            objective(
                *heads(images[view.pictures[rows]], texts[view.rows[rows]])
            ).backward()
            for group in optimizer.param_groups:
                group["lr"] = schedule(epoch * steps + step) * group["lr_scale"]
            optimizer.step()
        if (epoch + 1) % JUDGED_EVERY:
            continue
        heads.eval()
        val_images = embedded(heads.visual, val.images)
        held_out = embedded(heads.text, texts[view.held_out])
        recall = recalls(val_images, held_out, [data.texts[i] for i in view.held_out])[
            "mean_recall"
        ]
        if recall > best[0]:
            best = recall, copy.deepcopy(heads.state_dict())
    heads.load_state_dict(best[1])
    return {"held_out": round(100 * best[0], 2), **tested(heads.eval(), data)}


def tested(heads: Heads, data: Data) -> dict[str, float]:
    val, texts = data.pairs["val"], data.table
    both = embedded(heads.visual, val.images), embedded(heads.text, texts[val.own])
    right = recalls(*both, [data.texts[i] for i in val.own])["mean_recall"]
    accuracies = []
    for labelled in data.sets.values():
        n_classes, templates = labelled.prompts.shape
        prompts = embedded(heads.text, texts[labelled.prompts.reshape(-1)])
        classes = F.normalize(prompts.view(n_classes, templates, -1).mean(1), dim=1)
        accuracies.append(
            score_set(
                embedded(heads.visual, labelled.images), labelled.labels, classes
            )["acc1"]
        )
    return {"recall": round(100 * right, 2), "acc1": round(100 * mean(accuracies), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    data = load(parser.parse_args().cache)
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for name in OBJECTIVES:
            for margin in MARGINS:
                found = [run(data, share, name, margin, seed) for seed in SEEDS]
                rows.append(
                    {
                        "wrong": share,
                        "objective": name,
                        "exclude_above": margin,
                        "seeds": found,
                    }
                )
                means = {
                    key: (
                        np.mean([f[key] for f in found]),
                        np.std([f[key] for f in found]),
                    )
                    for key in found[0]
                }
                shown = "  ".join(
                    f"{key} {m:5.1f} ± {s:.1f}" for key, (m, s) in means.items()
                )
                print(
                    f"{share:.0%} wrong  {name:<9} {margin!s:>5}  {shown}", flush=True
                )
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "head": "linear",
        "pairs": PAIRS,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "inv_tau": 15.0,
        "beta": 8.0,
        "lr": 1e-3,
    }
    machine = {"processor": processor(), "torch": torch.__version__}
    RECORD.write_text(
        json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
