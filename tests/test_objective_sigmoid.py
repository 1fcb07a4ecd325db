"""The objective with SigLIP's loss: its scales and bias, its state, its call by open_clip, and what it goes through."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from cloob.interop.negatives import contrast_with_negatives
from cloob.objective import ContrastiveObjective, make_objective
from paper_loops import objective_loop, pairs, relative_error, value_and_gradients

each_member = pytest.mark.parametrize("hopfield", [False, True], ids=["siglip", "siglip-hopfield"])
each_path = pytest.mark.parametrize("backend", ["reference", "streamed"])


@each_member
def test_siglip_as_published(hopfield: bool) -> None:
    objective = make_objective("siglip-hopfield" if hopfield else "siglip")
    assert objective.name == ("siglip-hopfield" if hopfield else "siglip")
    assert objective.scale == "unit" and objective.hopfield == hopfield
    start = {name: p.item() for name, p in objective.named_parameters()}
    assert start == {"log_inv_tau": pytest.approx(math.log(10)), "bias": -10.0}


@each_member
@pytest.mark.parametrize("backend", ["auto", "reference", "streamed"])
def test_equals_the_loop(hopfield: bool, backend: str) -> None:
    x, y = pairs(6, 5)
    ids = [4, 4, 1, 2, 3, 1]
    options = {"contrast": "sigmoid", "hopfield": hopfield, "scale": "unit", "bias": -2.0}
    expected = objective_loop(x.tolist(), y.tolist(), 20.0, 4.0, ids=ids, **options)
    objective = ContrastiveObjective(inv_tau=20.0, beta=4.0, backend=backend, **options)
    assert objective(x, y, ids=torch.tensor(ids)).item() == pytest.approx(expected, rel=1e-10)


@each_path
@each_member
def test_scale_and_bias_learn(hopfield: bool, backend: str) -> None:
    x, y = pairs(8, 5)
    objective = ContrastiveObjective.siglip(hopfield=hopfield, backend=backend, bias=-3.0).double()
    objective(x, y).backward()

    def value(log_inv_tau: float, bias: float) -> float:
        options: dict[str, Any] = {"contrast": "sigmoid", "hopfield": hopfield, "scale": "unit", "bias": bias}
        return objective_loop(x.tolist(), y.tolist(), math.exp(log_inv_tau), 8.0, **options)

    t, h = objective.log_inv_tau.item(), 1e-5
    slopes = ((value(t + h, -3) - value(t - h, -3)) / (2 * h), (value(t, -3 + h) - value(t, -3 - h)) / (2 * h))
    assert objective.log_inv_tau.grad.item() == pytest.approx(slopes[0], rel=1e-6)
    assert objective.bias.grad.item() == pytest.approx(slopes[1], rel=1e-6)


def test_the_call_that_open_clip_makes() -> None:
    open_clip_loss = pytest.importorskip("open_clip.loss")
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (12.0, -4.0)]
    objective = ContrastiveObjective.siglip()
    ours = value_and_gradients(
        lambda *given: objective(*given, output_dict=True)["contrastive_loss"], *pairs(7, 5), *scalars
    )
    theirs = value_and_gradients(open_clip_loss.SigLipLoss(), *pairs(7, 5), *scalars)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    x, y = pairs(7, 5)
    assert objective(x, y, 12.0, torch.tensor([-4.0])) == objective(x, y, 12.0, -4.0) != objective(x, y, 12.0)


def test_state_and_config_hold_the_bias() -> None:
    objective = ContrastiveObjective.siglip(inv_tau=200.0)  # no bound, as in SigLIP
    with torch.no_grad():
        objective.bias -= 2.5
    objective.train().clamp_()
    config = json.loads(json.dumps(objective.config()))
    assert config["bias"] == -12.5 and config["inv_tau"] == pytest.approx(200.0, rel=1e-5)
    again = ContrastiveObjective(**config)
    torch.testing.assert_close(again.state_dict(), objective.state_dict(), rtol=1e-6, atol=0)
    fresh = ContrastiveObjective.siglip()
    fresh.load_state_dict(objective.state_dict())
    assert fresh.config() == objective.config()
    assert "bias" not in ContrastiveObjective().config() and ContrastiveObjective().bias is None
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        fresh.load_state_dict(ContrastiveObjective.clip().state_dict(), strict=True)


def test_a_bias_that_is_no_number_is_refused() -> None:
    objective = ContrastiveObjective.siglip()
    with torch.no_grad():
        objective.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="bias is nan; a finite number is expected"):
        objective(*pairs(4, 3))


@each_member
def test_compile_export_and_func(hopfield: bool) -> None:
    torch.compiler.reset()
    objective = ContrastiveObjective.siglip(hopfield=hopfield, backend="reference")
    x, y = pairs(6, 5, dtype=torch.float32)
    expected = value_and_gradients(objective, x, y)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradients(compiled, x, y), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.export.export(objective, (x, y)).module()(x, y), expected[0])
    torch.testing.assert_close(torch.func.grad(objective)(x, y), expected[1])
    torch.compiler.reset()


def test_bfloat16_products_are_near() -> None:
    x, y = pairs(200, 128, dtype=torch.float32)
    exact = value_and_gradients(ContrastiveObjective.siglip(backend="reference"), x, y)
    low = value_and_gradients(ContrastiveObjective.siglip(matmul="bfloat16"), x, y)
    assert 0 < max(map(relative_error, low, exact)) < 1e-2


def test_candidates_beyond_the_pairs_are_refused() -> None:
    x, y = pairs(4, 3)
    with pytest.raises(ValueError, match="contrast is 'sigmoid'; 'infoloob' or 'infonce' is expected"):
        contrast_with_negatives(make_objective("siglip"), x, y, x)


def test_open_clips_trainer_has_its_own() -> None:
    interop = pytest.importorskip("cloob.interop.open_clip")
    with pytest.raises(ValueError, match="open_clip's own SigLipLoss"):
        interop.OpenClipLoss(make_objective("siglip"))
