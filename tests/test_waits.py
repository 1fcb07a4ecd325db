"""How many kernels a step, the objective and an epoch of heads launch, and how often
they wait for their device.

Tensors of torch's device ``meta`` stand for a GPU's: they hold no numbers, so that a
number that the host reads is an error, or counted here. Not covered: ranks, autocast,
and what asks for CUDA by its name.
"""

import contextlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cloob
from cloob import HeadSettings
from cloob.data.batch import Batch
from cloob.data.vectors import VectorPairs
from cloob.distributed import Layout
from cloob.heads import fit, parts
from cloob.objective import OBJECTIVES, make_objective
from cloob.training.faults import StopSignal, fetch
from cloob.training.optim import parameter_groups
from cloob.training.step import StepBatch, Stepper, TowersWithLoss
from cloob.training.validation import pass_over_held_out

DEVICE = torch.device("meta")
LAYOUT = Layout((8,))


class Asked(TorchDispatchMode):
    """Counts the numbers that the host reads, the tensors it sends, and the kernels:
    all that is no view and no waiting.
    """

    waits = copies = kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.waits += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "_to_copy" and args[0].is_meta and target == torch.device("cpu"):
            self.waits += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        if name == "_to_copy" and not args[0].is_meta and target == DEVICE:
            self.copies += 1
        self.kernels += not function.is_view
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """The device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def asked(action):
    """What the second call asks for."""
    with Asked():
        action()
    with Asked() as second:
        action()
    return second


def rows(n, width=16):
    return torch.empty(n, width, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective(name):
    """In the loop nothing waits; a call of one's own waits once, for its checks. Bounds
    of kernels, here and below, are a little above what was counted.
    """
    objective = make_objective(name, backend="streamed").to(DEVICE)
    x = rows(64)
    y = rows(64)
    in_the_loop = asked(lambda: objective(x, y, trusted=Layout((64,))).backward())
    assert in_the_loop.waits == 0
    assert in_the_loop.kernels <= 110
    assert asked(lambda: objective(x, y).backward()).waits == 1


@pytest.fixture
def towers():
    encoder = cloob.create_model("tiny-resnet", seed=0)
    encoder._layout = torch.contiguous_format
    objective = make_objective("cloob").to(DEVICE)
    return TowersWithLoss(encoder.to(DEVICE), objective, "fp32")


@pytest.fixture
def batch(towers):
    encoder = towers.encoder
    size = (8, 3, encoder.image_size, encoder.image_size)
    images = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    tokens = encoder.tokenizer(["a dog"] * 8).to(DEVICE)
    return Batch((images, tokens), torch.empty(8, device=DEVICE).long(), ("",) * 8)


class Fused(torch.optim.SGD):
    """Takes a step that the device may refuse, as fused optimisers do; here it is
    none.
    """

    _step_supports_amp_scaling = True

    def step(self):
        pass


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, 800),
        ({"clip_grad_norm": 1.0}, 940),
        ({"ema": 0.99}, 784),  # an average takes twenty at most
        ({"micro_batch_size": 2}, 3_800),
    ],
)
def test_a_step_of_towers_waits_for_nothing(towers, batch, options, kernels):
    groups = parameter_groups(towers.encoder, towers.objective, 0.1)
    optimizer = Fused(groups, lr=1e-3)
    with Asked():
        stepper = Stepper(towers.train(), optimizer, **options)

    def step():
        stepper.launch(StepBatch(batch.parts, LAYOUT, hopfield=True), 1e-3)

    found = asked(step)
    assert found.waits == 0
    assert found.copies == 0
    assert found.kernels <= kernels


@pytest.mark.parametrize("n", [2, 4])
def test_held_out_pictures_wait_once(towers, batch, n):
    run = Mock(objective=towers.objective)
    run.step_batch = lambda batch, layout, hopfield: StepBatch(
        batch.parts, layout, batch.ids, hopfield
    )
    run.stepper.device = DEVICE
    run.stepper.micro_batch_size = 0
    run.fetch = lambda batches: fetch(batches, StopSignal(), DEVICE, None)
    run.val_loader = Mock(pairs_per_epoch=8 * n, batch_size=8, steps_per_epoch=n)
    run.val_loader.epoch = lambda _: iter([batch] * n)
    model = towers.eval()

    @torch.no_grad()
    def judge():
        pass_over_held_out(run, model, hopfield=True).mean_loss()

    assert asked(judge).waits == 1


@pytest.mark.parametrize("steps", [4, 8])
def test_an_epoch_of_heads_waits_once_and_sends_its_order(monkeypatch, steps):
    """No step waits: an epoch waits for its mean loss, and sends the device its order
    and its rows' numbers.
    """
    settings = HeadSettings(objective="cloob", batch_size=16)
    n = 16 * steps
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=(2, n, 12)).astype("float32")
    numbers = np.arange(n)
    places = np.stack([numbers, numbers], axis=1)
    pairs = VectorPairs("pairs", a, b, places, numbers, weights=draws.random(n))
    monkeypatch.setattr(parts, "resident", lambda *_: (rows(n, 12), rows(n, 12)))
    heads = fit.first_heads(pairs, None, settings, None)
    model = parts.Model(*heads, parts.objective_of(settings)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = parts.Batches(pairs, settings, DEVICE)

    def epoch():
        fit.fit_epoch(model, optimizer, batches, settings, epoch=0)

    found = asked(epoch)
    assert found.waits == 1
    assert found.copies == 2
    assert found.kernels <= 360 * steps
