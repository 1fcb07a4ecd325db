"""Every path of the objective against plain loops, value and gradient, for cases that
hypothesis draws.

At the end what random batches do not hit: overflow, masks, anchors without negatives,
averages of zero, and wrong arguments. Over ranks: ``test_distributed.py``, since that
takes real processes."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from cloob import ContrastiveObjective, cached_backward, functional
from cloob.functional import cloob_reference, streamed
from cloob.functional.streamed import cloob_streamed, tiles
from paper_loops import (
    MEMBERS,
    TooClose,
    contrast_loop,
    dot,
    objective_loop,
    retrieval_loop,
    sigmoid_loop,
    unit,
    value_and_gradients,
    value_and_slope,
)
from support import seeded

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIRECTION_NAMES = ("info_loob", "info_nce", "sigmoid_loss")
BACKENDS = pytest.mark.parametrize(
    "path", [functional, streamed], ids=["reference", "streamed"]
)
# Some batches that are drawn have no negative at all, of which the module warns.
pytestmark = pytest.mark.filterwarnings("ignore:ids or exclude_above leave no anchor")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Two or three pairs are one tile; more take several tiles and strips, which end
    within them.
    """
    monkeypatch.setitem(tiles.TILE, "cpu", 6)
    monkeypatch.setitem(tiles.STRIP, "cpu", 4)


def rows(n, d, seed, dtype, contiguous, twice):
    """(n, d) unit rows; ``twice``: the last of more than two is the first again."""
    found = unit(n, d, seed, dtype)
    found = found[torch.arange(n) % max(2, n - 1)] if twice else found
    return found if contiguous else torch.stack([found, -found], dim=2)[..., 0]


def directions(inputs):
    """A random direction for each input; a scalar moves in proportion, as its
    derivative can be large where it is small.
    """
    generator = seeded(5)
    along = []
    for t in inputs:
        drawn = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        along.append(drawn if t.ndim else drawn * t)
    return along


def assert_equals(loop, path, inputs, steepness, size=1.0, about=None):
    """Value, and gradient along a random direction, of ``path(*inputs)`` are the
    loop's.

    Matrices are in the dtype of the case, scalars in float64. ``steepness`` is what
    multiplies the rounding of a cosine, ``size`` that of a result of usual size.
    """
    along = directions(inputs)
    try:
        expected, slope = value_and_slope(loop, inputs, along)
    except TooClose:
        reject()
    value, *gradients = path(*inputs)
    low = inputs[0].dtype
    high = torch.float64 if low == torch.float64 else torch.float32
    assert value.dtype == high, about
    assert value.ndim == 0, about
    rounding = 10 * torch.finfo(high).eps * (1 + steepness)
    error = abs(value.item() - expected)
    assert error <= rounding * (size + abs(expected)), (value, expected, about)
    ways = [(g.double(), way) for g, way in zip(gradients, along, strict=True)]
    found = math.fsum(float((g * way).sum()) for g, way in ways)
    length = sum(float(g.norm() * way.norm()) for g, way in ways)
    of_rows = sum(float(way.norm()) for way in along[:2])
    close = rounding * (length + size * of_rows)
    if low != high:  # a gradient has the dtype of its rows
        close += torch.finfo(low).eps * length
    assert abs(found - slope) <= close, (found, slope, close, about)


IDS_OR_NONE = st.none() | st.lists(st.integers(-2, 2), min_size=17, max_size=17)
MARGINS = st.none() | st.sampled_from([-0.2, 0.02, 0.3])
BETAS = st.sampled_from([8.0, 1e-3, 0.5, 70.0, 1e3])


@st.composite
def cases(draw):
    """A batch as x, y, τ⁻¹, β and the bias; the member, the ids, and what else is asked
    of it.
    """
    contrast, hopfield = draw(st.sampled_from(MEMBERS))
    n = draw(st.integers(2, 11))
    d = draw(st.integers(2, 6))
    scales = ["unit"] if contrast == "sigmoid" else ["paper", "unit"]
    scale = draw(st.sampled_from(scales))
    ids = draw(IDS_OR_NONE)
    case = SimpleNamespace(n=n, ids=ids and ids[:n])
    case.member = {"contrast": contrast, "hopfield": hopfield, "scale": scale}
    case.margin = {"exclude_above": draw(MARGINS)}
    case.beta = draw(BETAS)
    case.inv_tau = draw(st.sampled_from([30.0, 1e-3, 1.0, 99.0, 1e3]))
    case.bias = draw(st.sampled_from([-10.0, 0.0, 3.5]))
    case.autocast = draw(st.booleans())
    places = st.integers(1, n - 1)
    case.cuts = sorted(draw(st.sets(places, max_size=3)))
    seed = draw(st.integers(0, 10**6))
    dtype = draw(st.sampled_from(DTYPES))
    contiguous = draw(st.booleans())
    twice = draw(st.booleans())
    sides = [rows(n, d, seed + k, dtype, contiguous, twice) for k in (0, 1)]
    case.inputs = [*sides, *scalars(case.inv_tau, case.beta, case.bias)]
    case.given_ids = None if ids is None else torch.tensor(case.ids)
    return case


def scalars(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def plainly(function, case):
    asked = {"ids": case.given_ids, **case.member, **case.margin}

    def loss(x, y, inv_tau, beta, bias):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            return function(x, y, inv_tau, beta, bias=bias, **asked)

    return value_and_gradients(loss, *case.inputs)


def in_float64(case):
    inputs = [t.double() for t in case.inputs]
    return SimpleNamespace(**vars(case) | {"inputs": inputs, "autocast": False})


def module_of(case, backend, **scales):
    """The objective of a case, in float64; scales that learn start where they are."""
    if case.member["contrast"] == "sigmoid":
        scales["bias"] = case.bias
    objective = ContrastiveObjective(
        inv_tau=case.inv_tau,
        beta=case.beta,
        backend=backend,
        **case.member,
        **case.margin,
        **scales,
    )
    objective.double()
    starts = {"log_inv_tau": case.inv_tau, "log_beta": case.beta}
    for name, parameter in objective.named_parameters():
        if name in starts:
            parameter.data.fill_(math.log(starts[name]))
    return objective


def by_module(case, *, backend="auto", cached=False):
    """By ``ContrastiveObjective``; its scales learn where they can, and fixed ones get
    the gradient of the reference, in float64.
    """
    x, y, inv_tau, beta, _ = case.inputs
    is_sigmoid = case.member["contrast"] == "sigmoid"
    hopfield = case.member["hopfield"]
    learns = case.member["scale"] == "unit" and (case.inv_tau <= 100 or is_sigmoid)
    objective = module_of(
        case, backend, learnable_inv_tau=learns, learnable_beta=hopfield
    )
    # which know the rows of every pair by heart
    towers = nn.ParameterDict({"x": x, "y": y})
    if cached:
        parts = list(torch.arange(case.n).tensor_split(case.cuts))
        encode = lambda part: (towers.x[part], towers.y[part])  # noqa: E731
        value = cached_backward(
            encode, objective, parts, towers=towers, ids=case.given_ids
        )
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            value = objective(towers.x, towers.y, ids=case.given_ids)
        value.backward()
    found = {name: p.grad for name, p in objective.named_parameters()}
    zero = torch.zeros((), dtype=torch.float64)
    if learns:
        by_inv_tau = found["log_inv_tau"] / inv_tau
    else:
        by_inv_tau = plainly(cloob_reference, in_float64(case))[3]
    by_beta = found["log_beta"] / beta if hopfield else zero
    by_bias = found.get("bias", zero)
    return value.detach(), towers.x.grad, towers.y.grad, by_inv_tau, by_beta, by_bias


PATHS = {
    "reference": partial(plainly, cloob_reference),
    "streamed": partial(plainly, cloob_streamed),
    "module": by_module,
    "module reference": partial(by_module, backend="reference"),
    "module streamed": partial(by_module, backend="streamed"),
    "cached": partial(by_module, cached=True),
    "cached streamed": partial(by_module, cached=True, backend="streamed"),
}


@pytest.mark.filterwarnings(
    "ignore:.* has rows of length:UserWarning"
)  # of few dimensions in bfloat16
@pytest.mark.parametrize("path", PATHS)
@given(case=cases())
@settings(max_examples=60)
def test_the_objective_is_the_loop(path, case):
    def loop(x, y, inv_tau, beta, bias):
        return objective_loop(
            x, y, inv_tau, beta, bias=bias, ids=case.ids, **case.member, **case.margin
        )

    retrieved = case.beta if case.member["hopfield"] else 0.0
    steepness = case.inv_tau * (1 + retrieved) + abs(case.bias)
    size = 2 / case.inv_tau if case.member["scale"] == "paper" else 1.0
    if case.member["contrast"] == "sigmoid":
        size = case.n
    found = lambda *_: PATHS[path](case)  # noqa: E731
    assert_equals(loop, found, case.inputs, steepness, size, (path, case))


DIRECTIONS = st.builds(
    SimpleNamespace,
    name=st.sampled_from(DIRECTION_NAMES),
    n=st.integers(1, 7),
    before=st.integers(0, 5),
    after=st.integers(1, 5),
    ids=IDS_OR_NONE,
    exclude_above=MARGINS,
    id_dtype=st.sampled_from([torch.int64, torch.int32, torch.int8]),
    inv_tau=st.sampled_from([30.0, 1e-3, 1.0, 1e3]),
    bias=st.sampled_from([-10.0, 3.5, -1e3]),
    dtype=st.sampled_from(DTYPES[:2]),
    contiguous=st.booleans(),
    seed=st.integers(0, 10**6),
)


@BACKENDS
@given(case=DIRECTIONS)
@settings(max_examples=100)
def test_one_direction_is_the_loop(path, case):
    """The positives of n anchors stand in the middle of the candidates, as those of a
    rank do.
    """
    name = case.name
    first, last = case.before, case.before + case.n
    m = last + case.after
    own = {}
    if case.ids is not None:
        own = {"ids": case.ids[first:last], "candidate_ids": case.ids[:m]}
    tensors = {key: torch.tensor(ids, dtype=case.id_dtype) for key, ids in own.items()}
    margin = {"exclude_above": case.exclude_above}
    sides = [
        rows(k, 5, case.seed + k, case.dtype, case.contiguous, False)
        for k in (case.n, m)
    ]
    is_sigmoid = name == "sigmoid_loss"

    def loop(a, c, t, b):
        if is_sigmoid:
            return sigmoid_loop(a, c, t, b, first, **own, **margin)
        contrast = name.replace("_", "")
        return contrast_loop(contrast, a, c, t, first, **own, **margin)

    def loss(a, c, t, b):
        scales = (t, b) if is_sigmoid else (t,)
        direction = getattr(path, name)
        return direction(a, c, *scales, positive_offset=first, **tensors, **margin)

    inputs = [*sides, *scalars(case.inv_tau, case.bias)]
    found = partial(value_and_gradients, loss)
    steepness = case.inv_tau + abs(case.bias)
    assert_equals(loop, found, inputs, steepness, m if is_sigmoid else 1)


@BACKENDS
@given(
    n=st.integers(1, 8),
    m=st.integers(1, 8),
    beta=BETAS,
    dtype=st.sampled_from(DTYPES),
    contiguous=st.booleans(),
    twice=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100)
def test_retrieval_is_the_loop(path, n, m, beta, dtype, contiguous, twice, seed):
    """From a memory of other patterns, of which one may be there twice; each element
    weighed at random.
    """
    weights = torch.randn(n, 4, generator=seeded(seed), dtype=torch.float64)
    state = rows(n, 4, seed, dtype, contiguous, False)
    stored = rows(m, 4, seed + 1, dtype, contiguous, twice)

    def loop(state, stored, beta):
        found = retrieval_loop(state, stored, beta)
        return sum(map(dot, weights.tolist(), found))

    def loss(state, stored, beta):
        found = path.hopfield_retrieval(state, stored, beta)
        return (found * weights.to(found.dtype)).sum()

    inputs = [state, stored, *scalars(beta)]
    assert_equals(loop, partial(value_and_gradients, loss), inputs, beta, n)


@BACKENDS
@pytest.mark.parametrize("ids", [None, [0, 1, 0]], ids=["", "ids"])
@pytest.mark.parametrize("inv_tau", [1e3, 1e5])
def test_far_from_overflow_in_float32(path, ids, inv_tau):
    """Masks are −∞: at 1e5 a sentinel of −1e4 would win against the negative."""
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    own = None
    if ids is None:
        axis = axis[:2]
    else:
        own = torch.tensor(ids)

    def of(name, anchors, candidates):
        args = (inv_tau, 0.0) if name == "sigmoid_loss" else (inv_tau,)
        direction = getattr(path, name)

        def loss(a, c):
            return direction(a, c, *args, ids=own)

        value, *gradients = value_and_gradients(loss, anchors, candidates)
        for g in gradients:
            assert g.isfinite().all()
        return value.item()

    # Each anchor has its positive at cosine 1 and its one negative at −1, or the other
    # way round; with ids anchor 1 has two negatives.
    two, negatives = (0.0, 1.0) if ids is None else (math.log(2) / 3, 4 / 3)
    right = {name: of(name, axis, axis) for name in DIRECTION_NAMES}
    expected = {"info_loob": two - 2 * inv_tau, "info_nce": 0.0, "sigmoid_loss": 0.0}
    assert right == pytest.approx(expected)
    wrong = {name: of(name, axis, -axis) for name in DIRECTION_NAMES}
    both = two + 2 * inv_tau
    wanted = {
        "info_loob": both,
        "info_nce": both,
        "sigmoid_loss": inv_tau * (1 + negatives),
    }
    assert wrong == pytest.approx(wanted)


@BACKENDS
@pytest.mark.parametrize("name", DIRECTION_NAMES[:2])
def test_an_anchor_without_negatives_adds_zero_value_and_gradient(path, name):
    anchors = unit(3, 4, 0)
    candidates = unit(4, 4, 1)
    sevens = torch.full((4,), 7)

    def direction(ids):
        own = torch.tensor(ids)
        return lambda a, c, t: getattr(path, name)(
            a, c, t, ids=own, candidate_ids=sevens
        )

    loss, *gradients = value_and_gradients(
        direction([7, 7, 7]), anchors, candidates, torch.tensor(30.0)
    )
    assert loss == 0
    for g in gradients:
        assert not g.any()
    loss, d_anchors, *_ = value_and_gradients(
        direction([7, 1, 2]), anchors, candidates, torch.tensor(30.0)
    )
    rows = (anchors.tolist(), candidates.tolist())
    expected = contrast_loop(name.replace("_", ""), *rows, 30.0, 0, [7, 1, 2], [7] * 4)
    assert loss.item() == pytest.approx(expected)
    assert not d_anchors[0].any()
    assert d_anchors[1:].isfinite().all()
    assert d_anchors[1:].any(dim=1).all()


@BACKENDS
@pytest.mark.parametrize("beta", [2.0, 100.0])
def test_an_average_of_zero_stays_zero_with_zero_gradient(path, beta):
    stored = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    state = torch.tensor([[0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    found = path.hopfield_retrieval(state, stored, beta)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1, 0].item() == pytest.approx(1.0)
    found[0].sum().backward()
    assert not state.grad.any()
    assert not stored.grad.any()


@BACKENDS
def test_a_row_that_is_not_finite_is_not_hidden(path):
    """Where nothing looks at the rows, as in a compiled graph, the loss has to say
    so.
    """
    stored = unit(4, 3)
    stored[2, 0] = math.nan
    assert path.hopfield_retrieval(stored[:2], stored, 8.0).isnan().all()


ROWS = torch.ones(3, 4)
NARROW = torch.ones(3, 2)
DIRECTION = {"anchors": ROWS, "candidates": ROWS, "inv_tau": 30.0}
RETRIEVAL = {"state": ROWS, "stored": ROWS, "beta": 8.0}
OBJECTIVE = {"image_features": ROWS, "text_features": ROWS, "inv_tau": 30.0}
IDS = torch.tensor([1, 2, 3])


NOT_RETRIEVING = {"scale": "unit", "hopfield": False}
ERRORS_OF_A_DIRECTION = [
    ({"anchors": ROWS[0]}, r"anchors has shape \(4,\) .* floating-point matrix"),
    ({"candidates": NARROW}, "candidates has embedding dimension 2, but anchors has 4"),
    ({"candidates": ROWS.double()}, "candidates has dtype torch.float64, but anchors"),
    ({"candidates": ROWS.to("meta")}, "candidates has device meta, but anchors has"),
    ({"candidates": ROWS.long()}, "candidates has shape .* dtype torch.int64"),
    ({"anchors": ROWS[:1], "candidates": ROWS[:1]}, "1 anchors, 1 candidates"),
    ({"positive_offset": 1}, "3 candidates and positive_offset 1"),
    ({"positive_offset": -1}, "positive_offset -1"),
    ({"inv_tau": torch.tensor(math.nan)}, "inv_tau is nan; a positive"),
    ({"ids": IDS[:2]}, r"ids has shape \(2,\) .*; 3 integers on cpu are expected"),
    ({"ids": torch.ones(3)}, r"ids has shape \(3,\) and dtype torch.float32"),
    ({"ids": IDS.to("meta")}, "ids has .* on meta"),
    ({"candidate_ids": IDS}, "ids of 3 anchors and candidate_ids"),
    ({"ids": IDS[:2], "anchors": ROWS[:2]}, "candidate_ids of 3 candidates"),
]
ERRORS_OF_RETRIEVAL = [
    ({"beta": 0.0}, r"beta is 0\.0; a positive"),
    ({"beta": torch.ones(2)}, r"beta has shape \(2,\); a single number"),
]
ERRORS_OF_THE_OBJECTIVE = [
    ({"text_features": ROWS[:2]}, "3 image_features and 2 text_features"),
    (
        {"image_features": ROWS[:1], "text_features": ROWS[:1]},
        "at least 2 .* drop_last",
    ),
    ({"contrast": "infonoc"}, "contrast is 'infonoc'; one of 'infoloob', 'infonce', "),
    ({"scale": "mean"}, "scale is 'mean'; one of 'paper', 'unit' is expected"),
    ({"contrast": "sigmoid"}, "contrast='sigmoid' needs scale='unit'"),
    (
        {"contrast": "sigmoid", "scale": "unit", "hopfield": True},
        "contrast='sigmoid' needs hopfield=False",
    ),
    (
        {"contrast": "sigmoid", "bias": math.nan} | NOT_RETRIEVING,
        "bias is nan; a finite",
    ),
]
DIRECTIONS_OF_PATHS = [
    getattr(path, name) for path in (functional, streamed) for name in DIRECTION_NAMES
]
CALLS = {
    "direction": (DIRECTIONS_OF_PATHS, DIRECTION, ERRORS_OF_A_DIRECTION),
    "retrieval": (
        [functional.hopfield_retrieval, streamed.hopfield_retrieval],
        RETRIEVAL,
        ERRORS_OF_RETRIEVAL,
    ),
    "objective": (
        [cloob_reference, cloob_streamed],
        OBJECTIVE,
        ERRORS_OF_THE_OBJECTIVE,
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_errors_name_the_argument(call):
    """By both paths, and in each direction."""
    functions, usual, errors = CALLS[call]
    for function in functions:
        for change, message in errors:
            with pytest.raises(ValueError, match=message):
                function(**usual | change)


def test_what_is_no_tensor_is_refused():
    for function in DIRECTIONS_OF_PATHS:
        with pytest.raises(TypeError, match="anchors is a NoneType"):
            function(**DIRECTION | {"anchors": None})
