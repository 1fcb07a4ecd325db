"""torch.compile, torch.export, torch.func: the reference goes through each, the
streamed path says that it does not.
"""

import contextlib

import pytest
import torch

from cloob.objective import ContrastiveObjective
from paper_loops import MEMBER_IDS, MEMBERS, pairs, value_and_gradients
from support import raises

each_member = pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS, ids=MEMBER_IDS)
two_members = pytest.mark.parametrize(
    ("contrast", "hopfield"), [("infoloob", True), ("sigmoid", False)]
)
Objective = ContrastiveObjective
COMPILED_QUICKLY = [("infoloob", True, True), ("sigmoid", False, False)]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch(seed=0):
    return pairs(6, 5, seed=seed, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("contrast", "hopfield", "learnable"),
    [
        pytest.param(
            *case, marks=() if case in COMPILED_QUICKLY else pytest.mark.nightly
        )
        for case in (
            (*member, learnable) for member in MEMBERS for learnable in (False, True)
        )
    ],
)
def test_a_whole_compiled_graph_equals_eager(contrast, hopfield, learnable):
    scales = {"learnable_inv_tau": learnable, "learnable_beta": learnable and hopfield}
    objective = Objective(
        contrast=contrast, hopfield=hopfield, backend="reference", **scales
    )
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    for options in ({}, {"ids": ids}):
        got, expected = (
            value_and_gradients(module, *batch(), **options)
            for module in (compiled, objective)
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if learnable:
        found = []
        for module in (objective, compiled):
            module.zero_grad()
            module(*batch()).backward()
            found.append([p.grad.clone() for p in objective.parameters()])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_compiler")
@two_members
def test_an_exported_program_gives_the_same(contrast, hopfield):
    objective = Objective(contrast=contrast, hopfield=hopfield)
    program = torch.export.export(objective, batch())
    x, y = batch(seed=5)
    torch.testing.assert_close(program.module()(x, y), objective(x, y))


@two_members
def test_vmap_over_batches_and_temperatures(contrast, hopfield):
    objective = Objective(contrast=contrast, hopfield=hopfield, backend="reference")
    problems = [batch(seed=seed) for seed in range(3)]
    x, y = (torch.stack(side) for side in zip(*problems, strict=True))
    expected = torch.stack([objective(*problem) for problem in problems])
    for chosen in (
        objective,
        Objective(contrast=contrast, hopfield=hopfield),
    ):  # "auto" takes what goes through
        torch.testing.assert_close(torch.func.vmap(chosen)(x, y), expected)
    scales = torch.tensor([5.0, 10.0, 20.0])
    expected = torch.stack(
        [objective(*p, logit_scale=s) for p, s in zip(problems, scales, strict=True)]
    )
    torch.testing.assert_close(torch.func.vmap(objective)(x, y, scales), expected)
    per_problem = torch.func.vmap(torch.func.grad(objective))(x, y)
    for got, problem in zip(per_problem, problems, strict=True):
        torch.testing.assert_close(
            got, value_and_gradients(objective, *problem)[1], rtol=1e-5, atol=1e-6
        )


@each_member
def test_func_grad_and_double_backward(contrast, hopfield):
    objective = Objective(contrast=contrast, hopfield=hopfield, backend="reference")
    x, y = pairs(6, 5)
    both = torch.func.grad(objective, argnums=(0, 1))(x, y)
    torch.testing.assert_close(list(both), value_and_gradients(objective, x, y)[1:])
    direction = torch.randn(
        6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(objective(leaf, y), leaf, create_graph=True)
    (curvature,) = torch.autograd.grad((first * direction).sum(), leaf)
    step = 1e-6
    ahead, behind = (
        value_and_gradients(objective, x + sign * step * direction, y)[1]
        for sign in (1, -1)
    )
    torch.testing.assert_close(
        curvature, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7
    )
    with pytest.raises(
        ValueError, match="row 2 is not finite"
    ):  # torch.func.grad has values, and they are looked at
        torch.func.grad(objective)(x.index_fill(0, torch.tensor([2]), torch.nan), y)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("inv_tau", [30.0, 100.0])
def test_func_through_a_learned_scale(inv_tau):
    """In training mode, in which the parameter is bounded in place; inside a
    transformation nothing can be.
    """
    x, y = pairs(4, 3)
    objective = Objective.clip(backend="reference", inv_tau=inv_tau).double()
    fixed = Objective.clip(
        backend="reference", inv_tau=inv_tau, learnable_inv_tau=False
    )
    with torch.no_grad():
        objective.log_inv_tau.add_(0.5 if inv_tau == 100.0 else 0.0)
    before = objective.log_inv_tau.item()
    problems = (torch.stack([x, y]), torch.stack([y, x]))
    for transformed in (
        lambda o: torch.func.grad(o)(x, y),
        lambda o: torch.func.hessian(o)(x, y),
        lambda o: torch.func.jvp(lambda side: o(side, y), (x,), (y,))[1],
        lambda o: torch.func.vmap(torch.func.grad(o))(*problems),
    ):
        torch.testing.assert_close(transformed(objective), transformed(fixed))
    by_parameters = torch.func.grad(
        lambda p: torch.func.functional_call(objective, p, (x, y))
    )
    gradient = by_parameters(dict(objective.named_parameters()))["log_inv_tau"]
    assert objective.log_inv_tau.item() == before
    objective(x, y).backward()
    torch.testing.assert_close(gradient, objective.log_inv_tau.grad)


@two_members
def test_the_streamed_path_names_the_backend_that_has_them(contrast, hopfield):
    objective = Objective(contrast=contrast, hopfield=hopfield, backend="streamed")
    x, y = batch()
    for transformed in (torch.func.grad(objective), torch.func.jacrev(objective)):
        raises(
            RuntimeError,
            r"neither torch\.func .* backend='reference' does",
            transformed,
            x,
            y,
        )
    raises(
        RuntimeError,
        "backend='reference' does",
        torch.func.vmap(objective),
        x[None],
        y[None],
    )
    raises(
        RuntimeError, "backend='reference' does", torch.export.export, objective, (x, y)
    )


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # the compiler's own look at a loss
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gradient_compiled_inside_an_autocast_is_that_of_float32(
    backend, fresh_compiler
):
    """torch.compile lays the backward pass into the autocast of the forward: in there
    it may not be.
    """
    objective = ContrastiveObjective.cloob(backend=backend)
    drawn = torch.Generator().manual_seed(0)
    cone = 3 * torch.nn.functional.normalize(
        torch.randn(1, 16, generator=drawn), dim=-1
    )
    sides = [
        torch.nn.functional.normalize(
            cone + torch.randn(64, 16, generator=drawn) / 4, dim=-1
        )
        for _ in range(2)
    ]
    found = []
    for called in (objective, torch.compile(objective, backend="aot_eager")):
        x, y = (side.clone().requires_grad_() for side in sides)
        with (
            torch.autocast("cpu", torch.bfloat16)
            if called is not objective
            else contextlib.nullcontext()
        ):
            loss = called(x, y)
        loss.backward()
        found.append(torch.cat([x.grad, y.grad]))
    plain, compiled = found
    assert float((plain - compiled).norm() / plain.norm()) < 0.02
