"""Gradient caching against the same batch in one pass with a graph.

For every partition, with ids and learned scales, in every precision:
``functional/test_matrix.py``."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from cloob import ContrastiveObjective
from cloob.objective import NonFiniteFeaturesError, make_objective
from cloob.training.gradcache import cached_backward
from support import on_ranks, raises, seeded

N = 12
D = 6
WITH_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Towers(nn.Module):
    """Two towers of different input widths, unit rows."""

    def __init__(self, *middle):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.image = nn.Sequential(
                nn.Linear(5, 10), nn.GELU(), *middle, nn.Linear(10, D)
            )
            self.text = nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, D))

    def forward(self, images, texts):
        x = self.image(images)
        y = self.text(texts)
        return F.normalize(x, dim=1), F.normalize(y, dim=1)


class Whole(nn.Module):
    """Towers and objective as DDP has to see them; "logit_scale": a parameter that is
    handed over as an option.
    """

    def __init__(self, name, gather):
        super().__init__()
        learns = name != "logit_scale"
        self.towers = Towers()
        self.objective = make_objective(
            name if learns else "clip", gather=gather, learnable_inv_tau=learns
        )
        self.logit_scale = None if learns else nn.Parameter(torch.tensor(2.0))

    def options(self):
        if self.logit_scale is None:
            return {}
        return {"logit_scale": self.logit_scale.exp()}

    def forward(self, images, texts):
        return self.towers(images, texts)

    def fit(self, step):
        """The losses of three steps of SGD, which shows a factor that Adam would
        hide.
        """
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(step())
            optimizer.step()
        return losses


def batch():
    draw = seeded(0)
    return torch.randn(N, 5, generator=draw), torch.randn(N, 7, generator=draw)


def cut(pairs, sizes):
    images, texts = pairs
    return list(zip(images.split(sizes), texts.split(sizes), strict=True))


def one_pass(towers, objective, micro_batches):
    """The oracle: the same micro-batches, all graphs kept, one backward pass."""
    parts = [towers(*micro_batch) for micro_batch in micro_batches]
    loss = objective(*(torch.cat(side) for side in zip(*parts, strict=True)))
    loss.backward()
    return loss.detach()


def in_parts(towers, micro_batches, objective=None, **options):
    objective = objective or ContrastiveObjective.cloob()
    return cached_backward(
        lambda part: towers(*part), objective, micro_batches, towers=towers, **options
    )


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(left, right, tolerance=0.0):
    """Equal but for ``tolerance`` times the largest element of each tensor, or a tenth:
    small sums are what cancels.
    """
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        error = float((value - right[name]).abs().max())
        expected = tolerance * max(0.1, float(right[name].abs().max()))
        assert error <= expected, f"{name} is off by {error}"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_learned_option_gets_its_gradient(name):
    """As open_clip hands them over: the exponential of the model's parameter, and a
    parameter by itself.
    """
    found = []
    for cached in (False, True):
        towers = Towers()
        towers.logit_scale = nn.Parameter(torch.tensor(2.0))
        objective = make_objective(name, learnable_inv_tau=False)
        options = {"logit_scale": towers.logit_scale.exp()}
        if name == "siglip":
            towers.logit_bias = nn.Parameter(torch.tensor(-3.0))
            options["logit_bias"] = towers.logit_bias
        if cached:
            in_parts(towers, cut(batch(), [5, 7]), objective, **options)
        else:
            objective(*towers(*batch()), **options).backward()
        found.append(gradients(towers))
    assert "logit_scale" in found[0]
    assert_same(found[1], found[0], 2e-6)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[WITH_CUDA, pytest.mark.cuda])]
)
def test_random_state_is_replayed(device):
    micro_batches = cut(tuple(side.to(device) for side in batch()), [5, 5, 2])
    full, cached = (Towers(nn.Dropout(0.5)).to(device) for _ in range(2))
    torch.manual_seed(11)
    expected = one_pass(full, ContrastiveObjective.cloob(), micro_batches)
    afterwards = torch.rand(3, device=device)
    torch.manual_seed(11)
    loss = in_parts(cached, micro_batches)
    assert torch.equal(torch.rand(3, device=device), afterwards)
    assert_close(loss, expected, rtol=1e-6, atol=0.0)
    assert_same(gradients(cached), gradients(full), 2e-6)


def test_the_objective_is_in_float32_within_the_callers_autocast():
    """Rows in a narrow cone: in bfloat16 little would be left of the gradient of
    retrieval.
    """
    drawn = seeded(1)
    axis = F.normalize(torch.randn(D, generator=drawn), dim=0)
    rows = [
        F.normalize(0.95 * axis + 0.1 * torch.randn(64, D, generator=drawn), dim=1)
        for _ in "xy"
    ]

    def run(autocast):
        towers = nn.ModuleList(
            nn.Embedding.from_pretrained(side.clone(), freeze=False) for side in rows
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            objective = make_objective("cloob", backend="reference")
            parts = torch.arange(64).split(16)
            cached_backward(
                lambda part: (towers[0](part), towers[1](part)),
                objective,
                parts,
                towers=towers,
            )
        return gradients(towers)

    assert_same(run(True), run(False), 1e-6)


class Centre(nn.Module):
    """Takes a running mean off, which it keeps in a new tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", None)

    def forward(self, x):
        centred = x if self.centre is None else x - self.centre
        mean = x.detach().mean(0)
        self.centre = mean if self.centre is None else (self.centre + mean) / 2
        return centred


@pytest.mark.parametrize(
    "layer", [partial(nn.BatchNorm1d, 10), Centre, "spectral norm"]
)
def test_buffers_move_as_in_one_pass_over_the_micro_batches(layer):
    """Once for each: batch norm's statistics, a buffer that is replaced, and power
    iterations, which embed alike.
    """
    middle = [] if layer == "spectral norm" else [layer()]
    full = Towers(*middle)
    cached = Towers(*copy.deepcopy(middle))
    if layer == "spectral norm":
        for towers in (full, cached):
            torch.manual_seed(0)
            nn.utils.parametrizations.spectral_norm(towers.image[0])
    before = copy.deepcopy(dict(full.named_buffers()))
    micro_batches = cut(batch(), [4, 5, 3])
    one_pass(full, ContrastiveObjective.cloob(), micro_batches)
    in_parts(cached, micro_batches)
    assert_same(gradients(cached), gradients(full), 2e-6)
    after = dict(cached.named_buffers())
    assert_same(after, dict(full.named_buffers()))
    assert any(
        name not in before or not torch.equal(before[name], buffer)
        for name, buffer in after.items()
    )


def test_bad_rows_raise_before_anything_changed():
    towers = Towers(nn.BatchNorm1d(10))
    images, texts = batch()
    images[7] = math.nan
    before = copy.deepcopy(dict(towers.named_buffers()))
    parts = cut((images, texts), [4, 8])
    match = r"rows are bad; row . is not finite"
    raises(NonFiniteFeaturesError, match, in_parts, towers, parts)
    assert not gradients(towers)
    assert_same(dict(towers.named_buffers()), before)


def test_what_cannot_be_differentiated_is_refused():
    towers = Towers()

    def step(parts, encode=towers, objective=ContrastiveObjective.cloob()):  # noqa: B008
        return cached_backward(lambda p: encode(*p), objective, parts, towers=towers)

    parts = cut(batch(), [4, 8])
    raises(ValueError, "no micro-batches", step, [])
    raises(TypeError, "NoneType", step, parts, lambda *part: (*part, None))
    rows = lambda x, y: (x * y).sum(dim=1)  # noqa: E731
    raises(RuntimeError, "scalar outputs", step, parts, objective=rows)
    with torch.no_grad():
        raises(ValueError, "gradients are off", step, parts)
    assert not gradients(towers)


def test_activations_of_one_micro_batch_are_alive_at_a_time():
    towers = Towers()
    hidden = []
    towers.image[0].register_forward_hook(
        lambda *arguments: hidden.append(weakref.ref(arguments[2]))
    )

    def encode(part):
        for activation in hidden:
            assert activation() is None
        return towers(*part)

    cached_backward(
        encode, ContrastiveObjective.cloob(), cut(batch(), [4, 4, 4]), towers=towers
    )
    assert len(hidden) == 6


NAMES = ("clip", "cloob", "logit_scale")
LOCAL = ([2, 3, 1], [4, 2])  # micro-batches of the two ranks


def _worker(rank):
    own = slice(0, sum(LOCAL[0])) if rank == 0 else slice(sum(LOCAL[0]), N)
    micro_batches = cut(tuple(side[own] for side in batch()), LOCAL[rank])
    static = DistributedDataParallel(Towers(), static_graph=True)
    with pytest.raises(ValueError, match="DDP has static_graph=True"):
        cached_backward(
            lambda part: static(*part),
            ContrastiveObjective(gather=True),
            micro_batches,
            towers=static,
        )
    return {name: _ddp_steps(name, micro_batches) for name in NAMES} | {
        "buffers": _ddp_buffers(rank)
    }


def _ddp_buffers(rank):
    """Running statistics after a step with equal data, from others on each rank."""
    norm = nn.BatchNorm1d(4, affine=False)
    norm.running_mean.fill_(rank + 1.0)
    ddp = DistributedDataParallel(nn.Sequential(norm, nn.Linear(4, 4)))
    norm.running_mean.fill_(rank + 1.0)  # DDP has shared them as it was made
    rows = torch.arange(24.0).reshape(6, 4).sin()
    objective = make_objective("cloob", check=False, gather=True)
    cached_backward(
        lambda part: (ddp(part), part),
        objective,
        rows.split(3),
        towers=ddp,
    )
    return [buffer.clone() for buffer in norm.buffers()]


def _ddp_steps(name, micro_batches):
    whole = Whole(name, gather=True)
    ddp = DistributedDataParallel(whole)
    syncs = []

    def counted(_, bucket):  # DDP checks annotations, and they are strings here
        syncs.append(bucket.index())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, counted)
    step = partial(
        cached_backward, lambda part: ddp(*part), whole.objective, micro_batches
    )
    losses = whole.fit(lambda: step(towers=ddp, **whole.options()))
    return {"losses": losses, "syncs": syncs, "state": whole.state_dict()}


def test_two_ddp_processes_equal_one(tmp_path):
    """Different data, different numbers of micro-batches."""
    ranks = on_ranks(tmp_path, 2, _worker)
    assert_close(*(rank["buffers"] for rank in ranks))
    for name in NAMES:
        alone = Whole(name, gather=False)
        expected = alone.fit(
            lambda: one_pass(
                alone,
                partial(alone.objective, **alone.options()),
                [batch()],  # noqa: B023
            )
        )
        for found in (rank[name] for rank in ranks):
            assert_close(found["losses"], expected, rtol=1e-5, atol=1e-6)
            assert_same(found["state"], alone.state_dict(), 2e-6)
            assert len(found["syncs"]) == 3, "gradients travel once a step"
