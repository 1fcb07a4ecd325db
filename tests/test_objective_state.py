"""τ⁻¹ and β: in the state, told when another state says otherwise, read without a device, never in low precision."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cloob.objective import ContrastiveObjective, make_objective
from cloob.scales import FixedScaleWarning
from paper_loops import pairs


def test_another_fixed_value_is_taken_and_told() -> None:
    objective, saved = ContrastiveObjective(inv_tau=30.0), ContrastiveObjective(inv_tau=50.0, beta=8.0)
    with pytest.warns(FixedScaleWarning, match="inv_tau was 30 and is 50 now, as in the state that was loaded") as told:
        assert objective.load_state_dict(saved.state_dict()).missing_keys == []
    assert told[0].filename == __file__
    x, y = pairs(6, 5)
    assert objective(x, y) == saved(x, y) != ContrastiveObjective(inv_tau=30.0)(x, y)
    assert objective.config() == saved.config() and objective.inv_tau.item() == 50.0
    objective.load_state_dict(saved.state_dict())  # the same values: nothing to tell


def test_another_beta_inside_a_larger_module() -> None:
    outer, saved = (nn.ModuleDict({"loss": ContrastiveObjective(beta=beta)}) for beta in (8.0, 14.0))
    with pytest.warns(FixedScaleWarning, match="beta was 8 and is 14"):
        outer.load_state_dict(saved.state_dict())
    assert outer["loss"].beta.item() == 14.0


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan, math.inf])
def test_a_state_with_a_scale_that_is_none_is_refused(value: float) -> None:
    state = ContrastiveObjective().state_dict()
    state["fixed_beta"] = torch.tensor(value)
    with pytest.raises(RuntimeError, match=r"fixed_beta is .*; a positive, finite number"):
        ContrastiveObjective().load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda o: pickle.loads(pickle.dumps(o)),
        lambda o: o.half(),
        lambda o: o.to("cpu", torch.bfloat16),
        lambda o: o.double().float(),
        lambda o: o.to("meta").to_empty(device="cpu"),
    ],
    ids=["deepcopy", "pickle", "half", "to", "float", "to_empty"],
)
def test_number_and_buffer_stay_together(change: Callable[[Any], Any]) -> None:
    objective = ContrastiveObjective(inv_tau=30.0)
    saved = ContrastiveObjective(inv_tau=1 / 0.07).state_dict()
    with pytest.warns(FixedScaleWarning):
        objective.load_state_dict(saved)
    objective = change(objective)
    assert objective.config()["inv_tau"] == 1 / 0.07
    torch.testing.assert_close(objective.state_dict(), saved, rtol=0, atol=0)


def test_fixed_scales_are_read_without_their_device() -> None:
    objective = ContrastiveObjective().to("meta")  # from which nothing can be read
    assert objective.fixed_inv_tau.is_meta and objective.inv_tau.item() == 30.0
    assert objective.config() == ContrastiveObjective().config()
    x, y = pairs(6, 5)
    assert objective(x, y) == ContrastiveObjective()(x, y)
    assert "infoloob" in repr(ContrastiveObjective(learnable_inv_tau=True).to("meta"))


def test_a_device_without_float64_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = ContrastiveObjective(inv_tau=1 / 0.07)
    asked: list[tuple[torch.dtype, str]] = []
    full = torch.full

    def on_mps(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def move(tensor: Any) -> Any:
            if tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return fn(tensor)

        return move

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["dtype"], kwargs["device"].type))
        return full(*args, **{**kwargs, "device": "cpu"})

    monkeypatch.setattr(torch, "full", spy)
    moved._apply(on_mps(lambda t: t.to("meta")))  # a stand-in refuses what Metal refuses
    assert asked == [(torch.float64, "meta")] * 2 and moved.config()["inv_tau"] == 1 / 0.07


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_learned_scales_are_cast_to_no_lower_precision(name: str, cast: str) -> None:
    objective = make_objective(name, learnable_beta=name == "siglip", hopfield=name == "siglip")
    objective.head = nn.Linear(2, 2)  # of a subclass: cast as usual
    x, y = pairs(6, 5, dtype=torch.float32)
    objective(x, y).backward()
    before = {name: p for name, p in objective.named_parameters() if p.ndim == 0}
    values = {name: (p.clone(), p.grad.clone()) for name, p in before.items()}
    getattr(objective, cast)()
    assert objective.head.weight.dtype == getattr(torch, cast)
    for name, parameter in before.items():
        assert objective.get_parameter(name) is parameter  # which an optimiser holds
        assert parameter.dtype == (torch.float64 if cast == "double" else torch.float32)
        torch.testing.assert_close((parameter, parameter.grad), values[name], rtol=0, atol=0, check_dtype=False)
    assert {p.dtype for p in objective.float().parameters()} == {torch.float32}


def test_learned_scales_are_float32_where_less_is_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        objective = make_objective("siglip", inv_tau=14.25)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert objective.inv_tau.item() == pytest.approx(14.25, rel=1e-6)


def test_a_state_does_not_say_what_the_loss_does_not_do() -> None:
    objective = ContrastiveObjective()
    objective.fixed_beta.fill_(2.0)
    with pytest.raises(ValueError, match=r"^fixed_beta was set to 2, but beta is still 8: load_state_dict changes it"):
        objective.state_dict()
