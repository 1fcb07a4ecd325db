"""Contrasts of scores, soft targets and weights against plain loops, value and
gradient, for cases that hypothesis draws.

Over ranks: ``test_distributed.py``.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import cloob
from cloob import ContrastiveObjective, cached_backward
from cloob.functional import (
    cloob_reference,
    contrast_scores,
)
from cloob.functional.streamed import cloob_streamed, tiles
from cloob.objective import OBJECTIVES
from paper_loops import (
    MEMBERS,
    pairs,
    scores_loop,
    targets_loop,
    value_and_gradients,
    value_and_slope,
)
from support import raises, seeded

CONTRASTS = ("infoloob", "infonce", "sigmoid")
contrasts = pytest.mark.parametrize("contrast", CONTRASTS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Batches of a few pairs take several strips, which end within them."""
    monkeypatch.setitem(tiles.TILE, "cpu", 3)
    monkeypatch.setitem(tiles.STRIP, "cpu", 4)


def drawn_targets(kind, n, m, generator, sums=True):
    """Targets as they are given, and the same as a dense matrix."""
    if kind == "none":
        return None, torch.eye(n, m, dtype=torch.float64)
    width = m if kind == "dense" else min(m, 3)
    shares = torch.rand(n, width, generator=generator, dtype=torch.float64)
    shares[:, 0] *= torch.rand(n, generator=generator) < 0.5  # some are exactly 0
    shares = shares / shares.sum(1, keepdim=True) if sums else shares
    if kind == "dense":
        return shares, shares
    places = [torch.randperm(m, generator=generator)[:width] for _ in range(n)]
    columns = torch.stack(places)
    dense = torch.zeros(n, m, dtype=torch.float64).scatter_add(1, columns, shares)
    return (columns, shares), dense


@st.composite
def cases(draw):
    """A matrix of scores, its contrast, and keywords for us and for the loop."""
    contrast = draw(st.sampled_from(CONTRASTS))
    n = draw(st.integers(1, 6))
    m = draw(st.integers(2, 6))
    kind = draw(st.sampled_from(["none", "dense", "columns"]))
    n = min(n, m) if kind == "none" else n
    generator = seeded(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([0.1, 1.0, 30.0, 1e3, 1e6]))
    scores = size * torch.randn(n, m, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # one score beats all others
        scores[:, 0] = 3 * size
    targets, dense = drawn_targets(kind, n, m, generator, contrast != "sigmoid")
    weights = torch.rand(n, generator=generator, dtype=torch.float64)
    if contrast == "sigmoid" and draw(st.booleans()):
        weights = torch.rand(n, m, generator=generator, dtype=torch.float64)
    share_masked = draw(st.sampled_from([0.0, 0.4, 1.0]))
    mask = torch.rand(n, m, generator=generator) < share_masked
    given_too = {"targets": targets, "weights": weights, "mask": mask}
    return scores, contrast, given_too, dense


@given(cases())
@settings(max_examples=120, deadline=None)
def test_a_contrast_of_scores_is_the_loop(case):
    scores, contrast, options, dense = case
    lists = [dense.tolist(), options["weights"].tolist(), options["mask"].tolist()]
    along = torch.randn(scores.shape, generator=seeded(1), dtype=torch.float64)

    def loop(rows):
        return scores_loop(rows, contrast, *lists)

    def loss(s):
        return contrast_scores(s, contrast, **options)

    expected, slope = value_and_slope(loop, [scores], [along])
    value, gradient = value_and_gradients(loss, scores)
    size = 1 + float(scores.abs().max())
    assert abs(float(value) - expected) <= 1e-13 * size
    found = float((gradient * along).sum())
    assert abs(found - slope) <= 1e-12 * float(along.norm())

    low = scores.float()
    value, gradient = value_and_gradients(loss, low)
    exact, exact_gradient = value_and_gradients(loss, low.double())
    assert value.dtype == torch.float32
    assert abs(float(value) - float(exact)) <= 1e-6 * size
    error = float((gradient - exact_gradient).norm())
    assert error <= 1e-5 * (1e-3 + exact_gradient.norm())


@pytest.mark.parametrize("size", [1e2, 1e5, 1e30, 1e38])
@contrasts
def test_all_finite_scores_have_a_finite_loss_and_gradient(contrast, size):
    scores = size * torch.tensor(
        [[1.0, -1.0, 0.0], [0.0, 1.0, 1.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    )
    thirds = torch.full((4, 3), 1 / 3)
    everything = torch.ones(4, 3, dtype=torch.bool)
    spoilt = scores[:3].clone()
    spoilt[0, 2] = -torch.inf  # a candidate that is none
    for matrix, options in (
        (scores, {"targets": thirds}),
        (scores, {"targets": thirds, "mask": everything}),
        (spoilt, {}),
    ):
        loss = partial(contrast_scores, contrast=contrast, **options)
        value, gradient = value_and_gradients(loss, matrix)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_tiny_infonce_keeps_its_digits():
    """Where the positive dominates, log-sum-exp minus the positive would be 0."""
    scores = torch.tensor([[40.0, 0.0], [0.0, 40.0]])
    value, gradient = value_and_gradients(
        lambda s: contrast_scores(s, "infonce"), scores
    )
    expected = math.log1p(math.exp(-40))
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(gradient[0, 1]) == pytest.approx(math.exp(-40) / 2, rel=1e-6)


@contrasts
def test_shifted_exchanged_and_lowered_scores(contrast):
    """A softmax ignores what a row shares; the order of rows and columns is nobody's;
    autocast and float16 change nothing but the rounding of what is given.
    """
    generator = seeded(0)
    scores = torch.randn(5, 5, generator=generator)
    shares = torch.rand(5, 5, generator=generator).softmax(1)
    weights = torch.rand(5, generator=generator)
    whole = contrast_scores(scores, contrast, targets=shares, weights=weights)
    rows = torch.randperm(5, generator=generator)
    columns = torch.randperm(5)
    moved_scores = scores[rows][:, columns]
    moved_shares = shares[rows][:, columns]
    moved = contrast_scores(
        moved_scores, contrast, targets=moved_shares, weights=weights[rows]
    )
    assert_close(moved, whole)
    if contrast != "sigmoid":
        shift = contrast_scores(
            scores + 100 * torch.randn(5, 1), contrast, targets=shares, weights=weights
        )
        assert_close(shift, whole, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = contrast_scores(scores, contrast, targets=shares, weights=weights)
    assert torch.equal(lowered, whole)
    half = contrast_scores(scores.half(), contrast)
    assert half == contrast_scores(scores.half().float(), contrast)


@st.composite
def objectives(draw):
    """A member, pairs, targets and weights."""
    contrast, hopfield = draw(st.sampled_from(MEMBERS))
    n = draw(st.integers(2, 9))
    generator = seeded(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["none", "dense", "columns"]))
    targets, dense = drawn_targets(kind, n, n, generator, contrast != "sigmoid")
    weights = draw(st.sampled_from([None, "drawn"]))
    if weights is not None or kind == "none":
        weights = torch.rand(n, generator=generator, dtype=torch.float64)
    ids = draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n))
    scale = (
        "unit" if contrast == "sigmoid" else draw(st.sampled_from(["paper", "unit"]))
    )
    member = {"contrast": contrast, "hopfield": hopfield, "scale": scale}
    x, y = pairs(n, 4, seed=draw(st.integers(0, 10**6)))
    return member, (x, y), targets, dense, weights, ids


@given(objectives())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:ids or exclude_above leave no anchor")
def test_every_path_of_an_objective_with_targets_is_the_loop(case):
    member, (x, y), targets, dense, weights, ids = case
    bias = -2.0 if member["contrast"] == "sigmoid" else 0.0
    listed = [1.0] * len(x) if weights is None else weights.tolist()
    inv_tau = torch.tensor(11.0, dtype=torch.float64)
    beta = torch.tensor(6.0, dtype=torch.float64)
    inputs = [x, y, inv_tau, beta]
    generator = seeded(3)
    along = [torch.randn(t.shape, generator=generator).double() for t in inputs]
    asked = {
        **member,
        "shares": dense.tolist(),
        "weights": listed,
        "ids": ids,
        "bias": bias,
    }
    expected, slope = value_and_slope(partial(targets_loop, **asked), inputs, along)
    labels = {
        "targets": targets,
        "weights": weights,
        "ids": None if ids is None else torch.tensor(ids),
    }
    for path in (cloob_reference, cloob_streamed):
        loss = partial(path, bias=bias, **member, **labels)
        value, *gradients = value_and_gradients(loss, *inputs)
        assert abs(float(value) - expected) <= 1e-12 * (1 + abs(expected))
        found = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
        assert abs(found - slope) <= 1e-10 * (1 + abs(slope))
    start = {"bias": bias} if member["contrast"] == "sigmoid" else {}
    for backend in ("reference", "streamed"):
        module = ContrastiveObjective(
            inv_tau=11.0, beta=6.0, backend=backend, **member, **start
        )
        found = module(x, y, **labels).item()
        assert abs(found - expected) <= 1e-6 * (1 + abs(expected))


def test_cached_backward_passes_targets_and_weights_on():
    torch.manual_seed(0)
    tower = torch.nn.Linear(5, 4)
    images, texts = torch.randn(2, 8, 5)
    said = {
        "targets": torch.rand(8, 8).softmax(1),
        "weights": torch.rand(8),
    }
    objective = cloob.make_objective("infoloob")

    def encode(part):
        return tuple(torch.nn.functional.normalize(tower(t), dim=1) for t in part)

    parts = list(zip(images.split(3), texts.split(3), strict=True))
    cached_backward(encode, objective, parts, towers=tower, **said)
    cached = tower.weight.grad
    tower.weight.grad = None
    objective(*encode((images, texts)), **said).backward()
    assert_close(cached, tower.weight.grad)


def test_targets_go_through_torch_func_and_second_derivatives():
    x, y = pairs(6, 4)
    generator = seeded(0)
    shares = torch.rand(6, 6, generator=generator, dtype=torch.float64).softmax(1)
    said = {"targets": shares, "weights": shares[0]}
    for name in ("cloob", "clip"):
        objective = cloob.make_objective(name, backend="reference")
        loss = partial(objective, text_features=y, **said)
        _, expected = value_and_gradients(loss, x)
        assert_close(torch.func.grad(loss)(x), expected)
    for contrast in CONTRASTS:
        scores = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        targets = shares[:4, :4].softmax(1)
        loss = partial(contrast_scores, contrast=contrast, targets=targets)
        assert torch.autograd.gradgradcheck(loss, scores.requires_grad_())
    streamed = cloob.make_objective("clip", backend="streamed")
    raises(RuntimeError, "reference", torch.func.grad(streamed), x, y, **said)


ZEROS = torch.zeros(2, 2)


def refused(message, scores=ZEROS, **options):
    raises(ValueError, message, contrast_scores, scores, **options)


def test_scores_that_do_not_fit_are_refused():
    refused(r"shape \(1, 1\); a row and two columns", torch.zeros(1, 1))
    refused(r"shape \(0, 3\)", torch.zeros(0, 3))
    refused("3 rows and 2 columns: rows beyond need targets", torch.zeros(3, 2))
    refused("a floating-point matrix", torch.zeros(3))
    refused("a floating-point matrix", torch.eye(3).long())
    refused("contrast is 'hinge'", contrast="hinge")


def test_weights_and_masks_that_do_not_fit_are_refused():
    refused(r"weights has shape \(3,\)", weights=torch.ones(3))
    refused("weights has shape", weights=torch.ones(2, 2))
    refused("weights lie", weights=torch.tensor([1.0, -1.0]))
    refused("weights lie", weights=torch.tensor([1.0, math.nan]))
    refused("mask has dtype", mask=torch.zeros(2, 2))
    refused("mask has shape", mask=torch.zeros(2) > 0)


def test_targets_that_do_not_fit_are_refused():
    refused("targets of row 0 sum to 2", targets=torch.ones(2, 2))
    refused("targets has shape", targets=torch.ones(2, 3))
    refused("targets lie between -1 and", targets=-torch.eye(2))
    columns = torch.tensor([[0], [2]])
    refused("targets name columns 0 to 2 of 2", targets=(columns, torch.ones(2, 1)))
    flat = torch.tensor([0, 1])
    refused("columns of targets have shape", targets=(flat, torch.ones(2)))


def test_what_an_objective_refuses_of_labels():
    x, y = pairs(4, 3)
    objective = cloob.make_objective("infoloob")
    shares = torch.full((4, 4), 0.25, dtype=torch.float64)
    narrow = shares[:, :3]
    raises(ValueError, "targets has shape", objective, x, y, targets=narrow)
    twice = shares.repeat(2, 1)
    raises(ValueError, "targets has shape", objective, x, y, targets=twice)
    raises(ValueError, "weights has shape", objective, x, y, weights=shares)
    raises(ValueError, "of row 0 sum to 0.5", objective, x, y, targets=shares / 2)
    learned = shares.clone().requires_grad_()
    raises(ValueError, "targets require a gradient", objective, x, y, targets=learned)
    margin = cloob.make_objective("infoloob", exclude_above=0.1)
    raises(ValueError, "exclude_above compares", margin, x, y, targets=shares)
    low = cloob.make_objective("infoloob", matmul="bfloat16")
    raises(ValueError, "need matmul='float32'", low, x, y, targets=shares)
    floats = torch.arange(4.0)
    raises(ValueError, "4 integers on cpu are expected", objective, x, y, ids=floats)
    raises(ValueError, "4 integers", objective, x, y, ids=floats.tolist())
    raises(TypeError, "one text", cloob.ids, "abc")
    raises(TypeError, "weights is a list", objective, x, y, weights=[1.0] * 4)
    raises(TypeError, "targets is a list", objective, x, y, targets=shares.tolist())
    raises(TypeError, "are a list", objective, x, y, targets=([[0]] * 4, shares))
    raises(TypeError, "scores is a list", contrast_scores, [[1.0]])


@pytest.mark.parametrize("backend", ["reference", "streamed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_that_leave_no_negative_are_told_of_once(name, backend):
    x, y = pairs(6, 5)
    objective = cloob.make_objective(name, backend=backend)
    message = "leave no anchor any negative"
    with pytest.warns(UserWarning, match=message) as told:
        objective(x, y, ids=torch.zeros(6, dtype=torch.long))
    assert told[0].filename == __file__
    objective(x, y, ids=torch.zeros(6, dtype=torch.long))  # warnings are errors here
    margin = cloob.make_objective(name, backend=backend, exclude_above=-3.0)
    with pytest.warns(UserWarning, match=message):
        margin(x, y)
    fitting = cloob.make_objective(name, backend=backend, exclude_above=0.5)
    fitting(x, y, ids=torch.arange(6) % 5)
    cloob.make_objective(name, check=False)(x, y, ids=torch.zeros(6, dtype=torch.long))
