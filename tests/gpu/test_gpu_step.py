"""The training step on the GPU: nobody waits for it, precisions, faults, copies, and profiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from cloob.data.batch import Batch
from cloob.data.copies import Copies
from cloob.distributed import Layout
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.train.config.run import OptimConfig
from cloob.train.optim import make_optimizer
from cloob.train.step import Launched, Stepper, StepResult, TowersWithLoss
from cloob.train.towers.average import WeightAverage

pytestmark = pytest.mark.gpu
PAIRS = 12


def stepper(
    device: torch.device, model: str = "tiny-vit", objective: str = "cloob", precision: str = "fp32", micro: int = 0
) -> Stepper:
    encoder = create_model(model, seed=0).train().to(device)
    loss = make_objective(objective).to(device)
    optimizer = make_optimizer(encoder, loss, OptimConfig(lr=1e-3), device)
    return Stepper(TowersWithLoss(encoder, loss, precision).train(), optimizer, 1.0, micro, late=True)


def batch(pairs: int = PAIRS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pairs, 3, 64, 64), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, 400, (pairs, 24), generator=generator)
    tokens[:, -1] = 49407
    return Batch(images, tokens, torch.arange(pairs) // 2, tuple(map(str, range(pairs))))


def launch(take: Stepper, moved: Batch) -> Launched:
    return take.launch(moved.images, moved.tokens, moved.ids, 1e-3, layout=Layout((len(moved),)))


def result(launched: Launched) -> StepResult:
    return launched.result(launched.numbers.tolist())


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("objective", ["cloob", "clip", "siglip-hopfield"])
@pytest.mark.parametrize("model", ["tiny-resnet", "tiny-vit"])
def test_nobody_waits_for_the_device(
    model: str, objective: str, precision: str, micro: int, cuda: torch.device
) -> None:
    take, copies, pinned = stepper(cuda, model, objective, precision, micro), Copies(cuda), batch().pin_memory()
    average = WeightAverage(take.module.encoder, 0.9)  # type: ignore[arg-type]
    for _ in range(2):  # the first calls compile kernels and make streams, which waits
        average.update(take.module.encoder, launch(take, copies(pinned)).finite)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    with nobody_waits():
        for _ in range(3):
            launched = launch(take, copies(pinned))
            average.update(take.module.encoder, launched.finite)  # type: ignore[arg-type]
    assert math.isfinite(result(launched).loss)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 2e-2)])
def test_the_steps_are_those_of_the_cpu(precision: str, tolerance: float, device: torch.device) -> None:
    here, there = stepper(torch.device("cpu")), stepper(device, precision=precision)
    for _ in range(3):
        one, other = result(launch(here, batch())), result(launch(there, batch().to(device)))
        assert other.loss == pytest.approx(one.loss, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_leaves_no_trace(precision: str, device: torch.device) -> None:
    take = stepper(device, "tiny-resnet", precision=precision)
    for _ in range(6):  # fp16 finds its scale
        launch(take, batch().to(device))
    before = copy.deepcopy(take.module.state_dict())
    images = batch().images.float().to(device)
    images[0] = math.nan
    launched = take.launch(images, batch().tokens.to(device), None, 1e-3, layout=Layout((PAIRS,)))
    assert not result(launched).finite
    for name, value in take.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_recomputation_of_memory_layouts_is_the_same_step(device: torch.device) -> None:
    losses = []
    for last in (True, False):
        take = stepper(device, "tiny-resnet")
        take.module.encoder.set_channels_last(last)  # type: ignore[operator]
        losses.append([result(launch(take, batch().to(device))).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_copies_are_the_batch(device: torch.device) -> None:
    copies, host = Copies(device), batch()
    host = host.pin_memory() if device.type == "cuda" else host
    for _ in range(20):
        moved = copies(host)
        for one, other in ((moved.images, host.images), (moved.tokens, host.tokens), (moved.ids, host.ids)):
            assert one.device == device and torch.equal(one.cpu(), other)
