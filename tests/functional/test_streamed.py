"""The streamed path beside the reference: how exact it is, its memory and arithmetic,
and what it refuses.

That both compute the formula: ``test_matrix.py``.
"""

import itertools
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cloob.functional import cloob_reference
from cloob.functional.streamed import both, cloob_streamed, tiles
from paper_loops import (
    MEMBER_IDS,
    MEMBERS,
    count_flops,
    joint,
    normalised,
    pairs,
    relative_error,
    unit,
    value_and_gradients,
)

TILE = 6
STRIP = 8
each_member = pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS, ids=MEMBER_IDS)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", TILE)
    monkeypatch.setitem(tiles.STRIP, "cpu", STRIP)


def scalars(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def member(contrast, hopfield):
    scale = "unit" if contrast == "sigmoid" else "paper"
    return {"contrast": contrast, "hopfield": hopfield, "scale": scale}


def in_float32(inputs):
    return [t.float() for t in inputs]


def errors(found, expected):
    """That of the value, and those of the gradients."""
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


def of_reference(inputs, **options):
    return value_and_gradients(cloob_reference, *inputs, **options)


def of_streamed(inputs, **options):
    return value_and_gradients(cloob_streamed, *inputs, **options)


def error_of_gradient(found, expected):
    """That of all gradients as one vector."""
    return relative_error(joint(found[1:]), joint(expected[1:]))


def assert_as_exact(*inputs, **options):
    """In float64 value and gradient equal the reference's to 1e-10; in float32 to 1e-5.

    Where float32 itself does not hold that (large β·s, a value near zero), about as
    well as the float32 reference.
    """
    single = in_float32(inputs)
    exact = of_reference(inputs, **options)
    double = of_streamed(inputs, **options)
    plain = of_reference(single, **options)
    ours = of_streamed(single, **options)
    assert relative_error(double[0], exact[0]) < 1e-10, options
    assert error_of_gradient(double, exact) < 1e-10, options
    bound = max(1e-5, 4 * relative_error(plain[0], exact[0]))
    assert relative_error(ours[0], exact[0]) < bound, options
    bound = max(1e-5, 4 * error_of_gradient(plain, exact))
    assert error_of_gradient(ours, exact) < bound, options


@pytest.mark.usefixtures("small_tiles")
@each_member
def test_float32_is_as_exact_as_the_reference(contrast, hopfield):
    """With unshifted sums, and with a running maximum."""
    for n, beta in ((TILE, 8.0), (3 * TILE + 5, 8.0), (4 * STRIP, 70.0)):
        inputs = (*pairs(n, 16, seed=n), *scalars(10.0, beta))
        ids = torch.arange(n) // 2 * 7 % 10
        assert_as_exact(*inputs, ids=ids, **member(contrast, hopfield))


def test_tiles_of_the_real_size():
    with pytest.raises(ValueError, match="matmul is torch"):
        cloob_streamed(*pairs(4, 3), 30.0, matmul=torch.float16)
    n = 2 * tiles.TILE["cpu"] + 3
    assert n > tiles.STRIP["cpu"]
    assert_as_exact(*pairs(n, 32), *scalars(30.0, 8.0))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("length", "beta"), [(2.0, 14.9), (2.0, 15.1), (0.01, 3000.0)])
def test_rows_of_any_length_on_both_branches(length, beta):
    x, y = (length * side for side in pairs(20, 16))
    assert_as_exact(x, y, *scalars(10.0, beta))


@pytest.mark.usefixtures("small_tiles")
def test_unshifted_sums_at_their_limit_in_float32():
    x = torch.cat([unit(10, 8), -unit(10, 8)])  # exp(±60): antipodal and equal rows
    inputs = [x, x.roll(3, 0), *scalars(10.0, 60.0)]
    ours = of_streamed(in_float32(inputs))
    exact = of_reference(inputs)
    for got, expected in zip(ours, exact, strict=True):
        assert got.isfinite().all()
        difference = got.double() - expected
        assert difference.norm() < 1e-4 * (1 + expected.norm())


@each_member
def test_bfloat16_products_keep_the_gradient_to_a_hundredth(contrast, hopfield):
    inputs = [*pairs(384, 256), *scalars(30.0, 8.0)]
    options = member(contrast, hopfield)
    exact = of_reference(inputs, **options)
    low = of_streamed(in_float32(inputs), matmul=torch.bfloat16, **options)
    assert {t.dtype for t in low} == {torch.float32}
    found = errors(low, exact)
    assert max(found) <= 1e-2, found
    # it did multiply in bfloat16
    assert found[1] > (1e-7 if contrast == "sigmoid" else 1e-4)


@pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS)
def test_close_embeddings_stay_accurate(contrast, hopfield):
    # Rows in a narrow cone, as early in training: all logits are near τ⁻¹, and bfloat16
    # alone would round them to 1/8; what retrieval then averages is closer still.
    cone = unit(1, 256, 9)
    x, y = (normalised(4.0 * cone + side) for side in pairs(256, 256))
    options = member(contrast, hopfield)
    inputs = [x, y, *scalars(30.0, 8.0)]
    single = in_float32(inputs)
    exact = of_reference(inputs, **options)

    def error_of_a_side(found):
        _, of_x, of_y, *_ = errors(found, exact)
        return max(of_x, of_y)

    ours = of_streamed(single, **options)
    formula = error_of_a_side(of_reference(single, **options))  # up to 2e-3
    assert error_of_a_side(ours) <= max(1e-4, formula / 8)
    low = of_streamed(single, matmul=torch.bfloat16, **options)
    assert error_of_a_side(low) <= 4e-2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("beta", "bound"), [(4.0, 2e-2), (80.0, 0.2)])
def test_scales_have_their_gradient_in_bfloat16(beta, bound):
    # β = 80 takes the branch with the running maximum, and makes 80 times the rounding
    # of s.
    shared = 0.5 * unit(1, 16, 5)
    sides = [normalised(side + shared) for side in pairs(40, 16)]
    inputs = [*sides, *scalars(10.0, beta)]
    low = of_streamed(in_float32(inputs), matmul=torch.bfloat16)
    assert max(errors(low, of_reference(inputs))) <= bound


def test_gradients_of_some_inputs_only():
    inputs = [*pairs(7, 5), *scalars(10.0, 8.0)]
    _, *gradients = of_reference(inputs)
    every = itertools.product([True, False], repeat=4)
    for trainable in every:
        leaves = [t.clone() for t in inputs]
        for leaf, needed in zip(leaves, trainable, strict=True):
            leaf.requires_grad_(needed)
        if any(trainable):
            cloob_streamed(*leaves).backward()
        for leaf, expected in zip(leaves, gradients, strict=True):
            if leaf.requires_grad:
                assert relative_error(leaf.grad, expected) < 1e-10, trainable
            else:
                assert leaf.grad is None, trainable


@each_member
def test_one_graph_goes_backward_more_than_once_but_not_to_second_derivatives(
    contrast, hopfield
):
    x, y = (side.requires_grad_() for side in pairs(7, 5))
    options = member(contrast, hopfield)
    loss = cloob_streamed(x, y, 10.0, **options)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    said = "can be differentiated once; backend='reference'"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(loss, x, create_graph=True)
    minus_two = torch.tensor(-2.0, dtype=torch.float64)
    second = torch.autograd.grad(loss, (x, y), grad_outputs=minus_two)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(-2 * a, b)
    with torch.no_grad():
        value = cloob_streamed(x, y, 10.0, **options)
    assert value == loss
    assert not value.requires_grad


@pytest.mark.parametrize("contrast", ["infoloob", "infonce"])
@pytest.mark.parametrize("cone", [0.0, 4.0])
def test_one_product_for_both_directions_is_exact_to_a_millionth(contrast, cone):
    """Value, gradient and that of a learned τ⁻¹, also where nearly all rows are alike
    and where InfoNCE has saturated.
    """
    shared = cone * unit(1, 128, 9)
    for noise in (2.0, 0.5):
        sides = pairs(300, 128, noise=noise)
        single = [normalised(side + shared).float() for side in sides]
        single += in_float32(scalars(30.0))
        options = {"contrast": contrast, "hopfield": False, "scale": "unit"}
        exact = of_reference([t.double() for t in single], **options)
        found = errors(of_streamed(single, **options), exact)
        # A saturated InfoNCE is as small as exp(−20): the rounding of logits of 25.
        saturated = contrast == "infonce" and noise < 1 and not cone
        assert max(found) <= (4e-6 if saturated else 1e-6), (noise, found)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("contrast", ["infoloob", "infonce"])
def test_logits_that_are_not_kept_are_multiplied_again(contrast, monkeypatch):
    monkeypatch.setattr(both, "MAX_KEPT", STRIP)
    n = 3 * STRIP + 1
    d = 8
    x, y = (side.requires_grad_() for side in pairs(n, d))
    options = {"contrast": contrast, "hopfield": False}
    ids = torch.arange(n) // 2
    for more in ({}, {"ids": ids}, {"ids": ids, "exclude_above": -0.1}):
        loss = cloob_streamed(x, y, 30.0, **options, **more)
        assert count_flops(loss.backward) == 0
        assert_as_exact(x, y, *scalars(30.0, 8.0), **options, **more)
    alive = []
    for times in (1, 2, 4):
        x, y = (side.requires_grad_() for side in pairs(times * n, d))
        step = partial(cloob_streamed, x, y, 30.0, **options)
        flops = count_flops(lambda step=step: step().backward())
        assert flops == 8 * (times * n) ** 2 * d
        live = _Live()
        with live:
            step().backward()
        alive.append(live.most)
    once, two_times, four_times = alive  # the batch
    assert four_times < 2.1 * two_times
    assert two_times < 2.1 * once


class _Largest(TorchDispatchMode):
    """The most numbers that any one tensor has which an operation creates."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


class _Live(TorchDispatchMode):
    """The most numbers that were alive at once in what operations created."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value.untyped_storage(), value.element_size())
        return result

    def count(self, storage, size):
        place = storage._cdata
        if place in self.seen:
            return
        self.seen.add(place)
        numbers = storage.nbytes() // size
        self.now += numbers
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, place, numbers)

    def forget(self, place, numbers):
        self.seen.discard(place)
        self.now -= numbers


def _saved_and_largest(path, n, d, **options):
    """Numbers kept for the backward pass (no storage counted twice), and in the largest
    tensor of the whole step.
    """
    x, y = (side.requires_grad_() for side in pairs(n, d))
    kept = {}  # alive, so that no address is used again

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    ids = torch.arange(n) // 2
    with _Largest() as largest, hooks:
        loss = path(x, y, 30.0, 8.0, ids=ids, **options)
        loss.backward()
    saved = sum(numbers for numbers, _ in kept.values())
    return saved, largest.numbers


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("contrast", "hopfield"),
    [("infoloob", True), ("infonce", False), ("sigmoid", False)],
)
def test_memory_is_linear_in_the_batch(contrast, hopfield):
    d = 4
    options = member(contrast, hopfield)
    n = 12 * d
    saved, largest = _saved_and_largest(cloob_streamed, n, d, **options)
    # Kept: X, Y, four retrievals with their norms, two gradients of either contrast;
    # made: no more than a strip.
    expected = (10 if hopfield else 4) * n * d + 4 * n + 16
    assert saved <= expected
    four_retrievals = 4 if hopfield else 1  # are one tensor
    assert largest == max(STRIP * n, four_retrievals * n * d)
    twice, _ = _saved_and_largest(cloob_streamed, 2 * n, d, **options)
    assert twice <= 2 * saved
    # The same probes on the reference do see its matrices.
    saved, largest = _saved_and_largest(cloob_reference, n, d, **options)
    assert largest == n * n
    assert saved > 2 * n * n


def flops_of(path, n, d, **options):
    """Those of value and gradient of n pairs."""
    x, y = (side.requires_grad_() for side in pairs(n, d))

    def step():
        path(x, y, 30.0, **options).backward()

    return count_flops(step)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("path", [cloob_reference, cloob_streamed])
@pytest.mark.parametrize("contrast", ["infoloob", "infonce", "sigmoid"])
def test_arithmetic_without_retrieval(path, contrast):
    """One product of logits serves both directions: 6 N²D."""
    options = {"contrast": contrast, "hopfield": False, "scale": "unit"}
    n = 2 * TILE
    d = 8
    assert flops_of(path, n, d, **options) == 6 * n * n * d


@pytest.mark.parametrize("beta", [8.0, 58.0])
def test_few_pairs_keep_their_digits_at_large_beta(beta):
    inputs = [*pairs(64, 128), *scalars(30.0, beta)]
    _, *exact = of_reference(inputs)
    _, *ours = of_streamed(in_float32(inputs))
    assert relative_error(joint(ours[:2]), joint(exact[:2])) < 3e-6
