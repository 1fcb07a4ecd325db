"""Real gloo processes: over ranks, loss and SGD step are those of one process that has
the whole batch.

W processes do all checks of their world size at once, forked from a server that has
imported torch: starting them is what takes the time."""

import math
import multiprocessing
import time
import traceback
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from cloob import distributed
from cloob.distributed import Layout
from cloob.errors import InputError
from cloob.family import FAMILY
from cloob.objective import OBJECTIVES, ContrastiveObjective, make_objective
from paper_loops import count_flops, pairs
from support import raises, seeded

multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "cloob.objective"]
)

SECONDS = 60  # a collective call that waits longer is a hang
BACKENDS = ("reference", "streamed")
SIZES = {
    2: {"equal": (3, 3), "unequal": (2, 5)},
    3: {"unequal": (1, 4, 2)},
}
CPU = torch.device("cpu")


# Two steps of training


class Case(NamedTuple):
    """A member on so many rows a rank, with labels, and where it is of DDP."""

    name: str
    split: str
    labels: str = "none"
    place: str = "inside"


CASES = [Case(name, "equal") for name in OBJECTIVES]
CASES += [Case(name, "unequal", "ids") for name in OBJECTIVES]
CASES += [Case("cloob", "unequal"), Case("cloob", "equal", "ids")]
CASES += [Case("cloob", split, "ids", "outside") for split in ("equal", "unequal")]
CASES += [
    Case(name, "unequal", labels)
    for name in ("cloob", "clip", "siglip")
    for labels in ("dense", "columns")
]
COMPILED = Case("cloob", "equal", "ids", "compiled")  # tracing takes time: once


class Towers(nn.Module):
    """Two small towers; with an objective, the whole of what DDP wraps."""

    def __init__(self, objective, lowered):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)) for _ in range(2)
        )
        self.objective = objective
        self.lowered = lowered

    def forward(self, images, texts, **labels):
        x = nn.functional.normalize(self.image(images), dim=1)
        y = nn.functional.normalize(self.text(texts), dim=1)
        if self.objective is None:
            return x, y
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lowered):
            return self.objective(x, y, **labels)


def labels_of(kind, n, own):
    """Those of some rows of a batch of n; columns of targets are its rows."""
    if kind == "none":
        return {}
    if kind == "ids":  # which repeat within and across ranks
        return {"ids": (torch.arange(n) * 3 % 4)[own]}
    generator = seeded(n)
    shares = torch.rand(n, n, generator=generator).softmax(1)
    weights = torch.rand(n, generator=generator)[own]
    if kind == "dense":
        return {"targets": shares[own], "weights": weights}
    best, columns = shares.topk(2, dim=1)
    best = best / best.sum(1, keepdim=True)
    return {"targets": (columns[own], best[own]), "weights": weights}


def learnable(name, backend, gather, **options):
    retrieves = FAMILY[name].hopfield
    scales = {"learnable_inv_tau": True, "learnable_beta": retrieves, "inv_tau": 10.0}
    return make_objective(name, backend=backend, gather=gather, **scales, **options)


def two_steps(case, backend, n, own, gather):
    """Of SGD: the second loss depends on the first gradient.

    DDP averages learnable τ and β as it does the weights. Several ranks compute the
    loss under autocast, which changes nothing.
    """
    images, texts = torch.randn(2, n, 5, generator=seeded(n))
    labels = labels_of(case.labels, n, own)
    margin = {"exclude_above": 0.1 if case.labels == "ids" else None}
    auto = "auto" if gather else False
    inside = None
    outside = None
    if case.place == "outside":
        outside = make_objective("cloob", backend=backend, gather=gather)
    else:
        inside = learnable(case.name, backend, auto, **margin)
    towers = Towers(inside, lowered=gather)
    wrapped = towers
    if gather:
        is_compiled = case.place == "compiled"
        called = torch.compile(towers, backend="eager") if is_compiled else towers
        wrapped = nn.parallel.DistributedDataParallel(called)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        if outside is None:
            loss = wrapped(images[own], texts[own], **labels)
        else:
            loss = outside(*wrapped(images[own], texts[own]), **labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    parameters = {key: p.detach().clone() for key, p in towers.named_parameters()}
    return torch.stack(losses), parameters


def steps(world, own_of, gather):
    """All cases of a world; ``own_of`` gives the rows of this process."""
    sizes = SIZES[world]
    return {
        (case, backend): two_steps(
            case, backend, sum(sizes[case.split]), own_of(sizes[case.split]), gather
        )
        for case in [*CASES, COMPILED]
        for backend in BACKENDS
        if case.split in sizes
    }


# What each rank checks by itself


def check_arithmetic():
    """One step of CLOOB at a global batch that every world size divides; the value
    without gradients.
    """
    n = 24
    d = 8
    world = distributed.world_size()
    x, y = pairs(n, d, dtype=torch.float32)
    own = Layout((n // world,) * world).local
    # Four retrievals of 2 + 4 products and two contrasts of 1 + 2; streamed retrievals
    # compute one of theirs again.
    for backend, products in (("reference", 4 * 6 + 2 * 3), ("streamed", 4 * 7 + 6)):
        objective = ContrastiveObjective(backend=backend, gather=True)
        rows = [side[own].clone().requires_grad_() for side in (x, y)]
        flops = count_flops(lambda o=objective, r=rows: o(*r).backward())
        assert flops * world == 2 * products * n * n * d
        with torch.no_grad():
            for hopfield in (True, False):
                whole = ContrastiveObjective()(x, y, hopfield=hopfield)
                found = objective(*rows, hopfield=hopfield)
                assert_close(found, whole, rtol=1e-5, atol=0)
            half = [side.bfloat16() for side in rows]
            expected = objective(*(side.float() for side in half))
            assert objective(*half) == expected


def check_mistakes():
    """All ranks raise what the last one alone does wrong; the loss in between shows
    that they are in step.
    """
    last = distributed.world_size() - 1
    is_last = distributed.rank() == last
    x, y = pairs(4, 3, seed=distributed.rank(), dtype=torch.float32)
    spoilt = x.clone()
    spoilt[2, 0] = math.nan
    bad = f"rank {last}: image_features: 1 of 4 rows are bad; row 2 is not finite"
    nothing = f"rank {last}: image_features is a NoneType"
    empty = f"rank {last}: 0 image_features and 0 text_features: pairs are expected"
    mistakes = [
        (ValueError, bad, (spoilt, y)),
        (TypeError, nothing, (None, y)),
        (ValueError, empty, (x[:0], y[:0])),
        (ValueError, "ranks differ in inv_tau: rank 0 has 30.0", (x, y, 31.0)),
    ]
    for backend in BACKENDS:
        objective = ContrastiveObjective(gather=True, backend=backend)
        for error, message, sides in mistakes:
            raises(error, f"^{message}", objective, *(sides if is_last else (x, y)))
            assert objective(x, y).isfinite()
        contrast = "infonce" if is_last else "infoloob"
        other = ContrastiveObjective(gather=True, backend=backend, contrast=contrast)
        raises(
            ValueError, "^ranks differ in contrast: rank 0 has infoloob", other, x, y
        )


def check_labels():
    """Those that fit on one rank alone."""
    world = distributed.world_size()
    is_last = distributed.rank() == world - 1
    x, y = pairs(4, 3, seed=distributed.rank(), dtype=torch.float32)
    objective = ContrastiveObjective(gather=True)
    n = 4 * world
    shares = torch.full((4, n), 1 / n)
    assert objective(x, y, targets=shares).isfinite()
    targets = torch.full((4, n - 1), 1 / (n - 1)) if is_last else shares
    message = f"targets of rank {world - 1} have {n - 1} columns"
    raises(ValueError, message, objective, x, y, targets=targets)
    weights = torch.ones(4) if is_last else None
    raises(ValueError, "ranks differ in weights", objective, x, y, weights=weights)
    with pytest.warns(UserWarning, match="leave no anchor any negative"):
        objective(x, y, ids=torch.zeros(4, dtype=torch.long))
    # of another integer type they are the same
    ids = torch.arange(4)
    narrow = ids.to(torch.int16) if is_last else ids
    assert objective(x, y, ids=narrow) == objective(x, y, ids=ids)


def check_what_a_module_allows():
    x, y = pairs(4, 3, seed=distributed.rank(), dtype=torch.float32)
    alone = ContrastiveObjective()
    with pytest.warns(UserWarning, match="gather is False: each of the"):
        alone(x, y)
    alone(x, y)
    drifted = make_objective("siglip", gather=True, bias=0.0)
    drifted.bias.data += 1e-6 * distributed.rank()
    assert drifted(x, y).isfinite()
    reference = ContrastiveObjective(gather=True, backend="reference")
    leaf = x.clone().requires_grad_()
    message = "can be differentiated once; gather=False has more derivatives"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(reference(leaf, y), leaf, create_graph=True)
    message = r"goes through no torch\.func .* gather=False does"
    raises(RuntimeError, message, torch.func.grad(reference), x, y)


def check_exchange():
    """What the losses do not show: ids keep all their bits, and ranks agree or fail
    together.
    """
    rank = distributed.rank()
    world = distributed.world_size()
    layout = Layout(tuple(range(1, world + 1)))
    numbers = distributed.gather_rows(torch.arange(rank + 1) + (1 << 40), layout)
    expected = torch.cat([torch.arange(r + 1) for r in range(world)]) + (1 << 40)
    assert torch.equal(numbers, expected)
    agreed = distributed.agree({"a": rank, "b": 7}, None, CPU)
    wanted = {"a": tuple(range(world)), "b": (7,) * world}
    assert agreed == wanted

    class Local(Exception):
        """No other rank can make one."""

    unicode = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "of its own")
    for fault in (Local("of its own"), unicode):
        own = fault if rank == world - 1 else None
        message = f"^rank {world - 1}: .*of its own"
        raises(RuntimeError, message, distributed.agree, {}, own, CPU)

    def fail():
        raise Local("of its own")

    error = RuntimeError if rank else Local
    raises(error, r"^of its own", distributed.on_rank_zero, fail)
    everywhere = distributed.gather_objects({"rank": torch.full((3,), rank)})
    assert [value["rank"].tolist() for value in everywhere] == [
        [r] * 3 for r in range(world)
    ]


CHECKS = (
    check_exchange,
    check_arithmetic,
    check_mistakes,
    check_labels,
    check_what_a_module_allows,
)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", store, limit, rank=rank, world_size=world)
    try:
        for check in CHECKS:
            check()
        found = steps(world, lambda sizes: Layout(sizes).local, gather=True)
        torch.save(found, folder / f"rank-{rank}.pt")
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=SIZES, ids=lambda world: f"{world}-ranks")
def ranks(request, tmp_path_factory):
    """The steps of each rank of a run, all of whose checks hold."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{world}")
    context = mp.start_processes(
        worker, (world, folder), nprocs=world, join=False, start_method="forkserver"
    )
    try:
        end = time.monotonic() + 2 * SECONDS
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the ranks hang"
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        told = [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]
        pytest.fail("\n".join(told) or str(error), pytrace=False)
    finally:
        for process in context.processes:
            process.kill()
    saved = (folder / f"rank-{rank}.pt" for rank in range(world))
    return [torch.load(path, weights_only=False) for path in saved]


def test_loss_and_sgd_steps_are_those_of_one_process(ranks):
    whole = steps(len(ranks), lambda _: slice(None), gather=False)
    assert whole.keys() == ranks[0].keys()
    start = dict(Towers(None, lowered=False).named_parameters())
    for case, (losses, parameters) in whole.items():
        for name in start:
            assert not torch.equal(start[name], parameters[name]), (case, name)
        # Of SigLIP the scale's gradient sums over all N² pairs, of which most cancel.
        close = 1e-4 if case[0].name == "siglip" else 1e-5
        for found_losses, found in (rank[case] for rank in ranks):
            assert_close(found_losses, losses, rtol=1e-5, atol=1e-6)
            assert_close(found, parameters, rtol=close, atol=close)


@pytest.mark.parametrize("rank", [None, "first"])
def test_a_world_that_torchrun_has_not_set_up_is_said(rank, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    message = r"^WORLD_SIZE is set, but not by torchrun \(.*\); start by torchrun"
    with pytest.raises(InputError, match=message), distributed.process_group(CPU):
        pass
