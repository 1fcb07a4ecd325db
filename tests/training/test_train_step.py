"""One step: against the same step written out, waited for or not, in each precision; a
bad one leaves no trace.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from train_helpers import Recorder, assert_same_run, equal

from cloob.distributed import Layout
from cloob.objective import ContrastiveObjective, make_objective
from cloob.training import step_log
from cloob.training.callbacks import Callback
from cloob.training.loop import train
from cloob.training.step import StepBatch, Stepper, TowersWithLoss
from support import read_lines, seeded


class Towers(nn.Module):
    """Linear towers with batch norm; pixels and tokens are plain numbers.

    ``gain`` multiplies a gradient.
    """

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(5, 4)
        self.text = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("centre", torch.zeros(4))
        self.gain = 1.0
        self.zero = False
        self.seen = set()

    def forward(self, images, tokens):
        x = self.image(images)
        y = self.text(tokens)
        self.seen |= {x.dtype, y.dtype}
        if y.requires_grad and self.gain != 1.0:
            y.register_hook(lambda gradient: gradient * self.gain)
        # a new tensor in the place of the last
        self.centre = (self.centre + y.detach().mean(0).float()) / 2
        y = y * (torch.arange(len(y)) > 0)[:, None] if self.zero else y
        return F.normalize(self.norm(x.float()), dim=-1), F.normalize(y.float(), dim=-1)


def batch():
    draw = seeded(3)
    return torch.randn(6, 5, generator=draw), torch.randn(6, 3, generator=draw)


class Taking:
    """A stepper, and what it works on."""

    def __init__(self, name="cloob", clip=0.0, micro=0, precision="fp32", sgd=False):
        torch.manual_seed(0)
        objective = make_objective(name)
        self.module = TowersWithLoss(Towers(), objective, precision).train()
        self.towers = self.module.encoder
        kind = torch.optim.SGD if sgd else torch.optim.AdamW
        self.optimizer = kind(self.module.parameters(), lr=9.0, fused=True)
        self.stepper = Stepper(self.module, self.optimizer, clip, micro)

    def __call__(self, images, tokens, lr=0.01):
        batch = StepBatch((images, tokens), Layout((len(images),)))
        return self.stepper.launch(batch, lr).read()

    def state(self):
        """Weights, buffers and moments."""
        flat = dict(self.module.state_dict())
        for index, moments in self.optimizer.state_dict()["state"].items():
            flat |= {f"{index}.{name}": value for name, value in moments.items()}
        return copy.deepcopy(flat)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize("objective", ["cloob", "clip"])
def test_step_is_the_plain_step(objective, clip):
    take = Taking(objective, clip=clip, sgd=True)
    module = copy.deepcopy(take.module)
    loss = module.objective(*module.encoder(*batch()))
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    factor = min(1.0, (clip or math.inf) / norm)

    result = take(*batch(), 0.05)
    assert result.finite
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    trained = [p for p in take.module.parameters() if p.requires_grad]
    for found, p, g in zip(trained, parameters, gradients, strict=True):
        expected = p.detach() - 0.05 * factor * g
        torch.testing.assert_close(found.detach(), expected, rtol=2e-4, atol=1e-7)
    assert all(p.grad is None for p in take.module.parameters())


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("where", ["nan", "zero", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace(where, micro):
    take = Taking(clip=1.0, micro=micro)
    take(*batch())
    before = take.state()
    images, tokens = batch()
    if where == "nan":
        images[2, 1] = math.nan
    take.towers.zero = where == "zero"
    take.towers.gain = math.inf if where == "gradient" else 1.0
    result = take(images, tokens)
    take.towers.zero = False
    take.towers.gain = 1.0
    assert not result.finite
    assert math.isfinite(result.loss) == (where == "gradient")
    # running means and the optimiser's count of steps among them
    assert equal(take.state(), before)
    assert take(*batch()).finite
    assert not torch.equal(take.towers.text.weight, before["encoder.text.weight"])


def test_autocast_covers_the_towers_only(monkeypatch):
    called = []
    forward = ContrastiveObjective.forward

    def watched(self, rows, *args, **kwargs):
        called.append((rows.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, rows, *args, **kwargs)

    monkeypatch.setattr(ContrastiveObjective, "forward", watched)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        take = Taking(precision=precision)
        assert take(*batch()).finite
        assert take.towers.seen == {dtype}
    assert set(called) == {(torch.float32, False)}


class Spoils(Callback):
    """Makes the gradients of some steps infinite; counts by backward passes, so that it
    does not matter who waits.
    """

    def __init__(self, *steps):
        self.steps = steps
        self.passes = 0

    def on_start(self, info):
        def hook(gradient):
            self.passes += 1
            return gradient * math.inf if self.passes in self.steps else gradient

        info.encoder.model.text_projection.register_hook(hook)


def test_a_late_run_is_the_run(base, tmp_path, monkeypatch):
    """Lines, faults and checkpoints; lines are read each 4 steps, epochs have 5."""
    settings = base.override(
        learnable_beta=True, epochs=2, save_every=3, keep=0, clip_grad_norm=1.0
    )
    one = tmp_path / "waits"
    other = tmp_path / "late"
    recorders = Recorder(), Recorder()
    train(settings.override(out=one), callbacks=[recorders[0], Spoils(2, 6, 7)])
    monkeypatch.setattr(step_log, "waits_at_reading", lambda device: True)
    monkeypatch.setattr(step_log, "READ_AT_ONCE", 4)
    train(settings.override(out=other), callbacks=[recorders[1], Spoils(2, 6, 7)])
    assert_same_run(one, other)
    found = read_lines(other / "metrics.jsonl")
    assert [line["step"] for line in found if "skipped" in line] == [2, 6, 7]
    named = read_lines(other / "skipped.jsonl")
    assert {line["step"] for line in named if "finite" in line["reason"]} == {2, 6, 7}
    for recorder in recorders:
        assert [line["step"] for line in recorder.of("step")] == list(range(1, 11))
