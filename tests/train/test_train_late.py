"""Steps that nobody waits for: the same run, line by line, and a step in which nothing is read from the device."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reads import reads
from test_train_step import Towers, batch
from torch import Tensor
from torch.nn import functional as F
from train_helpers import Recorder, lines

from cloob import machine
from cloob.errors import TrainingFailed
from cloob.models.load import load_model
from cloob.models.runs import latest_checkpoint, list_checkpoints
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective, make_objective
from cloob.objective.waiting import acceptable, without_waiting
from cloob.train import parts
from cloob.train.callbacks import Callback, RunInfo
from cloob.train.config import TrainConfig
from cloob.train.loop import train
from cloob.train.step import Stepper, TowersWithLoss
from cloob.train.towers import build
from cloob.train.towers.average import WeightAverage
from support import fork


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes steps as a device does that works by itself."""
    monkeypatch.setattr(parts, "works_by_itself", lambda device: True)


def stepper(
    objective: ContrastiveObjective, *, late: bool, clip: float = 0.0, micro: int = 0, precision: str = "fp32"
) -> Stepper:
    torch.manual_seed(0)
    module = TowersWithLoss(Towers(), objective, precision).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)
    take = Stepper(module, optimizer, clip, micro, late=late)
    # So few pairs have gradients that overflow at torch's own 2¹⁶.
    take.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    return take


def state(take: Stepper) -> dict[str, Tensor]:
    flat = dict(take.module.state_dict())
    for index, moments in take.optimizer.state_dict()["state"].items():
        flat |= {f"{index}.{name}": value for name, value in moments.items()}
    return {name: value.clone() for name, value in flat.items()}


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("where", ["nan", "inf", "zero", "gradient"])
def test_a_late_step_that_is_not_finite_leaves_no_trace(where: str, micro: int) -> None:
    take = stepper(make_objective("cloob"), late=True, clip=1.0, micro=micro)
    take.launch(*batch(), None, 1e-2)
    before = state(take)
    images, tokens = batch()
    hooks = []
    if where == "gradient":
        hooks = [take.module.encoder.text.weight.register_hook(lambda gradient: gradient * math.inf)]  # type: ignore
    elif where == "zero":
        hooks = [
            take.module.encoder.text.register_forward_hook(lambda *a: a[2] * (torch.arange(len(a[2])) > 0)[:, None])
        ]  # type: ignore
    else:
        images[2, 1] = float(where)
    launched = take.launch(images, tokens, None, 1e-2)
    for hook in hooks:
        hook.remove()
    result = launched.result(launched.numbers.tolist())
    assert not result.finite and math.isfinite(result.loss) == (where == "gradient")
    after = state(take)
    for key, value in before.items():  # running means and the optimiser's count of steps among them
        assert torch.equal(after[key], value), key
    launched = take.launch(*batch(), None, 1e-2)
    assert launched.result(launched.numbers.tolist()).finite
    assert not torch.equal(take.module.encoder.text.weight, before["encoder.text.weight"])  # type: ignore


@pytest.mark.parametrize("pairs", [6, 300])  # the plain path and the streamed one
@pytest.mark.parametrize(("micro", "precision"), [(0, "fp32"), (3, "fp32"), (0, "fp16")])
def test_nothing_is_read_in_a_late_step(pairs: int, micro: int, precision: str) -> None:
    goes_on, waits = (
        stepper(make_objective("cloob"), late=late, clip=1.0, micro=100 * micro, precision=precision)
        for late in (True, False)
    )
    images, tokens, ids = torch.randn(pairs, 5), torch.randn(pairs, 3), torch.arange(pairs) // 2
    with reads() as read:
        launched = goes_on.launch(images, tokens, ids, 1e-2)
    assert not read
    with reads() as read:
        waits(images, tokens, ids, 1e-2)
    assert dict(read) == {"tolist": 1}  # what is counted is there to be counted
    assert launched.result(launched.numbers.tolist()).finite


@pytest.mark.parametrize("pairs", [6, 300])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learnable_beta": True},
        {"contrast": "infonce"},
        {"hopfield": False},
        {"learnable_inv_tau": True},
        {"contrast": "sigmoid"},
    ],
)
def test_the_objective_waits_for_no_device_inside(
    pairs: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ``meta`` there are no values: whatever looked at one would fail."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # it does not know of meta
    objective = ContrastiveObjective(**options).to("meta")
    x, y = (torch.empty(pairs, 8, device="meta", requires_grad=True) for _ in range(2))
    ids = torch.empty(pairs, dtype=torch.int64, device="meta")
    with reads() as read, without_waiting(objective):
        objective(x, y, ids=ids).backward()
        acceptable(x, y)
    assert not read and x.grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        objective(x, y, ids=ids)
    assert objective.check and not objective.trusts_lengths


@pytest.mark.parametrize("beta", [8.0, 50.0, 70.0])
@pytest.mark.parametrize("learnable", [False, True])
def test_trusted_lengths_change_nothing(beta: float, learnable: bool) -> None:
    objective = ContrastiveObjective(beta=beta, learnable_beta=learnable, backend="streamed")
    rows = [F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1)]
    gradients = []
    for context in (False, True):
        x, y = (side.clone().requires_grad_() for side in rows)
        if context:
            with without_waiting(objective):
                loss = objective(x, y)
        else:
            loss = objective(x, y)
        loss.backward()
        gradients.append((loss.detach(), x.grad, y.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_loss_scale_moves_as_if_it_had_been_waited_for(where: str) -> None:
    """A gradient that overflows lowers it, a loss that is not finite says nothing of it."""
    waits, goes_on = (stepper(make_objective("cloob"), late=late, precision="fp16") for late in (False, True))
    for step in range(4):
        images, tokens = batch()
        if where == "loss" and step in (1, 2):
            images[0, 0] = math.nan
        hooks = [
            one.module.encoder.text.weight.register_hook(lambda g: g * math.inf)  # type: ignore
            for one in (waits, goes_on)
            if where == "gradient" and step in (1, 2)
        ]
        expected = waits(images, tokens, None, 1e-2)
        launched = goes_on.launch(images, tokens, None, 1e-2)
        for hook in hooks:
            hook.remove()
        found = launched.result(launched.numbers.tolist())
        assert (found.finite, found.overflow, found.loss_scale) == (
            expected.finite,
            expected.overflow,
            expected.loss_scale,
        )
        assert found.overflow == (where == "gradient" and step in (1, 2))
    assert goes_on.state_dict() == waits.state_dict()
    assert goes_on.state_dict()["scaler"]["scale"] == 2.0 ** (6 if where == "gradient" else 8)


class Spoils(Callback):
    """Makes the gradients of some steps infinite; counts by backward passes, so that it does not matter who waits."""

    def __init__(self, *steps: int, parameter: str = "positional_embedding") -> None:
        self.steps = steps
        self.parameter = parameter
        self.passes = 0

    def on_start(self, info: RunInfo) -> None:
        def hook(gradient: Tensor) -> Tensor:
            self.passes += 1
            return gradient * math.inf if self.passes in self.steps else gradient

        getattr(info.encoder.model, self.parameter).register_hook(hook)


def everything(run: Path) -> list[dict[str, Any]]:
    times = ("images_per_second", "data_wait", "device_wait")
    return [{key: value for key, value in line.items() if key not in times} for line in lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("objective", ["cloob", "clip", "siglip"])
def test_a_late_run_is_the_run(
    objective: str, base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, faults and checkpoints; log lines are due each 4 steps, epochs have 5."""
    settings = base.override(objective=objective, epochs=2, save_every=3, keep=0, clip_grad_norm=1.0)
    recorders = {name: Recorder() for name in ("waits", "late")}
    for name, recorder in recorders.items():
        if name == "late":
            monkeypatch.setattr(parts, "works_by_itself", lambda device: True)
        train(settings.override(out=tmp_path / name), callbacks=[recorder, Spoils(2, 6, 7)])
    one, other = tmp_path / "waits", tmp_path / "late"
    assert everything(one) == everything(other)
    assert [line["step"] for line in lines(other / "metrics.jsonl") if "skipped" in line] == [2, 6, 7]
    assert all("device_wait" in line and 0 <= line["device_wait"] <= 1 for line in lines(other / "metrics.jsonl"))
    assert "effective_eigenvalues_text" in lines(other / "metrics.jsonl")[3]
    for file in ("nonfinite-step-2.json", "nonfinite-step-6.json"):
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())
    steps = [[line["step"] for line in recorder.of("step")] for recorder in recorders.values()]
    assert steps[0] == steps[1] == list(range(1, 11))
    for here, there in zip(list_checkpoints(one), list_checkpoints(other), strict=True):
        assert here.name == there.name
        weights = [torch.load(path / "trainer.pt", weights_only=True)["optimizer"] for path in (here, there)]
        for index, moments in weights[0]["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, weights[1]["state"][index][key])


def test_a_late_run_names_the_step_at_which_it_failed(base: TrainConfig, tmp_path: Path, late: None) -> None:
    settings = base.override(out=tmp_path / "run", save_every=0, max_nonfinite=2, epochs=2)
    with pytest.raises(TrainingFailed, match="step 3: loss or gradient not finite for 2 steps in a row"):
        train(settings, callbacks=[Spoils(2, 3)])
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_lines_of_steps_before_a_fault_are_not_lost(base: TrainConfig, tmp_path: Path, late: None) -> None:
    class Breaks(Callback):
        def on_checkpoint(self, path: Path) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(base.override(out=tmp_path / "run", save_every=3), callbacks=[Breaks()])
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_late_run_waits_once_in_each_window(base: TrainConfig, tmp_path: Path, late: None) -> None:
    """Steps 5, 6 and 7 stand between the lines of 4 and 8: nothing at all is read while they are taken."""
    settings = base.override(out=tmp_path / "run", save_every=0, model="nano-vit", epochs=1, steps=None, batch_size=4)
    seen: dict[int, Counter[str]] = {}
    launch = Stepper.launch

    def counting(self: Stepper, *args: Any, **kwargs: Any) -> Any:
        with reads() as read:
            out = launch(self, *args, **kwargs)
        seen[len(seen)] = read
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "launch", counting)
        train(settings)
    assert len(seen) == 10 and not any(seen.values())


def test_an_average_moves_with_the_steps_that_leave_a_trace(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = base.override(ema=0.9, epochs=2, save_every=0, keep=0, model="nano-resnet")
    averages: list[dict[str, Tensor]] = []
    for name in ("waits", "late"):
        monkeypatch.setattr(parts, "works_by_itself", lambda device, late=name == "late": late)
        train(settings.override(out=tmp_path / name), callbacks=[Spoils(1, 4, parameter="text_projection")])
        found = load_model(tmp_path / name)
        averages.append(found.state_dict())
        state = torch.load(latest_checkpoint(tmp_path / name) / "trainer.pt", weights_only=True)
        assert state["average"] == {"updates": 8}
    assert everything(tmp_path / "waits") == everything(tmp_path / "late")
    assert all(torch.equal(value, averages[1][key]) for key, value in averages[0].items())


def test_an_average_is_not_waited_for(nano_configs: Path) -> None:
    encoder = create_model("nano-resnet", seed=0)
    average = WeightAverage(encoder, 0.9)
    with reads() as read:
        average.update(encoder, torch.tensor(True))
        average.update(encoder, torch.tensor(False))
    assert not read and average.updates == 1


@pytest.mark.parametrize(
    "leaves",
    [
        {"objective": "clip", "precision": "fp16", "mask_duplicates": True},
        pytest.param({"fsdp": True, "model": "nano-vit"}, marks=pytest.mark.nightly),
        pytest.param({"micro_batch_size": 2, "ema": 0.9, "model": "nano-vit"}, marks=pytest.mark.nightly),
    ],
    ids=lambda leaves: ", ".join(leaves),
)
def test_late_ranks_are_the_ranks(leaves: dict[str, Any], base: TrainConfig, tmp_path: Path) -> None:
    """Two processes, of which one has two samples that cannot be used; and nothing is read in their steps."""
    settings = base.override(epochs=2, save_every=3, keep=0, clip_grad_norm=1.0, log_every=4, **leaves)

    def both() -> None:
        train(settings.override(out=tmp_path / "waits"), callbacks=[Spoils(2, 6)])
        launch, seen = Stepper.launch, []

        def counting(self: Stepper, *args: Any, **kwargs: Any) -> Any:
            with reads() as read:
                out = launch(self, *args, **kwargs)
            seen.append(dict(read))
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "works_by_itself", lambda device: True)
            patch.setattr(Stepper, "launch", counting)
            train(settings.override(out=tmp_path / "late"), callbacks=[Spoils(2, 6)])
        assert len(seen) == 10 and not any(seen), seen

    ranks = fork(tmp_path / "ranks", 2, both)
    assert ranks.wait() == [0, 0], ranks.told()
    assert everything(tmp_path / "waits") == everything(tmp_path / "late")
    skipped = {line["step"] for line in lines(tmp_path / "late" / "metrics.jsonl") if "skipped" in line}
    assert "fsdp" in leaves or len(skipped) >= 2  # FSDP calls no hook of a parameter that is in shards
    one, other = (load_model(tmp_path / name).state_dict() for name in ("waits", "late"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("device", "has", "precision"), [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")]
)
def test_auto_is_resolved_by_the_device(
    device: str, has: bool, precision: str, base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation)
    config = base.override(precision="auto")
    encoder = build.make_encoder(config)
    found = build.resolved(config, encoder, make_objective("cloob"), torch.device(device))
    assert found.run.precision == precision and found.run.tf32 == (device == "cuda")
    kept = build.resolved(base.override(precision="fp16"), encoder, make_objective("cloob"), torch.device(device))
    assert kept.run.precision == "fp16" and kept.run.tf32 is False


def test_bfloat16_that_is_emulated_is_told(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listed = [("flags : fpu avx2 avx512f", True), ("flags : avx512_bf16", False), ("Features : asimd bf16", False)]
    for text, emulated in [*listed, ("processor : 0", False)]:
        (tmp_path / "cpuinfo").write_text(f"model : x\n{text}\n")
        assert machine.emulates_bfloat16(tmp_path / "cpuinfo") == emulated
    assert not machine.emulates_bfloat16(tmp_path / "none")
    monkeypatch.setattr(machine, "emulates_bfloat16", lambda: True)
    encoder = build.make_encoder(base)
    for precision, device in (("bf16", "cuda"), ("fp32", "cpu"), ("bf16", "cpu")):
        assert "only emulates" not in caplog.text
        config = base.override(precision=precision)
        build.resolved(config, encoder, make_objective("cloob"), torch.device(device))
    assert "only emulates bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("tf32", "device", "said"), [(True, "cuda", "high"), (True, "cpu", "highest"), (False, "cuda", "highest")]
)
def test_float32_products_round_to_tf32_for_the_time_of_a_run(
    tf32: bool, device: str, said: str, base: TrainConfig
) -> None:
    before = torch.get_float32_matmul_precision()
    with build.products(base.override(tf32=tf32), torch.device(device)):
        assert torch.get_float32_matmul_precision() == said
    assert torch.get_float32_matmul_precision() == before == "highest"
