"""fp16 with its loss scale, and what it does together with micro-batches and with faults."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_helpers import exact, lines

from cloob.objective import make_objective
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.state.resume import read_checkpoint
from cloob.train.step import Stepper, TowersWithLoss


class Towers(nn.Module):
    """Linear towers; pixels and tokens are plain numbers. ``gain`` multiplies the image tower's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)
        self.gain = 1.0
        self.dtypes: set[torch.dtype] = set()

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.image(images), self.text(tokens)
        self.dtypes |= {x.dtype, y.dtype}
        if x.requires_grad and self.gain != 1.0:
            x.register_hook(lambda gradient: gradient * self.gain)
        return F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)


def stepper(precision: str = "fp16", clip: float = 0.0, micro: int = 0, objective: str = "cloob") -> Stepper:
    torch.manual_seed(0)
    module = TowersWithLoss(Towers(), make_objective(objective), precision).train()
    return Stepper(module, torch.optim.AdamW(module.parameters(), lr=9.0), clip, micro)


def weights(take: Stepper) -> list[Tensor]:
    return [p.detach().clone() for p in take.module.parameters()]


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("clip", [0.0, 1e-2])
def test_fp16_takes_the_step_of_fp32_to_its_rounding(clip: float, micro: int) -> None:
    exact, low = stepper("fp32", clip), stepper("fp16", clip, micro)
    for take in (exact, low):  # SGD shows a wrong scale, which Adam would hide
        take.optimizer = torch.optim.SGD(take.module.parameters(), lr=1.0)
    low.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # so few pairs have gradients that overflow at 2¹⁶
    for _ in range(3):
        one, other = exact(*batch(), None, 0.1), low(*batch(), None, 0.1)
        assert other.finite and other.loss_scale == 256.0 and one.loss_scale == 1.0
        assert other.loss == pytest.approx(one.loss, rel=5e-3)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=5e-3)
    assert low.module.encoder.dtypes == {torch.float16}  # type: ignore[comparison-overlap]
    for p, q in zip(weights(exact), weights(low), strict=True):
        torch.testing.assert_close(q, p, rtol=5e-3, atol=2e-4)


@pytest.mark.parametrize("micro", [0, 4])
def test_overflow_lowers_the_scale_and_is_no_fault(micro: int) -> None:
    take = stepper(micro=micro)
    while not take(*batch(), None, 1e-2).finite:  # finds a scale
        pass
    start = take.scaler.get_scale()
    before, moments = weights(take), copy.deepcopy(take.optimizer.state_dict())
    take.module.encoder.gain = 64.0  # type: ignore[assignment]
    scales = []
    for _ in range(40):
        result = take(*batch(), None, 1e-2)
        scales.append(result.loss_scale)
        if result.finite:
            break
        assert result.overflow and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        assert all(torch.equal(p, q) for p, q in zip(weights(take), before, strict=True))
        now = take.optimizer.state_dict()
        assert float(now["state"][0]["step"]) == float(moments["state"][0]["step"])
    assert result.finite and not result.overflow
    assert len(scales) > 2 and scales == [start / 2**i for i in range(len(scales))]
    assert not any(torch.equal(p, q) for p, q in zip(weights(take), before, strict=True))


def test_what_stays_infinite_at_scale_one_is_a_fault() -> None:
    take = stepper()
    take.module.encoder.gain = math.inf  # type: ignore[assignment]
    results = [take(*batch(), None, 1e-2) for _ in range(18)]
    assert not any(result.finite for result in results)
    assert [result.overflow for result in results] == [True] * 16 + [False] * 2


def test_nan_in_the_loss_is_a_fault_and_leaves_the_scale() -> None:
    take = stepper()
    images, tokens = batch()
    images[2, 1] = math.nan
    before = weights(take)
    result = take(images, tokens, None, 1e-2)
    assert not result.finite and not result.overflow and math.isnan(result.loss)
    assert take.scaler.get_scale() == 2.0**16
    assert all(torch.equal(p, q) for p, q in zip(weights(take), before, strict=True))
    assert any(take(*batch(), None, 1e-2).finite for _ in range(8))


def test_in_fp32_an_infinite_gradient_is_a_fault() -> None:
    take = stepper("fp32")
    take.module.encoder.gain = math.inf  # type: ignore[assignment]
    result = take(*batch(), None, 1e-2)
    assert not result.finite and not result.overflow


def test_the_scale_is_saved_and_restored() -> None:
    take = stepper()
    take.module.encoder.gain = 64.0  # type: ignore[assignment]
    while not take(*batch(), None, 1e-2).finite:
        pass
    saved = copy.deepcopy(take.state_dict())
    fresh = stepper()
    fresh.load_state_dict(saved)
    assert fresh.scaler.get_scale() == take.scaler.get_scale() < 2.0**16
    assert fresh.state_dict() == saved and saved["scaler"]["_growth_tracker"] == 1
    fresh.load_state_dict({})  # a checkpoint from before there was a scale
    fresh.load_state_dict(stepper("fp32").state_dict())  # or of a run in fp32
    assert fresh.state_dict() == saved
    plain = stepper("bf16")
    plain.load_state_dict(saved)
    assert plain(*batch(), None, 1e-2).loss_scale == 1.0


def test_a_run_in_fp16_goes_on_with_its_scale(base: TrainConfig, tmp_path: Path) -> None:
    """Overflows at the start are neither reported as faults nor counted as such; the scale survives a resumption."""
    config = base.override(precision="fp16", model="nano-resnet", epochs=2, save_every=0, keep=0, max_nonfinite=1)
    train(config.override(out=tmp_path / "whole"))
    whole = lines(tmp_path / "whole" / "metrics.jsonl")
    overflowed = [line for line in whole if line.get("skipped") == "overflow"]
    assert overflowed and all(line["loss"] is not None and line["grad_norm"] is None for line in overflowed)
    scale = 2.0**16
    for line in whole:
        assert line["loss_scale"] == scale
        scale /= 2 if line in overflowed else 1
    assert not list((tmp_path / "whole").glob("nonfinite-step-*"))
    first = sorted((tmp_path / "whole" / "checkpoints").iterdir())[0]
    scaler = read_checkpoint(first).state["stepper"]["scaler"]
    assert scaler["scale"] == whole[5]["loss_scale"] < 2.0**16
    train(config.override(out=tmp_path / "resumed", resume=str(first)))
    assert exact(tmp_path / "resumed") == exact(tmp_path / "whole")[5:]
    assert [line["loss_scale"] for line in lines(tmp_path / "resumed" / "metrics.jsonl")] == [
        line["loss_scale"] for line in whole[5:]
    ]
