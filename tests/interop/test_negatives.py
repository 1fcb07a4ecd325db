"""Hard negatives against the formula, written as loops."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cloob import ContrastiveObjective
from cloob.interop.negatives import contrast_with_negatives
from cloob.objective import PAPER_OBJECTIVES, NonFiniteFeaturesError, make_objective
from paper_loops import (
    contrast_loop,
    retrieval_loop,
    value_and_gradients,
    value_and_slope,
)
from support import on_ranks, seeded

N = 5
M = 7
D = 4


def rows(*sizes, dtype=torch.float64):
    generator = seeded(0)
    drawn = [torch.randn(n, D, generator=generator, dtype=dtype) for n in sizes]
    return [F.normalize(side, dim=1).requires_grad_() for side in drawn]


def by_loops(objective, x, y, z):
    """The paper's loops, with the negatives among the candidates of the anchors x."""
    inv_tau = float(objective.inv_tau)
    documents = [*y, *z]
    anchors = (x, documents)
    positives = y
    states = x
    if objective.hopfield:
        retrieved = partial(retrieval_loop, beta=float(objective.beta))
        anchors = (retrieved(x, x), retrieved(documents, x))
        positives = retrieved(y, y)
        states = retrieved(x, y)
    both = contrast_loop(objective.contrast, *anchors, inv_tau)
    both += contrast_loop(objective.contrast, positives, states, inv_tau)
    return both * (1 / inv_tau if objective.scale == "paper" else 0.5)


@pytest.mark.parametrize("name", PAPER_OBJECTIVES)
@pytest.mark.parametrize("path", ["reference", "streamed"])
def test_equals_the_formula(name, path):
    objective = make_objective(name, inv_tau=9.0, learnable_inv_tau=False, backend=path)
    given = rows(N, N, M)
    contrast = partial(contrast_with_negatives, objective)
    loss, *gradients = value_and_gradients(contrast, *given)
    at = [side.detach() for side in given]
    drawn = seeded(0)
    for _ in range(3):
        along = [torch.randn(side.shape, generator=drawn).double() for side in given]
        value, slope = value_and_slope(partial(by_loops, objective), at, along)
        assert loss.item() == pytest.approx(value, rel=1e-10)
        both = zip(gradients, along, strict=True)
        found = sum(float((gradient * way).sum()) for gradient, way in both)
        assert found == pytest.approx(slope, rel=1e-8, abs=1e-10)
    assert min(float(g.abs().max()) for g in gradients) > 1e-3


def test_learnable_scales_get_their_gradient():
    objective = ContrastiveObjective.cloob(learnable_inv_tau=True, learnable_beta=True)
    contrast_with_negatives(objective, *rows(N, N, M, dtype=torch.float32)).backward()
    for p in objective.parameters():
        assert float(p.grad.abs()) > 0
    clip = ContrastiveObjective.clip()
    clip.log_inv_tau.data.fill_(6.0)
    contrast_with_negatives(clip, *rows(N, N, M, dtype=torch.float32))
    assert float(clip.log_inv_tau.detach()) == pytest.approx(math.log(100.0))


PAIRS, EXTRA = (3, 2), (3, 4)  # rows of the two ranks


def _worker(rank):
    own = []
    for side, sizes in zip(rows(N, N, M), (PAIRS, PAIRS, EXTRA), strict=True):
        own.append(side.split(sizes)[rank])
    found = {}
    for name in ("cloob", "infoloob"):
        tower = nn.parallel.DistributedDataParallel(_tower())
        objective = make_objective(name, gather=True)
        sides = [F.normalize(tower(side), dim=1) for side in own]
        loss = contrast_with_negatives(objective, *sides)
        loss.backward()
        found[name] = (loss.detach(), tower.module.weight.grad)
    x, y, z = own
    with pytest.raises(NonFiniteFeaturesError) as raised:
        contrast_with_negatives(objective, x, y, z * (0.0 if rank else 1.0))
    return found, str(raised.value)


def _tower():
    tower = nn.Linear(D, D, bias=False, dtype=torch.float64)
    with torch.no_grad():
        tower.weight.copy_(torch.eye(D) + torch.arange(D * D).view(D, D) / 20)
    return tower


def test_two_ranks_equal_one(tmp_path):
    """Unequal numbers of pairs and of negatives, through DDP; an error of one rank is
    everybody's.
    """
    ranks = on_ranks(tmp_path, 2, _worker)
    for name in ("cloob", "infoloob"):
        tower = _tower()
        given = [F.normalize(tower(side), dim=1) for side in rows(N, N, M)]
        loss = contrast_with_negatives(make_objective(name), *given)
        loss.backward()
        same = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
        for found, message in ranks:
            value, gradient = found[name]
            same(value, loss.detach())
            same(gradient, tower.weight.grad)
            assert "rank 1: negatives: 4 of 4 rows" in message
