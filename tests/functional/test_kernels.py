"""The Triton kernels equal the float64 reference: ``make kernels`` interprets them on the CPU; on CUDA they run.

The package triton takes 1 GB and is no part of the dev environment: without it, or without either way to run, all of
this is skipped.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cloob import ContrastiveObjective, functional
from cloob.functional import cloob_reference
from cloob.functional.streamed import tiles
from paper_loops import MEMBER_IDS, MEMBERS, joint, pairs, relative_error, unit, value_and_gradients

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("neither CUDA nor TRITON_INTERPRET=1", allow_module_level=True)

from cloob.functional import kernels
from cloob.functional.kernels import launch, softmax

BLOCK, TILE = 16, 32
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
each_member = pytest.mark.parametrize(("contrast", "hopfield"), MEMBERS, ids=MEMBER_IDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 16 × 16 numbers, tiles and strips of 32 rows: few rows make several of each."""
    monkeypatch.setattr(launch, "BLOCK", BLOCK)
    monkeypatch.setattr(launch, "LINE", 64)
    monkeypatch.setattr(tiles, "tile_rows", lambda device: TILE)
    monkeypatch.setattr(softmax, "STRIP_ROWS", TILE)


@pytest.fixture(autouse=True, scope="module")
def rounded() -> Iterator[None]:
    """A GPU rounds to bfloat16, the interpreter cuts off, and what is always too small adds up."""
    if not launch.INTERPRETED:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) == ("fp32", "bf16"):
            bits = data.view("uint32").astype("uint64")
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16")
        return original(data, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def single(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.to(DEVICE, torch.float32) for t in inputs]


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in options.items()}


def assert_equal_paths(
    reference: Callable[..., Tensor], ours: Callable[..., Tensor], *inputs: Tensor, **options: Any
) -> None:
    """Value and gradients of the kernels in float32 are those of the reference in float64, to 1e-5.

    Where float32 itself does not hold that (large β·s, a value near zero), about as well as the float32 reference.
    """
    exact = value_and_gradients(reference, *inputs, **options)
    plain = value_and_gradients(reference, *(t.float() for t in inputs), **options)
    found = [t.cpu() for t in value_and_gradients(ours, *single(inputs), **on_device(options))]
    assert all(t.dtype == torch.float32 for t in found)
    for what, of in (("value", lambda outputs: outputs[0]), ("gradient", lambda outputs: joint(outputs[1:]))):
        bound = max(1e-5, 4 * relative_error(of(plain), of(exact)))
        assert relative_error(of(found), of(exact)) < bound, f"{what}, {options}"
    # Each scale by itself: beside thousands of numbers a wrong one would not be seen.
    for got, in_single, expected in zip(found[3:], plain[3:], exact[3:], strict=True):
        bound = max(1e-4, 4 * relative_error(in_single, expected))
        assert (got - expected).abs() <= bound * expected.abs() + 1e-6, options


@each_member
@pytest.mark.parametrize(("n", "d"), [(2, 1), (TILE, 16), (2 * TILE + 5, 20)])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_equals_the_reference(contrast: str, hopfield: bool, n: int, d: int, ids: bool) -> None:
    options: dict[str, Any] = {"contrast": contrast, "hopfield": hopfield}
    options |= {"ids": torch.arange(n) // 2 * 7 % 10 if ids else None, "scale": "unit" if ids else "paper"}
    for beta in (8.0, 70.0) if hopfield else (8.0,):  # unshifted sums, a maximum for each row
        inputs = (*pairs(n, d, seed=n), *scalars(10.0, beta))
        assert_equal_paths(cloob_reference, kernels.cloob_triton, *inputs, **options)


@pytest.mark.parametrize("hopfield", [False, True])
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("bias", [-10.0, 0.5])
def test_sigmoid_equals_the_reference(hopfield: bool, ids: bool, bias: float) -> None:
    n = 2 * TILE + 5

    def of(path: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y, t, b, **o: path(
            x, y, t, 8.0, contrast="sigmoid", hopfield=hopfield, scale="unit", bias=b, **o
        )

    options = {"ids": torch.arange(n) // 3 % 9} if ids else {}
    inputs = (*pairs(n, 20), *scalars(10.0, bias))
    assert_equal_paths(of(cloob_reference), of(kernels.cloob_triton), *inputs, **options)


@given(
    n=st.integers(1, 40),
    more=st.integers(0, 40),
    d=st.integers(1, 40),
    name=st.sampled_from(["info_loob", "info_nce", "sigmoid_loss"]),
    inv_tau=st.floats(0.1, 100.0),
    different=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=20)
def test_contrast_of_any_shape(
    n: int, more: int, d: int, name: str, inv_tau: float, different: int | None, seed: int, data: st.DataObject
) -> None:
    m = max(2, n + more)
    offset = data.draw(st.integers(0, m - n))
    x, y = pairs(m, d, seed=seed)
    options: dict[str, Any] = {"positive_offset": offset}
    if different is not None:  # 1: no anchor has a negative
        all_ids = torch.randint(different, (m,), generator=torch.Generator().manual_seed(seed))
        options |= {"ids": all_ids[offset : offset + n], "candidate_ids": all_ids}
    own = x[offset : offset + n]
    scales = scalars(inv_tau, -3.0) if name == "sigmoid_loss" else scalars(inv_tau)
    assert_equal_paths(getattr(functional, name), getattr(kernels, name), own, y, *scales, **options)


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 70),
    d=st.integers(1, 40),
    beta=st.floats(0.1, 200.0),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12)
def test_retrieval_of_any_shape(n: int, m: int, d: int, beta: float, seed: int) -> None:
    weights = unit(n, d, seed + 2)

    def of(path: Any) -> Callable[..., Tensor]:
        return lambda state, stored, b: (path.hopfield_retrieval(state, stored, b) * weights.to(stored)).sum()

    stored = unit(m, d, seed + 1)
    state = 0.3 * unit(n, d, seed) + stored[torch.arange(n) % m]
    given_inputs = (state, stored, *scalars(beta))
    exact = value_and_gradients(of(functional), *given_inputs)
    plain = value_and_gradients(of(functional), *(t.float() for t in given_inputs))
    found = [t.cpu() for t in value_and_gradients(of(kernels), *single(given_inputs))]
    for got, in_single, expected in zip(found, plain, exact, strict=True):
        error = (got.double() - expected).norm()
        assert error <= 1e-5 * (1 + beta) * (1 + expected.norm()) + 4 * (in_single.double() - expected).norm()


@given(n=st.integers(2, 70), d=st.integers(1, 40), beta=st.floats(0.1, 58.0), seed=st.integers(0, 10**6))
@settings(max_examples=8)
def test_four_retrievals_of_any_shape(n: int, d: int, beta: float, seed: int) -> None:
    weights = [unit(n, d, seed + k) for k in range(3, 7)]

    def of(retrieve: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, y, b: sum((r * w.to(r)).sum() for r, w in zip(retrieve(x, y, b), weights, strict=True))

    inputs = (*pairs(n, d, seed=seed), *scalars(beta))
    reference = of(functional.reference.retrieve)
    exact = value_and_gradients(reference, *inputs)
    plain = value_and_gradients(reference, *(t.float() for t in inputs))
    found = [t.cpu() for t in value_and_gradients(of(kernels.retrieve), *single(inputs))]
    for got, in_single, expected in zip(found, plain, exact, strict=True):
        error = (got.double() - expected).norm()
        assert error <= 1e-5 * (1 + beta) * (1 + expected.norm()) + 4 * (in_single.double() - expected).norm()


@each_member
def test_bfloat16_products_keep_the_gradient_to_a_hundredth(contrast: str, hopfield: bool) -> None:
    inputs = (*pairs(96, 64), *scalars(30.0, 8.0))
    options = {"contrast": contrast, "hopfield": hopfield}
    exact = value_and_gradients(cloob_reference, *inputs, **options)
    low = value_and_gradients(kernels.cloob_triton, *single(inputs), matmul=torch.bfloat16, **options)
    assert all(t.dtype == torch.float32 for t in low)
    errors = [relative_error(got.cpu(), expected) for got, expected in zip(low, exact, strict=True)]
    assert max(errors) <= 1e-2, errors
    assert errors[1] > 1e-4  # it did multiply in bfloat16


@each_member
def test_close_embeddings_stay_accurate_in_bfloat16(contrast: str, hopfield: bool) -> None:
    cone = unit(1, 64, 9)
    x, y = (2.0 * cone + side for side in pairs(64, 64))
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (x, y))
    options = {"contrast": contrast, "hopfield": hopfield}
    _, *exact = value_and_gradients(cloob_reference, x, y, *scalars(30.0, 8.0), **options)
    inputs = single((x, y, *scalars(30.0, 8.0)))
    _, *low = value_and_gradients(kernels.cloob_triton, *inputs, matmul=torch.bfloat16, **options)
    errors = [relative_error(got.cpu(), expected) for got, expected in zip(low[:2], exact[:2], strict=True)]
    assert max(errors) <= 4e-2, errors


@pytest.mark.parametrize("beta", [4.0, 80.0])
def test_scales_have_their_gradient_in_bfloat16(beta: float) -> None:
    # β = 80 takes the branch with the rows' maxima, and makes 80 times the rounding of s.
    x, y = (side + 0.5 * unit(1, 16, 5) for side in pairs(40, 16))
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (x, y))
    inputs = (x, y, *scalars(10.0, beta))
    exact = value_and_gradients(cloob_reference, *inputs)
    low = value_and_gradients(kernels.cloob_triton, *single(inputs), matmul=torch.bfloat16)
    errors = [relative_error(got.cpu(), expected) for got, expected in zip(low, exact, strict=True)]
    assert max(errors) <= (4e-2 if beta == 4.0 else 0.3), errors


def test_anchors_without_a_negative_add_nothing() -> None:
    x, y = (side.to(DEVICE, torch.float32).requires_grad_() for side in pairs(20, 8))
    ids = torch.zeros(20, dtype=torch.int32, device=DEVICE)  # int32: any integers will do
    for name in ("info_loob", "info_nce"):
        loss = getattr(kernels, name)(x, y, 30.0, ids=ids)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, y)))


def test_large_logits_do_not_overflow() -> None:
    inputs = (20 * unit(20, 8, 1), 20 * unit(20, 8, 2), *scalars(100.0))
    assert_equal_paths(functional.info_loob, kernels.info_loob, *inputs)
    assert_equal_paths(functional.info_nce, kernels.info_nce, *inputs)


def test_programs_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert launch.BLOCK > BLOCK
    inputs = (*pairs(launch.BLOCK + 3, 72), *scalars(30.0, 8.0))
    assert_equal_paths(cloob_reference, kernels.cloob_triton, *inputs, ids=torch.arange(launch.BLOCK + 3) // 2)


def test_the_module_takes_them_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    original = launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *a, **o: (used.append(kernel.__name__), original(kernel, *a, **o))
    )
    x, y = (side.to(DEVICE, torch.float32) for side in pairs(20, 8))
    exact = cloob_reference(*pairs(20, 8), 30.0, 8.0)
    monkeypatch.setattr("cloob.objective.implementation.STREAM_HOPFIELD_FROM", 2)
    assert ContrastiveObjective()(x, y).item() == pytest.approx(exact.item(), rel=1e-5) and not used
    assert ContrastiveObjective(backend="triton")(x, y).item() == pytest.approx(exact.item(), rel=1e-5) and used


def test_what_is_refused() -> None:
    x, y = (side.to(DEVICE) for side in pairs(5, 4))
    with pytest.raises(ValueError, match=r"takes no float64 rows; backend='streamed' does"):
        kernels.cloob_triton(x, y, 30.0)
    x, y = x.float().requires_grad_(), y.float()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(kernels.cloob_triton(x, y, 30.0), x, create_graph=True)
    with pytest.raises(ValueError, match=r"matmul is torch\.float16"):
        kernels.info_loob(x, y, 30.0, matmul=torch.float16)


def test_rows_elsewhere_than_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs rows on a CUDA device, these are on cpu; backend='streamed'"):
        kernels.info_nce(*(side.float() for side in pairs(5, 4)), 30.0)


def test_no_grad_some_inputs_only_and_rows_that_are_not_contiguous() -> None:
    wide = torch.cat(pairs(20, 16), dim=1).to(DEVICE, torch.float32)
    x, y = wide[::2, :16].T.contiguous().T, wide[1::2, 16:].requires_grad_()
    with torch.no_grad():
        value = kernels.cloob_triton(x, y, 30.0)
    loss = kernels.cloob_triton(x, y, 30.0)
    (gradient,) = torch.autograd.grad(loss, y)
    exact = value_and_gradients(cloob_reference, x.detach().cpu().double(), y.detach().cpu().double(), *scalars(30.0))
    assert not value.requires_grad and value == loss
    assert relative_error(gradient.cpu(), exact[2]) < 1e-5


def of_rank(rank: int, folder: Path) -> None:
    """Loss and gradients of one of two ranks against those of one process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = pairs(9, 6)
    own, ids = slice(0, 4) if rank == 0 else slice(4, 9), torch.arange(9) // 2
    objective = ContrastiveObjective(backend="triton", gather=True)
    exact = value_and_gradients(cloob_reference, x, y, *scalars(30.0, 8.0), ids=ids)
    inputs = (x[own].float(), y[own].float())
    found = value_and_gradients(lambda a, b: objective(a, b, ids=ids[own]), *inputs)
    assert relative_error(found[0], exact[0]) < 1e-5
    for got, expected in zip(found[1:], exact[1:3], strict=True):
        assert relative_error(got / 2, expected[own]) < 1e-5  # the averaging over ranks divides by their number
    dist.destroy_process_group()


@pytest.mark.skipif(not launch.INTERPRETED, reason="two ranks need two devices")
def test_two_ranks(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_rank, (tmp_path,), nprocs=2)


@pytest.mark.skipif(not launch.INTERPRETED, reason="products are counted where they are interpreted")
def test_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """52 N²D + 8NTD (diagonal tiles of T rows are computed whole) for any whole number of tiles, 12 N²D plainly."""
    from triton.runtime.interpreter import InterpreterBuilder

    done = 0
    original = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *others: Any) -> Any:
        nonlocal done
        done += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return original(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    d = 16
    for tiles_a_side in (1, 2):
        n = tiles_a_side * TILE
        x, y = (side.float().requires_grad_() for side in pairs(n, d))
        for hopfield, expected in ((True, 52 * n * n * d + 8 * n * TILE * d), (False, 12 * n * n * d)):
            done = 0
            kernels.cloob_triton(x, y, 30.0, hopfield=hopfield).backward()
            assert done == expected
