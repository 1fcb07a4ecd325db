"""The streamed path equals the reference, in linear memory and with the arithmetic that its docstring states."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cloob import functional
from cloob.functional import cloob_reference, streamed
from cloob.functional.streamed import cloob_streamed, tiles
from paper_loops import MEMBER_IDS, MEMBERS, count_flops, joint, pairs, relative_error, unit, value_and_gradients

TILE, STRIP = 6, 8
each_member = pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS, ids=MEMBER_IDS)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "tile_rows", lambda device: TILE)
    monkeypatch.setattr(tiles, "strip_rows", lambda device: STRIP)


def assert_equal_paths(
    reference: Callable[..., Tensor], fast: Callable[..., Tensor], *inputs: Tensor, **options: Any
) -> None:
    """In float64 the value and each gradient to 1e-10; in float32 value and gradient to 1e-5 of the float64 reference.

    Where float32 itself does not hold that (large β·s, a value near zero), about as well as the float32 reference.
    """
    exact, ours = (value_and_gradients(path, *inputs, **options) for path in (reference, fast))
    assert relative_error(ours[0], exact[0]) < 1e-10
    floor = 1e-3 * joint(exact[1:]).norm()  # a part may cancel to zero
    for k, (got, expected) in enumerate(zip(ours[1:], exact[1:], strict=True)):
        assert (got - expected).norm() < 1e-10 * max(expected.norm(), floor), f"gradient {k}, {options}"
    single = [t.float() for t in inputs]
    plain, ours = (value_and_gradients(path, *single, **options) for path in (reference, fast))
    for what, of in (("value", lambda outputs: outputs[0]), ("gradient", lambda outputs: joint(outputs[1:]))):
        bound = max(1e-5, 4 * relative_error(of(plain), of(exact)))
        assert relative_error(of(ours), of(exact)) < bound, f"{what}, {options}"


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@pytest.mark.usefixtures("small_tiles")
@each_member
@pytest.mark.parametrize("n", [3, TILE, TILE + 1, 2 * TILE, 3 * TILE + 5, 4 * STRIP])
@pytest.mark.parametrize("scale", ["paper", "unit"])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_equals_the_reference(contrast: str, hopfield: bool, n: int, scale: str, ids: bool) -> None:
    own = torch.arange(n) // 2 * 7 % 10 if ids else None
    for beta in (8.0, 70.0):  # unshifted sums, running maximum
        options = {"contrast": contrast, "hopfield": hopfield, "scale": scale, "ids": own}
        assert_equal_paths(cloob_reference, cloob_streamed, *pairs(n, 16, seed=n), *scalars(10.0, beta), **options)


def test_equals_the_reference_with_tiles_of_the_real_size() -> None:
    n = 2 * tiles.tile_rows(torch.device("cpu")) + 3
    assert n > tiles.strip_rows(torch.device("cpu"))
    assert_equal_paths(cloob_reference, cloob_streamed, *pairs(n, 32), *scalars(30.0, 8.0))


@pytest.mark.usefixtures("small_tiles")
@given(n=st.integers(4, 30), tile=st.integers(1, 12), strip=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_any_tile_will_do(n: int, tile: int, strip: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "tile_rows", lambda device: tile)
        patch.setattr(tiles, "strip_rows", lambda device: strip)
        inputs = (*pairs(n, 8, seed=seed), *scalars(5.0, 4.0))
        ours, exact = (value_and_gradients(path, *inputs) for path in (cloob_streamed, cloob_reference))
    for got, expected in zip(ours, exact, strict=True):
        assert relative_error(got, expected) < 1e-10


@pytest.mark.usefixtures("small_tiles")
@each_member
def test_rows_that_are_not_contiguous(contrast: str, hopfield: bool) -> None:
    wide = torch.cat(pairs(20, 16), dim=1)
    tall = wide.T.contiguous().T

    def of(path: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            return path(x[::2, :16], y[1::2, 16:], 10.0, 8.0, contrast=contrast, hopfield=hopfield)

        return loss

    assert_equal_paths(of(cloob_reference), of(cloob_streamed), wide, tall)
    # Incoming gradients that are expanded views, as sum() makes them.
    ours, exact = (
        value_and_gradients(lambda x, p=path: p.hopfield_retrieval(x, x, 8.0).sum(), wide)
        for path in (streamed, functional)
    )
    assert relative_error(ours[1], exact[1]) < 1e-10


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("beta", [8.0, 500.0])
@pytest.mark.parametrize(("n", "m"), [(5, 20), (20, 5), (TILE, 3 * TILE)])
def test_retrieval_from_another_memory(n: int, m: int, beta: float) -> None:
    weights = unit(n, 8, 5)

    def of(path: Any) -> Callable[..., Tensor]:
        return lambda state, stored, beta: (path.hopfield_retrieval(state, stored, beta) * weights).sum()

    state = 0.3 * unit(n, 8, 0) + unit(m, 8, 1)[torch.arange(n) % m]
    assert_equal_paths(of(functional), of(streamed), state, unit(m, 8, 1), *scalars(beta / 100 if beta > 60 else beta))
    inputs = (state, unit(m, 8, 1), *scalars(beta))
    ours, exact = (value_and_gradients(of(path), *inputs) for path in (streamed, functional))
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["info_loob", "info_nce"])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_local_anchors_among_global_candidates(name: str, ids: bool) -> None:
    n, m = 11, 27
    x, y = pairs(m, 12)
    all_ids = torch.arange(m) % 5
    for offset in (0, 9, m - n):
        own = slice(offset, offset + n)
        given_ids = {"ids": all_ids[own], "candidate_ids": all_ids} if ids else {}
        options = {"positive_offset": offset, **given_ids}
        reference, fast = getattr(functional, name), getattr(streamed, name)
        assert_equal_paths(reference, fast, x[own], y, *scalars(20.0), **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("length", "beta"), [(2.0, 14.9), (2.0, 15.1), (6.0, 8.0), (1.0, 60.1), (0.01, 3000.0)])
def test_rows_of_any_length_on_both_branches(length: float, beta: float) -> None:
    x, y = pairs(20, 16)
    both = [length * x, length * y]
    single = [t.float() for t in both]
    safe = streamed.sums.unshifted_is_safe(*single, torch.tensor(beta), torch.float32)
    assert safe == (beta * length**2 <= 60.0)
    assert_equal_paths(cloob_reference, cloob_streamed, *both, *scalars(10.0, beta))


@pytest.mark.usefixtures("small_tiles")
def test_unshifted_sums_at_their_limit_in_float32() -> None:
    # exp(±60) side by side: antipodal and equal rows.
    x = torch.cat([unit(10, 8), -unit(10, 8)])
    x, y = x, x.roll(3, 0)
    ours = value_and_gradients(cloob_streamed, x.float(), y.float(), *scalars(10.0, 60.0))
    exact = value_and_gradients(cloob_reference, x, y, *scalars(10.0, 60.0))
    for got, expected in zip(ours, exact, strict=True):
        assert got.isfinite().all()
        assert (got.double() - expected).norm() < 1e-4 * (1 + expected.norm())


@each_member
def test_bfloat16_products_keep_the_gradient_to_a_hundredth(contrast: str, hopfield: bool) -> None:
    x, y = pairs(384, 256, noise=2.0)
    options = {"contrast": contrast, "hopfield": hopfield}
    exact = value_and_gradients(cloob_reference, x, y, *scalars(30.0, 8.0), **options)
    single = [t.float() for t in (x, y, *scalars(30.0, 8.0))]
    low = value_and_gradients(cloob_streamed, *single, matmul=torch.bfloat16, **options)
    assert all(t.dtype == torch.float32 for t in low)
    errors = [relative_error(got, expected) for got, expected in zip(low, exact, strict=True)]
    assert max(errors) <= 1e-2, errors
    assert errors[1] > 1e-4  # it did multiply in bfloat16


@each_member
@pytest.mark.parametrize("width", [2.0, 4.0])
def test_close_embeddings_stay_accurate(contrast: str, hopfield: bool, width: float) -> None:
    # Rows in a narrow cone, as early in training: all logits are near τ⁻¹, and bfloat16 alone would round them to 1/8;
    # what retrieval then averages is closer still.
    cone = unit(1, 256, 9)
    x, y = (width * cone + side for side in pairs(256, 256))
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (x, y))
    options = {"contrast": contrast, "hopfield": hopfield}
    given = [x, y, *scalars(30.0, 8.0)]
    _, *exact = value_and_gradients(cloob_reference, *given, **options)
    single = [t.float() for t in given]
    _, *plain = value_and_gradients(cloob_reference, *single, **options)
    formula = max(map(relative_error, plain[:2], exact[:2]))  # in float32: up to 2e-3
    for matmul, bound in ((None, max(1e-4, formula / 8)), (torch.bfloat16, 4e-2)):
        _, *low = value_and_gradients(cloob_streamed, *single, matmul=matmul, **options)
        assert max(map(relative_error, low[:2], exact[:2])) <= bound, matmul


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("beta", "bound"), [(4.0, 2e-2), (80.0, 0.2)])
def test_scales_have_their_gradient_in_bfloat16(beta: float, bound: float) -> None:
    # β = 80 takes the branch with the running maximum, and makes 80 times the rounding of s.
    x, y = (side + 0.5 * unit(1, 16, 5) for side in pairs(40, 16))
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (x, y))
    exact = value_and_gradients(cloob_reference, x, y, *scalars(10.0, beta))
    single = [t.float() for t in (x, y, *scalars(10.0, beta))]
    low = value_and_gradients(cloob_streamed, *single, matmul=torch.bfloat16)
    assert max(map(relative_error, low, exact)) <= bound


@pytest.mark.parametrize("beta", [50.0, 100.0, 200.0, 500.0])
def test_a_sharp_retrieval_of_float64_rows_stays_in_the_range_of_bfloat16(beta: float) -> None:
    x, y = pairs(40, 16)
    exact = value_and_gradients(cloob_reference, x, y, *scalars(10.0, beta))
    low = value_and_gradients(cloob_streamed, x, y, *scalars(10.0, beta), matmul=torch.bfloat16)
    assert all(t.isfinite().all() for t in low)
    assert relative_error(low[0], exact[0]) <= 0.2


@pytest.mark.parametrize("matmul", [torch.float16, torch.int8])
def test_other_matmul_dtypes_are_refused(matmul: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"matmul is {matmul}; torch.bfloat16 or None is expected"):
        cloob_streamed(*pairs(4, 3), 30.0, matmul=matmul)


@each_member
def test_no_grad_gives_the_same_value_and_no_graph(contrast: str, hopfield: bool) -> None:
    x, y = (side.requires_grad_() for side in pairs(7, 5))
    options = {"contrast": contrast, "hopfield": hopfield}
    with torch.no_grad():
        value = cloob_streamed(x, y, 30.0, **options)
    assert not value.requires_grad
    assert value == cloob_streamed(x, y, 30.0, **options)


@pytest.mark.parametrize("trainable", list(itertools.product([True, False], repeat=4))[:-1])
def test_gradients_of_some_inputs_only(trainable: tuple[bool, ...]) -> None:
    inputs = [*pairs(7, 5), *scalars(10.0, 8.0)]
    found = []
    for path in (cloob_reference, cloob_streamed):
        leaves = [t.clone().requires_grad_(needed) for t, needed in zip(inputs, trainable, strict=True)]
        path(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, expected, needed in zip(*reversed(found), trainable, strict=True):
        assert (ours is not None) == needed
        if needed:
            assert relative_error(ours, expected) < 1e-10


@each_member
def test_backward_twice_over_one_graph(contrast: str, hopfield: bool) -> None:
    x, y = (side.requires_grad_() for side in pairs(7, 5))
    loss = cloob_streamed(x, y, 10.0, contrast=contrast, hopfield=hopfield)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), grad_outputs=torch.tensor(-2.0, dtype=torch.float64))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(-2 * a, b)


@each_member
def test_the_second_derivative_is_refused(contrast: str, hopfield: bool) -> None:
    x, y = (side.requires_grad_() for side in pairs(5, 4))
    loss = cloob_streamed(x, y, 30.0, contrast=contrast, hopfield=hopfield)
    with pytest.raises(RuntimeError, match="can be differentiated once; backend='reference'"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(streamed.hopfield_retrieval(x, y, 8.0).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(cloob_reference(x, y, 30.0), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].any()


def test_backward_inside_autocast_is_without_effect() -> None:
    inputs = [t.float() for t in (*pairs(20, 16), *scalars(30.0, 8.0))]
    plain = value_and_gradients(cloob_streamed, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(cloob_streamed, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


class _Largest(TorchDispatchMode):
    """The most numbers that any one tensor has which an operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def _saved_and_largest(path: Callable[..., Tensor], n: int, d: int, **options: Any) -> tuple[int, int]:
    """Numbers kept for the backward pass (no storage counted twice), and in the largest tensor of the whole step."""
    x, y = (side.requires_grad_() for side in pairs(n, d))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    alive = []  # so that no address is used again
    with (
        _Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: (alive.append(t), pack(t))[1], lambda t: t),
    ):
        path(x, y, 30.0, 8.0, ids=torch.arange(n) // 2, **options).backward()
    return sum(kept.values()), largest.numbers


@pytest.mark.usefixtures("small_tiles")
@each_member
def test_memory_is_linear_in_the_batch(contrast: str, hopfield: bool) -> None:
    d, options = 4, {"contrast": contrast, "hopfield": hopfield}
    n = 20 * d
    saved, largest = _saved_and_largest(cloob_streamed, n, d, **options)
    # Kept: X, Y, four retrievals with their norms, two gradients of either contrast; made: no more than a strip.
    assert saved <= (10 if hopfield else 4) * n * d + 4 * n + 16
    assert largest == max(STRIP * n, n * d)
    twice, _ = _saved_and_largest(cloob_streamed, 2 * n, d, **options)
    assert twice <= 2 * saved
    # The same probes on the reference do see its matrices.
    saved, largest = _saved_and_largest(cloob_reference, n, d, **options)
    assert largest == n * n and saved > 2 * n * n


@pytest.mark.usefixtures("small_tiles")
def test_arithmetic() -> None:
    """52 N²D + 8NTD (diagonal tiles of T rows are computed whole) for any whole number of tiles; 60 N²D plainly."""
    d = 8
    for blocks in (1, 2, 5):
        n = blocks * TILE
        x, y = (side.requires_grad_() for side in pairs(n, d))
        assert count_flops(lambda x=x, y=y: cloob_reference(x, y, 30.0).backward()) == 60 * n * n * d
        assert count_flops(lambda x=x, y=y: cloob_streamed(x, y, 30.0).backward()) == 52 * n * n * d + 8 * n * TILE * d
        plain = {"hopfield": False}
        assert count_flops(lambda x=x, y=y, p=plain: cloob_reference(x, y, 30.0, **p).backward()) == 12 * n * n * d
        assert count_flops(lambda x=x, y=y, p=plain: cloob_streamed(x, y, 30.0, **p).backward()) == 12 * n * n * d
        with torch.no_grad():
            # Two symmetric retrievals of 1½ products, one shared cross retrieval of three, two contrasts of one.
            assert count_flops(lambda x=x, y=y: cloob_streamed(x, y, 30.0)) == (16 * n + 2 * TILE) * n * d


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(2))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        x, y = (nn.functional.normalize(tower(t), dim=1) for tower, t in ((self.image, images), (self.text, texts)))
        return cloob_streamed(x, y, 10.0, 8.0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("small_tiles", "fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_training_step_of_a_compiled_model(backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile's CPU backend needs g++")
    images, texts = torch.randn(2, 15, 6, generator=torch.Generator().manual_seed(0))
    eager, compiled = _Towers(), _Towers()
    run = torch.compile(compiled, backend=backend)
    for towers, step in ((eager, eager), (compiled, run)):
        optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            step(images, texts).backward()
            optimizer.step()
    for got, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
