"""How exact the gradient is: float32 and bfloat16 paths against the formula in float64, embeddings spread or in a cone.

    python benchmarks/precision.py

Embeddings are ``norm(z_i + w·c + noise)``: z_i is what a pair shares, c what all share. With w the cone narrows, as it
does early in training; retrieval narrows it further, and what tells its averages apart is lost first. Prints a table
and writes ``results/precision/results.json``. No timing, so any machine will do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed

OUT = Path(__file__).parent / "results" / "precision"
N, INV_TAU, BETA = 1024, 30.0, 8.0
PATHS = {
    "plain float32": (cloob_reference, {}),
    "streamed float32": (cloob_streamed, {}),
    "streamed bfloat16": (cloob_streamed, {"matmul": torch.bfloat16}),
}


def embeddings(dim: int, cone: float, noise: float) -> tuple[Tensor, Tensor]:
    """(N, dim) unit rows of both sides, float32."""
    generator = torch.Generator().manual_seed(0)
    shared, common = torch.randn(N, dim, generator=generator), cone * torch.randn(1, dim, generator=generator)
    x, y = (F.normalize(shared + common + noise * torch.randn(N, dim, generator=generator), dim=1) for _ in range(2))
    return x, y


def gradient(path: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """(2N, dim) float64: the gradient of the CLOOB objective."""
    both = [side.clone().requires_grad_() for side in (x, y)]
    path(*both, INV_TAU, BETA, **options).backward()
    return torch.cat([side.grad for side in both if side.grad is not None]).double()


def rows() -> list[dict[str, Any]]:
    """One row a kind of embeddings and a member of the family."""
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


def main() -> None:
    """The command."""
    table = rows()
    print("relative error of the gradient;", f"N = {N}, inv_tau = {INV_TAU:g}, beta = {BETA:g}")
    print("| retrieval | D | mean similarity | noise | " + " | ".join(PATHS) + " |\n|" + " --- |" * (4 + len(PATHS)))
    for row in table:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "results.json").write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
