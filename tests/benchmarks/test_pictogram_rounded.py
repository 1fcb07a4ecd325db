"""bfloat16 by float32's instructions: what PyTorch's own bfloat16 gives, in both passes, and only where it is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.pictograms.rounded import rounded_products
from torch import Tensor
from torch.nn import functional as F

PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), [(4, 8, 9, 9), (16, 8, 3, 3)]),
    "conv2d with bias": (lambda x, w, b: F.conv2d(x, w, bias=b, padding=1), [(2, 8, 5, 5), (4, 8, 3, 3), (4,)]),
    "linear": (F.linear, [(3, 5, 64), (32, 64), (32,)]),
    "linear without bias": (F.linear, [(6, 64), (32, 64)]),
    "matmul": (torch.matmul, [(6, 64), (64, 8)]),
    "matmul of batches": (lambda a, b: a @ b, [(2, 3, 4, 64), (2, 3, 64, 4)]),
}


def operands_of(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=drawn, requires_grad=True) for shape in shapes]


def passes(product: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of the operands."""
    found = product(*operands)
    drawn = torch.Generator().manual_seed(1)
    found.backward(torch.randn(found.shape, generator=drawn).bfloat16().to(found.dtype))
    return [found.detach(), *(operand.grad for operand in operands if operand.grad is not None)]


def under_autocast(name: str) -> list[Tensor]:
    product, shapes = PRODUCTS[name]
    with torch.autocast("cpu", torch.bfloat16):
        return passes(product, operands_of(shapes))


@pytest.mark.parametrize("name", PRODUCTS)
def test_results_and_gradients_are_the_exact_ones_of_rounded_operands_rounded(name: str) -> None:
    product, shapes = PRODUCTS[name]
    exact = passes(product, [t.detach().bfloat16().double().requires_grad_() for t in operands_of(shapes)])
    with rounded_products():
        rounded = under_autocast(name)
    assert len(rounded) == 1 + len(shapes)
    for one, two in zip(rounded, exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2**-8, atol=1e-5)  # half a unit in the last place


@pytest.mark.parametrize("name", PRODUCTS)
def test_pytorch_gives_the_same_up_to_the_roundings_of_its_partial_sums(name: str) -> None:
    plain = under_autocast(name)
    with rounded_products():
        rounded = under_autocast(name)
    for one, two in zip(rounded, plain, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=0, atol=float(two.abs().max()) * 2**-6)


def test_every_number_is_one_of_bfloat16() -> None:
    with rounded_products():
        found, *gradients = under_autocast("linear")
    assert found.dtype == torch.bfloat16
    for gradient in gradients:  # of float32 leaves, handed on by bfloat16
        assert torch.equal(gradient, gradient.bfloat16().float())


def test_the_sum_is_taken_in_float32() -> None:
    terms = torch.full((1, 4096), 1 / 256)
    with rounded_products(), torch.autocast("cpu", torch.bfloat16):
        assert F.linear(terms, torch.ones(1, 4096)).item() == 16  # in bfloat16 the sum stays at 1


def test_float32_and_what_comes_after_are_left_alone() -> None:
    a, b = torch.randn(8, 64), torch.randn(8, 64)
    alone = F.linear(a, b)
    with rounded_products():
        assert torch.equal(F.linear(a, b), alone)
    with torch.autocast("cpu", torch.bfloat16):
        before = F.linear(a, b)
        with rounded_products():
            assert F.linear(a, b).dtype == torch.bfloat16
        assert torch.equal(F.linear(a, b), before)
