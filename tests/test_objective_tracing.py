"""torch.compile, torch.export, torch.func: the reference goes through each, the
streamed path says that it does not.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from cloob.objective import OBJECTIVES, ContrastiveObjective, make_objective
from paper_loops import pairs, relative_error, value_and_gradients
from support import raises, seeded

two_members = pytest.mark.parametrize("name", ["cloob", "siglip"])
X, Y = pairs(6, 5)
IDS = torch.tensor([0, 1, 2, 0, 3, 4])
DIRECTION = torch.randn(X.shape, generator=torch.manual_seed(1), dtype=torch.float64)
slightly = {"rtol": 1e-5, "atol": 1e-6}


def reference(name, **options):
    return make_objective(name, backend="reference", **options)


def fixed(name):
    return reference(name, learnable_inv_tau=False)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "learns", [True, pytest.param(False, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("cloob", "siglip") else pytest.mark.nightly
        )
        for name in OBJECTIVES
    ],
)
def test_a_whole_compiled_graph_equals_eager(name, learns):
    retrieves = ContrastiveObjective(**make_objective(name).config()).hopfield
    objective = reference(
        name, learnable_inv_tau=learns, learnable_beta=learns and retrieves
    )
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    for ids in (None, IDS):
        found = []
        for module in (compiled, objective):
            objective.zero_grad()
            x, y = (side.float().requires_grad_() for side in (X, Y))
            loss = module(x, y, ids=ids)
            loss.backward()
            scales = [p.grad for p in objective.parameters()]
            found.append([loss, x.grad, y.grad, *scales])
        assert_close(*found, **slightly)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_compiler")
@two_members
def test_an_exported_program_gives_the_same(name):
    objective = make_objective(name)
    program = torch.export.export(objective, (X, Y))
    assert_close(program.module()(Y, X), objective(Y, X))


@two_members
def test_vmap_over_batches_and_temperatures(name):
    x = torch.stack([X, Y])
    y = torch.stack([Y, X])
    scales = torch.tensor([5.0, 20.0])
    objective = fixed(name)
    expected = torch.stack(list(map(objective, x, y)))
    assert_close(torch.func.vmap(objective)(x, y), expected)
    chosen = make_objective(name)  # "auto" takes what goes through
    assert_close(torch.func.vmap(chosen)(x, y), expected)
    expected = torch.stack(list(map(objective, x, y, scales)))
    assert_close(torch.func.vmap(objective)(x, y, scales), expected)
    by_x = torch.func.vmap(torch.func.grad(objective))(x, y)
    expected = [
        value_and_gradients(objective, *sides)[1] for sides in zip(x, y, strict=True)
    ]
    assert_close(list(by_x), expected, **slightly)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_func_grad_and_double_backward(name):
    objective = fixed(name)
    _, *expected = value_and_gradients(objective, X, Y)
    found = torch.func.grad(objective, argnums=(0, 1))(X, Y)
    assert_close(list(found), expected)
    leaf = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(objective(leaf, Y), leaf, create_graph=True)
    (curvature,) = torch.autograd.grad((first * DIRECTION).sum(), leaf)
    step = 1e-6 * DIRECTION
    ahead = value_and_gradients(objective, X + step, Y)[1]
    behind = value_and_gradients(objective, X - step, Y)[1]
    expected = (ahead - behind) / 2e-6
    assert_close(curvature, expected, rtol=1e-5, atol=1e-7)
    # torch.func.grad has values, and they are looked at
    spoilt = X.index_fill(0, torch.tensor([2]), torch.nan)
    raises(ValueError, "row 2 is not finite", torch.func.grad(objective), spoilt, Y)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("inv_tau", [30.0, 100.0 * math.exp(0.5)])
def test_func_through_a_learned_scale(inv_tau):
    """In training mode, in which the parameter is bounded in place; inside a
    transformation nothing can be.
    """
    objective = reference("clip").double()
    objective.log_inv_tau.data.fill_(math.log(inv_tau))
    bounded = reference("clip", inv_tau=min(inv_tau, 100.0), learnable_inv_tau=False)
    before = objective.log_inv_tau.item()
    problems = (torch.stack([X, Y]), torch.stack([Y, X]))
    for transformed in (
        lambda o: torch.func.grad(o)(X, Y),
        lambda o: torch.func.hessian(o)(X, Y),
        lambda o: torch.func.jvp(lambda side: o(side, Y), (X,), (Y,))[1],
        lambda o: torch.func.vmap(torch.func.grad(o))(*problems),
    ):
        assert_close(transformed(objective), transformed(bounded))

    def by_scale(log_inv_tau):
        scales = {"log_inv_tau": log_inv_tau}
        return torch.func.functional_call(objective, scales, (X, Y))

    gradient = torch.func.grad(by_scale)(objective.log_inv_tau)
    assert objective.log_inv_tau.item() == before
    objective(X, Y).backward()
    assert_close(gradient, objective.log_inv_tau.grad)


@two_members
def test_the_streamed_path_names_the_backend_that_has_them(name):
    objective = make_objective(name, backend="streamed")
    message = r"neither torch\.func .* backend='reference' does"
    for transform in (torch.func.grad, torch.func.jacrev):
        raises(RuntimeError, message, transform(objective), X, Y)
    message = "backend='reference' does"
    raises(RuntimeError, message, torch.func.vmap(objective), X[None], Y[None])
    raises(RuntimeError, message, torch.export.export, objective, (X, Y))


# the compiler's own look at a loss
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gradient_compiled_inside_an_autocast_is_that_of_float32(backend):
    """torch.compile lays the backward pass into the autocast of the forward: in there
    it may not be.
    """
    objective = ContrastiveObjective.cloob(backend=backend)
    compiled = torch.compile(objective, backend="aot_eager")
    drawn = seeded(0)
    cone = 3 * F.normalize(torch.randn(16, generator=drawn), dim=0)
    sides = cone + torch.randn(2, 64, 16, generator=drawn) / 4
    x, y = F.normalize(sides, dim=2)
    _, *plain = value_and_gradients(objective, x, y)
    x.requires_grad_()
    y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(x, y)
    found = torch.autograd.grad(loss, (x, y))
    assert max(map(relative_error, found, plain)) < 0.02
