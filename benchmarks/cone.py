"""What a narrow cone does to CLOOB: towers on the raw features of 6,000 molecules and
their names.

    python benchmarks/cone.py [--out FILE]

Recall@10 among 1,000 other pairs, the mean of both directions, after 8 epochs of AdamW
(1e-3, batches of 256, cosine schedule), τ⁻¹ 30 and β 8; three seeds. Beside it the mean
cosine of each side at the start, and whether the objective warned. `cloob train vectors
--objective cloob` is the recipe as it is. Data as in `auto.py`: Morgan's fingerprints,
and MiniLM's features of the names; needs `chemicals`, `rdkit` and the extra `align`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import auto
import numpy as np
import torch
from machine import machine
from torch import Tensor, nn
from torch.nn import functional as F

import cloob
from cloob.functional.ranking import ranks

N, EPOCHS, BATCH = 6000, 8, 256
OUT = Path(__file__).parent / "results" / "cone" / "results.json"


def relu(rows: Tensor) -> nn.Module:
    hidden = [
        nn.Linear(rows.shape[1], 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 128),
        nn.ReLU(),
    ]
    return nn.Sequential(*hidden)


def gelu(rows: Tensor) -> nn.Module:
    return nn.Sequential(nn.Linear(rows.shape[1], 512), nn.GELU(), nn.Linear(512, 128))


def head(rows: Tensor) -> nn.Module:
    made = cloob.Head(rows.shape[1], 128, "mlp")
    made.fit(rows)
    return made


def recall(x: Tensor, y: Tensor) -> float:
    right = torch.arange(len(x))
    both = (ranks(one, other, right) for one, other in ((x, y), (y, x)))
    return round(
        100
        * float(torch.stack([(found < 10).double().mean() for found in both]).mean()),
        1,
    )


def trained(
    make: Any, objective: cloob.ContrastiveObjective, a: Tensor, b: Tensor, seed: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    of_a, of_b = make(a[:N]), make(b[:N])

    def embed(rows: Any) -> tuple[Tensor, Tensor]:
        return F.normalize(of_a(a[rows]), dim=1), F.normalize(of_b(b[rows]), dim=1)

    optimizer = torch.optim.AdamW(
        [*of_a.parameters(), *of_b.parameters()], lr=1e-3, weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, EPOCHS * (N // BATCH)
    )
    with torch.no_grad():
        cosines = [
            round(float(side.mean(0).square().sum()), 2) for side in embed(slice(BATCH))
        ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(EPOCHS):
            for rows in torch.randperm(N)[: N // BATCH * BATCH].split(BATCH):
                loss = objective(*embed(rows))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        of_a.eval(), of_b.eval()
        return {
            "recall": recall(*embed(slice(N, None))),
            "cosines": cosines,
            "warned": bool(said),
        }


def recipe(a: Tensor, b: Tensor, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cloob-") as place:
        for name, side in (("a", a), ("b", b)):
            np.save(f"{place}/{name}.npy", side[:N])
        config = cloob.get_recipe("vectors").override(
            a=f"{place}/a.npy", b=f"{place}/b.npy", objective="cloob", seed=seed
        )
        config = config.override(device="cpu", out=f"{place}/run")
        run = cloob.train_heads(config).run
        heads = cloob.load_model(run)
        return {"recall": recall(heads.encode_a(a[N:]), heads.encode_b(b[N:]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    auto.N_TRAIN, auto.N_TEST = N, 1000
    a, b = (torch.from_numpy(side).float() for side in auto.molecules(Path()))
    objectives = {"cloob": ("cloob", {"beta": 8.0}), "infoloob": ("infoloob", {})}
    runs: list[dict[str, Any]] = []
    for seed in (0, 1, 2):
        for towers, make in (
            ("ReLU", relu),
            ("Linear-GELU-Linear", gelu),
            ("cloob.Head, fitted", head),
        ):
            for name, (kind, more) in objectives.items():
                found = trained(
                    make, cloob.make_objective(kind, inv_tau=30.0, **more), a, b, seed
                )
                runs.append(
                    {"towers": towers, "objective": name, "seed": seed, **found}
                )
                print(runs[-1], flush=True)
        runs.append(
            {
                "towers": "train vectors",
                "objective": "cloob",
                "seed": seed,
                **recipe(a, b, seed),
            }
        )
        print(runs[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine("numpy"), "pairs": N, "runs": runs}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
