"""How exact the gradient is: float32 and bfloat16 paths against the formula in float64, embeddings spread or in a cone.

    python benchmarks/precision.py [--small-batches]

Embeddings are ``norm(z_i + w·c + noise)``: z_i is what a pair shares, c what all share. With w the cone narrows, as it
does early in training; retrieval narrows it further, and what tells its averages apart is lost first. Prints a table
and writes ``results/precision/results.json``. ``--small-batches`` (a minute) takes 32 to 255 pairs in narrower cones,
where ``backend="auto"`` changes from one form to the other, and writes ``small_batches.json``. No timing, so any
machine will do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine

from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed

OUT = Path(__file__).parent / "results" / "precision"
N, INV_TAU, BETA = 1024, 30.0, 8.0
SEEDS = 5  # of the small batches
PATHS = {
    "plain float32": (cloob_reference, {}),
    "streamed float32": (cloob_streamed, {}),
    "streamed bfloat16": (cloob_streamed, {"matmul": torch.bfloat16}),
}


def embeddings(dim: int, cone: float, noise: float, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(n, dim) unit rows of both sides, float32."""
    generator = torch.Generator().manual_seed(seed)
    shared, common = torch.randn(n, dim, generator=generator), cone * torch.randn(1, dim, generator=generator)
    x, y = (F.normalize(shared + common + noise * torch.randn(n, dim, generator=generator), dim=1) for _ in range(2))
    return x, y


def gradient(path: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """(2N, dim) float64: the gradient of the CLOOB objective."""
    both = [side.clone().requires_grad_() for side in (x, y)]
    path(*both, INV_TAU, BETA, **options).backward()
    return torch.cat([side.grad for side in both if side.grad is not None]).double()


def rows() -> list[dict[str, Any]]:
    found = []
    for hopfield in (True, False):
        for dim in (128, 512):
            for cone in (0.0, 1.0, 3.0, 6.0):
                for noise in (0.3, 1.0, 3.0):
                    x, y = embeddings(dim, cone, noise)
                    exact = gradient(cloob_reference, x.double(), y.double(), hopfield=hopfield)
                    errors = {
                        name: float(
                            f"{float((gradient(path, x, y, hopfield=hopfield, **o) - exact).norm() / exact.norm()):.1e}"
                        )
                        for name, (path, o) in PATHS.items()
                    }
                    similarity = round(float((x @ x.T).mean()), 3)
                    found.append({"hopfield": hopfield, "dim": dim, "similarity": similarity, "noise": noise, **errors})
    return found


def small_batches() -> list[dict[str, Any]]:
    """One row a cone and a number of pairs: the range over seeds, with retrieval, D = 512."""
    found = []
    for cone in (12.6, 22.0):
        for n in (32, 64, 128, 255):
            errors: dict[str, list[float]] = {}
            for seed in range(SEEDS):
                x, y = embeddings(512, cone, 1 / 3, n, seed)
                exact = gradient(cloob_reference, x.double(), y.double())
                for name, (path, options) in list(PATHS.items())[:2]:
                    error = (gradient(path, x, y, **options) - exact).norm() / exact.norm()
                    errors.setdefault(name, []).append(float(f"{float(error):.1e}"))
            row = {"similarity": round(float((x @ x.T).mean()), 3), "pairs": n}
            found.append(row | {name: [min(each), max(each)] for name, each in errors.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="How exact the gradient is.")
    parser.add_argument("--small-batches", action="store_true", help="32 to 255 pairs in narrow cones")
    OUT.mkdir(parents=True, exist_ok=True)
    if parser.parse_args().small_batches:
        small = small_batches()
        print(f"relative error of the gradient over {SEEDS} seeds; D = 512, inv_tau = {INV_TAU:g}, beta = {BETA:g}")
        print("| " + " | ".join(small[0]) + " |\n|" + " --- |" * len(small[0]))
        for row in small:
            cells = (f"{v[0]:.1e} to {v[1]:.1e}" if isinstance(v, list) else str(v) for v in row.values())
            print("| " + " | ".join(cells) + " |")
        record = {"machine": machine(), "seeds": SEEDS, "rows": small}
        (OUT / "small_batches.json").write_text(json.dumps(record, indent=1) + "\n")
        return
    table = rows()
    print("relative error of the gradient;", f"N = {N}, inv_tau = {INV_TAU:g}, beta = {BETA:g}")
    print("| retrieval | D | mean similarity | noise | " + " | ".join(PATHS) + " |\n|" + " --- |" * (4 + len(PATHS)))
    for row in table:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    (OUT / "results.json").write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
