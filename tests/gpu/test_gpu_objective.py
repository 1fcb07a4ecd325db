"""Each fast path of the objective on the GPU against the reference in float64 on the CPU: value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.objective import OBJECTIVES, ContrastiveObjective, make_objective

pytestmark = pytest.mark.gpu

PATHS: dict[str, tuple[dict[str, Any], float]] = {  # settings, and how far off in the gradient's norm
    "reference": ({"backend": "reference"}, 2e-5),
    "streamed": ({"backend": "streamed"}, 2e-5),
    "streamed, bfloat16": ({"backend": "streamed", "matmul": "bfloat16"}, 2e-2),
    "triton": ({"backend": "triton"}, 2e-5),
    "triton, bfloat16": ({"backend": "triton", "matmul": "bfloat16"}, 2e-2),
}


def rows(n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pairs that are somewhat alike, in float64."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    y = 0.4 * x + torch.randn(n, dim, generator=generator, dtype=torch.float64)  # nothing saturates
    return F.normalize(x, dim=1), F.normalize(y, dim=1)


def value_and_gradients(
    objective: ContrastiveObjective, x: Tensor, y: Tensor, ids: Tensor | None
) -> tuple[float, list[Tensor]]:
    x, y = (side.clone().requires_grad_() for side in (x, y))
    loss = objective(x, y, ids=ids)
    loss.backward()
    gradients = [x.grad, y.grad, *(p.grad for p in objective.parameters())]
    return loss.item(), [gradient.double().cpu() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("n", "masked"), [(5, True), (300, False), (1537, True)])
def test_against_float64(name: str, path: str, n: int, masked: bool, device: torch.device) -> None:
    settings, tolerance = PATHS[path]
    if settings["backend"] == "triton" and device.type != "cuda":
        pytest.skip("needs CUDA itself")
    x, y = rows(n, 64)
    ids = torch.arange(n) // 2 if masked else None
    try:
        objective = make_objective(name, **settings).to(device)
    except ValueError as error:
        pytest.skip(f"no such path here: {error}")
    low = (x.float().to(device), y.float().to(device))
    exact = value_and_gradients(
        make_objective(name, backend="reference").double(), *(side.double().cpu() for side in low), ids
    )
    found = value_and_gradients(objective, *low, None if ids is None else ids.to(device))
    assert found[0] == pytest.approx(exact[0], rel=tolerance, abs=tolerance)
    for one, other in zip(found[1], exact[1], strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm()) + 1e-7


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_changes_nothing(name: str, device: torch.device) -> None:
    x, y = (side.float().to(device) for side in rows(300, 64))
    objective = make_objective(name).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = objective(x, y)
    torch.testing.assert_close(inside, objective(x, y), rtol=1e-5, atol=1e-6)


def test_memory_grows_with_the_batch_and_not_with_its_square(cuda: torch.device) -> None:
    objective = make_objective("cloob", backend="streamed", check=False).to(cuda)
    held = []
    for n in (4096, 16384):
        x, y = (side.float().to(cuda).requires_grad_() for side in rows(n, 64))
        objective(x, y).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        objective(x, y).backward()
        held.append(torch.cuda.max_memory_allocated() - before)
    assert held[1] < 8 * held[0] and held[1] < 4 * 16384**2  # one N×N matrix in float32
