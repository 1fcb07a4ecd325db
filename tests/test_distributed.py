"""Real gloo processes: over ranks, loss and SGD step are those of one process that has
the whole batch.

W processes do all checks of their world size at once, forked from a server that has
imported torch: starting them is what takes the time."""

import itertools
import math
import multiprocessing
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cloob import distributed
from cloob.distributed import Layout
from cloob.errors import InputError
from cloob.objective import OBJECTIVES, ContrastiveObjective, make_objective
from paper_loops import count_flops, pairs
from support import raises

multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "cloob.objective"]
)

SECONDS = 60  # a collective call that waits longer is a hang
SIZES = {
    1: {"equal": (6,)},
    2: {"equal": (3, 3), "unequal": (2, 5)},
    3: {"unequal": (1, 4, 2)},
}
# Each member inside DDP, on equal parts without ids and on unequal ones with ids; CLOOB
# in the two other ways too, and after DDP.
STEP_CASES = [
    (name, backend, split, with_ids)
    for name, backend, split, with_ids in itertools.product(
        (*OBJECTIVES, "outside"),
        ("reference", "streamed"),
        ("equal", "unequal"),
        (False, True),
    )
    if name == "cloob" or with_ids == (split == "unequal" or name == "outside")
]
STEP_CASES += [
    (name, backend, "unequal", kind)
    for name, backend, kind in itertools.product(
        ("cloob", "clip", "siglip"), ("reference", "streamed"), ("dense", "columns")
    )
]
COMPILED = (
    2  # ranks around which a compiled module is tried: tracing is what takes the time
)


class Towers(nn.Module):
    """Two small towers; with an objective, the whole of what DDP wraps."""

    def __init__(self, objective):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (
            nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)) for _ in range(2)
        )
        self.objective = objective

    def forward(self, images, texts, ids=None, **labels):
        x, y = (
            nn.functional.normalize(tower(t), dim=1)
            for tower, t in ((self.image, images), (self.text, texts))
        )
        if self.objective is None:
            return x, y
        return self.objective(x, y, ids=ids, **labels)


def batch(n):
    """The global batch: images, texts, and ids that repeat within and across ranks."""
    images, texts = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n))
    return images, texts, torch.arange(n) * 3 % 4


def labels(n, kind):
    """Soft targets and weights of the global batch; their columns are its rows."""
    generator = torch.Generator().manual_seed(n)
    shares = torch.rand(n, n, generator=generator).softmax(1)
    weights = torch.rand(n, generator=generator)
    if kind == "dense":
        return shares, weights
    best, columns = shares.topk(2, dim=1)
    return (columns, best / best.sum(1, keepdim=True)), weights


def own_labels(n, kind, own):
    """Those of some rows."""
    if kind not in ("dense", "columns"):
        return {}
    targets, weights = labels(n, kind)
    if isinstance(targets, tuple):
        targets = tuple(part[own] for part in targets)
    else:
        targets = targets[own]
    return {"targets": targets, "weights": weights[own]}


def learnable(name, backend, gather, **more):
    options = {
        "learnable_inv_tau": True,
        "learnable_beta": "hopfield" in name or name == "cloob",
    }
    return make_objective(
        name, backend=backend, gather=gather, inv_tau=10.0, **options, **more
    )


def two_steps(name, backend, rows, gather, labels):
    """Of SGD: the second loss depends on the first gradient.

    DDP averages learnable τ and β as it does the weights.
    """
    outside = (
        make_objective("cloob", backend=backend, gather=gather)
        if name == "outside"
        else None
    )
    # With ids also a margin; objectives that gather where there is a process group.
    more = {"exclude_above": 0.1 if len(rows) == 3 and not labels else None}
    towers = Towers(
        None
        if outside
        else learnable(name, backend, "auto" if gather else False, **more)
    )
    wrapped = nn.parallel.DistributedDataParallel(towers) if gather else towers
    optimizer, losses = torch.optim.SGD(towers.parameters(), lr=0.5), []
    for _ in range(2):
        optimizer.zero_grad()
        if outside:
            loss = outside(*wrapped(*rows), ids=rows[2])
        else:
            loss = wrapped(*rows, **labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "losses": losses,
        "parameters": {k: v.detach().clone() for k, v in towers.named_parameters()},
    }


def steps(own, sizes, gather):
    """All cases; ``own`` gives the rows of this process."""
    results = {}
    for name, backend, split, with_ids in STEP_CASES:
        if split in sizes:
            n = sum(sizes[split])
            rows = tuple(t[own(split)] for t in batch(n))
            rows = rows if with_ids else rows[:2]
            results[name, backend, split, with_ids] = two_steps(
                name, backend, rows, gather, own_labels(n, with_ids, own(split))
            )
    return results


def flops_and_values():
    """Arithmetic of one step of CLOOB at a global batch that every world size divides;
    the loss without gradients.
    """
    n, found = 24, {}
    x, y = pairs(n, 8, dtype=torch.float32)
    own = Layout((n // dist.get_world_size(),) * dist.get_world_size()).local
    for backend in ("reference", "streamed"):
        objective = ContrastiveObjective(backend=backend, gather=True)
        rows = [side[own].clone().requires_grad_() for side in (x, y)]
        found[backend] = count_flops(lambda o=objective, r=rows: o(*r).backward())
        with torch.no_grad():
            found[f"{backend} value"] = objective(*rows).item()
            found[f"{backend} plain"] = objective(*rows, hopfield=False).item()
            half = [r.bfloat16() for r in rows]
            found[f"{backend} bfloat16"] = (
                objective(*half).item(),
                objective(*(h.float() for h in half)).item(),
            )
    return found


def under_autocast():
    """How far loss and gradients of a call under autocast are from those without it;
    streamed, also backward in it.
    """
    found, sides = {}, pairs(6, 8, seed=dist.get_rank(), dtype=torch.float32)
    for name, backend, inside in itertools.product(
        OBJECTIVES, ("reference", "streamed"), (False, True)
    ):
        results = []
        for lowered in (False, True):
            objective, rows = (
                learnable(name, backend, gather=True),
                [side.clone().requires_grad_() for side in sides],
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                loss = objective(*rows)
                if inside and backend == "streamed":
                    loss.backward()
            if not (inside and backend == "streamed"):
                loss.backward()
            results.append(
                torch.cat(
                    [t.grad.flatten() for t in (*rows, *objective.parameters())]
                    + [loss[None]]
                )
            )
        found[f"{name} {backend} {inside}"] = float(
            (results[0] - results[1]).abs().max()
        )
    return found


def faults():
    """What each rank raises when the last one alone makes a mistake; the loss in
    between shows all are in step.
    """
    last, (x, y) = (
        dist.get_rank() == dist.get_world_size() - 1,
        pairs(4, 3, seed=dist.get_rank(), dtype=torch.float32),
    )
    nan = x.clone()
    nan[2, 0] = math.nan
    mistakes = {
        "NaN row": ((nan, y), {}),
        "not a tensor": ((None, y), {}),
        "no rows": ((x[:0], y[:0]), {}),
        "other scale": ((x, y), {"logit_scale": 31.0}),
        "other contrast": ((x, y), {}),
    }
    raised = {}
    for backend, (name, (arguments, options)) in itertools.product(
        ("reference", "streamed"), mistakes.items()
    ):
        objective = ContrastiveObjective(gather=True, backend=backend)
        other = ContrastiveObjective(gather=True, backend=backend, contrast="infonce")
        try:
            if last:
                (other if name == "other contrast" else objective)(
                    *arguments, **options
                )
            else:
                objective(x, y)
            raised[name] = ("nothing", "")
        except Exception as error:
            raised[name] = (type(error).__name__, str(error))
        assert objective(x, y).isfinite()
    world = dist.get_world_size()
    if world > 1:
        shares = torch.full((4, 4 * world), 1 / (4 * world))
        narrow = shares[:, 1:] * (4 * world) / (4 * world - 1)
        assert objective(x, y, targets=shares).isfinite()
        message = f"targets of rank {world - 1} have {4 * world - 1} columns"
        raises(ValueError, message, objective, x, y, targets=narrow if last else shares)
        raises(
            ValueError,
            "ranks differ in weights",
            objective,
            x,
            y,
            weights=torch.ones(4) if last else None,
        )
        alone = ContrastiveObjective()
        with pytest.warns(UserWarning, match="gather is False: each of the"):
            alone(x, y)
        alone(x, y)
        same = ContrastiveObjective(gather=True)
        with pytest.warns(UserWarning, match="leave no anchor any negative"):
            same(x, y, ids=torch.zeros(4, dtype=torch.long))
    drifted = make_objective("siglip", gather=True, bias=0.0)
    drifted.bias.data += 1e-6 * last
    assert drifted(x, y).isfinite()
    # ids of another integer type are the same ids.
    ids = torch.arange(4)
    narrow = ids.to(torch.int16) if last else ids
    assert objective(x, y, ids=narrow) == objective(x, y, ids=ids)
    if dist.get_world_size() == 1:
        raises(ValueError, "at least 2 of them", objective, x[:1], y[:1])
    else:
        leaf = x.clone().requires_grad_()
        reference = ContrastiveObjective(gather=True, backend="reference")
        with pytest.raises(
            RuntimeError,
            match="can be differentiated once; gather=False has more derivatives",
        ):
            torch.autograd.grad(reference(leaf, y), leaf, create_graph=True)
        raises(
            RuntimeError,
            r"goes through no torch\.func .* gather=False does",
            torch.func.grad(objective),
            x,
            y,
        )
    return raised


def primitives():
    """What the losses do not show: ids keep all their bits, and ranks agree or fail
    together.
    """
    rank, world = distributed.rank(), distributed.world_size()
    layout = Layout(tuple(range(1, world + 1)))
    numbers = distributed.gather_rows(torch.arange(rank + 1) + (1 << 40), layout)
    assert numbers.tolist() == [
        (1 << 40) + k for r in range(world) for k in range(r + 1)
    ]
    assert distributed.agree({"a": rank, "b": 7}, None, torch.device("cpu")) == {
        "a": tuple(range(world)),
        "b": (7,) * world,
    }

    class Local(Exception):
        """No other rank can make one."""

    for fault in (
        Local("of its own"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "of its own"),
    ):
        with pytest.raises(RuntimeError, match=f"^rank {world - 1}: .*of its own"):
            distributed.agree(
                {}, fault if rank == world - 1 else None, torch.device("cpu")
            )

    def fails():
        raise Local("of its own")

    raises(
        RuntimeError if rank else Local, r"^of its own", distributed.on_rank_zero, fails
    )
    everywhere = distributed.gather_objects({"rank": torch.full((3,), rank)})
    assert [value["rank"].tolist() for value in everywhere] == [
        [r] * 3 for r in range(world)
    ]


def compiled():
    """How far the loss and the gradients of a compiled module that gathers are from the
    same module's, eagerly.
    """
    images, texts, ids = (
        t[Layout((3,) * dist.get_world_size()).local]
        for t in batch(3 * dist.get_world_size())
    )
    found = {}
    for backend in ("reference", "streamed"):
        eager, traced = (
            Towers(learnable("cloob", backend, gather=True)) for _ in range(2)
        )
        compiled_module, gaps = torch.compile(traced, backend="eager"), []
        for _ in range(2):  # the second time with other scales
            losses = [module(images, texts, ids) for module in (eager, compiled_module)]
            gaps.append(abs(losses[0].item() - losses[1].item()))
            for module, loss in zip((eager, traced), losses, strict=True):
                loss.backward()
                with torch.no_grad():
                    module.objective.log_inv_tau += 0.1
                    module.objective.log_beta += 0.1
            for one, other in zip(eager.parameters(), traced.parameters(), strict=True):
                gaps.append(float((one.grad - other.grad).abs().max()))
        found[backend] = max(gaps)
    return found


def worker(rank, world, folder):
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group(
        "gloo",
        f"file://{path}/store",
        timedelta(seconds=SECONDS),
        rank=rank,
        world_size=world,
    )
    try:
        primitives()
        sizes = SIZES[world]
        found = {
            "steps": steps(lambda split: Layout(sizes[split]).local, sizes, gather=True)
        }
        found |= {
            "flops": flops_and_values(),
            "faults": faults(),
            "autocast": under_autocast(),
        }
        found["compiled"] = compiled() if world == COMPILED else {}
        torch.save(found, path / f"rank-{rank}.pt")
    except BaseException:
        (path / f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.nightly), 2, 3],
    ids=["1-ranks", "2-ranks", "3-ranks"],
)
def ranks(request, tmp_path_factory):
    """What each rank of a run found."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{world}")
    context = mp.start_processes(
        worker,
        (world, str(folder)),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    try:
        end = time.monotonic() + 2 * SECONDS
        while not context.join(timeout=1):
            if time.monotonic() > end:
                pytest.fail("the ranks hang")
    except mp.ProcessExitedException as error:
        pytest.fail(str(error))
    except mp.ProcessRaisedException:
        pytest.fail(
            "\n".join(p.read_text() for p in sorted(folder.glob("rank-*.txt"))),
            pytrace=False,
        )
    finally:
        for process in context.processes:
            process.kill()
    return [
        torch.load(folder / f"rank-{rank}.pt", weights_only=False)
        for rank in range(world)
    ]


def test_loss_and_sgd_steps_are_those_of_one_process(ranks):
    whole = steps(lambda split: slice(None), SIZES[len(ranks)], gather=False)
    assert whole.keys() == ranks[0]["steps"].keys()
    for case, expected in whole.items():
        untouched = Towers(
            learnable(case[0], "reference", False) if case[0] != "outside" else None
        ).named_parameters()
        for name, before in untouched:
            assert not torch.equal(before, expected["parameters"][name]), (
                f"{case}: {name} does not move"
            )
        # Of SigLIP the scale's gradient sums over all N² pairs, of which most cancel.
        close = 1e-4 if case[0].startswith("siglip") else 1e-5
        for rank, found in enumerate(ranks):
            got = found["steps"][case]
            assert got["losses"] == pytest.approx(
                expected["losses"], rel=1e-5, abs=1e-6
            ), (case, rank)
            for name, value in expected["parameters"].items():
                where = f"{case}, rank {rank}: {name}"
                torch.testing.assert_close(
                    got["parameters"][name], value, rtol=close, atol=close, msg=where
                )


def test_the_arithmetic_of_a_rank_falls_with_their_number(ranks):
    n, d, world = 24, 8, len(ranks)
    x, y = pairs(n, d, dtype=torch.float32)
    expected, plain = (
        ContrastiveObjective(hopfield=hopfield)(x, y).item()
        for hopfield in (True, False)
    )
    for found in (rank["flops"] for rank in ranks):
        # Four retrievals of 2 + 4 products and two contrasts of 1 + 2; streamed
        # retrievals compute one of theirs again, but a rank by itself shares what they
        # share (here all of a batch is one tile).
        assert found["reference"] * world == 2 * (4 * 6 + 2 * 3) * n * n * d
        assert (
            found["streamed"] * world
            == (2 * (4 * 7 + 2 * 3) if world > 1 else 60) * n * n * d
        )
        for backend in ("reference", "streamed"):
            assert found[f"{backend} value"] == pytest.approx(expected, rel=1e-5)
            assert found[f"{backend} plain"] == pytest.approx(plain, rel=1e-5)
            low, lifted = found[f"{backend} bfloat16"]
            assert low == lifted


def test_autocast_and_torch_compile_around_it_change_nothing(ranks):
    for found in ranks:
        assert found["autocast"] == dict.fromkeys(found["autocast"], 0.0)
        assert max(found["compiled"].values(), default=0.0) < 1e-6


def test_a_mistake_on_one_rank_is_raised_on_all(ranks):
    last = len(ranks) - 1
    for mistake, error, message in (
        (
            "NaN row",
            "NonFiniteFeaturesError",
            "image_features: 1 of 4 rows are bad; row 2 is not finite",
        ),
        ("not a tensor", "TypeError", "image_features is a NoneType"),
        (
            "no rows",
            "ValueError",
            "0 image_features and 0 text_features: pairs are expected, at least 1",
        ),
        ("other scale", "ValueError", "ranks differ in inv_tau: rank 0 has 30.0"),
        (
            "other contrast",
            "ValueError",
            "ranks differ in contrast: rank 0 has infoloob",
        ),
    ):
        differs = "ranks differ" in message
        for kind, text in (found["faults"][mistake] for found in ranks):
            if last == 0:  # its messages are tested with the objective
                assert kind == ("nothing" if differs else error), (kind, text)
            else:
                assert (
                    kind,
                    text.startswith(message if differs else f"rank {last}: {message}"),
                ) == (error, True), text


@pytest.mark.parametrize("rank", [None, "first"])
def test_a_world_that_torchrun_has_not_set_up_is_said(rank, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with (
        pytest.raises(
            InputError,
            match=r"^WORLD_SIZE is set, but not by torchrun \(.*\); start by torchrun",
        ),
        distributed.process_group(torch.device("cpu")),
    ):
        pass
