"""The module: its members, scales and state, choice of path, and what it refuses.

That it computes the formula: ``functional/test_matrix.py``; over ranks:
``test_distributed.py``; how often it waits: ``test_waits.py``."""

import copy
import json
import math
import pickle
import warnings
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import cloob
from cloob.family import CONTRASTS, FAMILY, Contrast, ContrastRow
from cloob.functional import cloob_reference
from cloob.interop.negatives import contrast_with_negatives
from cloob.objective import (
    OBJECTIVES,
    PAPER_OBJECTIVES,
    ContrastiveObjective,
    NonFiniteFeaturesError,
    make_objective,
)
from cloob.scales import FixedScaleWarning
from paper_loops import pairs, relative_error, value_and_gradients
from support import raises, seeded

both_backends = pytest.mark.parametrize("backend", ["reference", "streamed"])
X, Y = pairs(6, 5)
exactly = {"rtol": 0, "atol": 0}


def learnable(name):
    """A member all of whose scales learn."""
    retrieves = FAMILY[name].hopfield
    return make_objective(name, learnable_inv_tau=True, learnable_beta=retrieves)


# Members


def test_members_by_name():
    assert tuple(FAMILY) == OBJECTIVES
    assert tuple(CONTRASTS) == get_args(Contrast)
    assert [make_objective(name).name for name in OBJECTIVES] == [*OBJECTIVES]
    config = ContrastiveObjective().config()
    paper = {"contrast": "infoloob", "hopfield": True, "scale": "paper"}
    assert config == config | paper | {"inv_tau": 30.0, "beta": 8.0}
    assert make_objective("cloob").config() == config
    between = ContrastiveObjective.cloob(contrast="infonce", inv_tau=5.0)
    same = make_objective("infonce-hopfield", inv_tau=5.0)
    assert same.config() == between.config()
    message = "objective is 'clop'; one of 'clip', 'infoloob', 'infonce-hopfield',"
    raises(ValueError, message, make_objective, "clop")


def test_a_new_contrast_is_a_function_and_a_row(monkeypatch):
    """Without a fast path it runs in the reference form."""

    def hinge(anchors, candidates, inv_tau, *, positive_offset=0, ids=None):
        logits = inv_tau * anchors @ candidates.T
        return (1 + logits - logits.diagonal()[:, None]).relu().mean()

    monkeypatch.setitem(CONTRASTS, "hinge", ContrastRow("hinge", "a hinge"))
    monkeypatch.setattr("cloob.functional.reference.hinge", hinge, raising=False)
    objective = ContrastiveObjective(
        contrast="hinge", hopfield=False, scale="unit", inv_tau=2.0
    )
    expected = (hinge(X, Y, 2.0) + hinge(Y, X, 2.0)) / 2
    assert_close(objective(X, Y), expected)
    assert objective.name == "hinge"


LOSSES_OF_OPEN_CLIP = [
    ("clip", "ClipLoss", {"log_inv_tau": math.log(1 / 0.07)}, [12.0]),
    (
        "siglip",
        "SigLipLoss",
        {"log_inv_tau": math.log(10), "bias": -10.0},
        [12.0, -4.0],
    ),
]


@pytest.mark.parametrize(
    ("name", "theirs", "start", "given"),
    LOSSES_OF_OPEN_CLIP,
)
def test_clip_and_siglip_are_open_clips_losses(name, theirs, start, given):
    """``logit_scale`` and ``logit_bias`` take the places of their own, as open_clip's
    trainer hands them over.
    """
    loss = getattr(pytest.importorskip("open_clip.loss"), theirs)()
    objective = make_objective(name)
    starts = {key: p.item() for key, p in objective.named_parameters()}
    assert starts == pytest.approx(start)

    def ours(*values):
        return objective(*values, output_dict=True)["contrastive_loss"]

    scalars = torch.tensor(given, dtype=torch.float64)
    expected = value_and_gradients(loss, X, Y, *scalars)
    found = value_and_gradients(ours, X, Y, *scalars)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


@both_backends
@pytest.mark.parametrize("hopfield", [True, False])
def test_a_call_says_whether_to_retrieve(hopfield, backend):
    """The loss and gradient of the member that a call asks for, whichever it was made
    as; the module stays as it is.
    """
    made = ContrastiveObjective(hopfield=not hopfield, backend=backend)
    wanted = ContrastiveObjective(hopfield=hopfield, backend=backend)
    before = made.config()
    called = value_and_gradients(made, X, Y, hopfield=hopfield)
    expected = value_and_gradients(wanted, X, Y)
    assert_close(called, expected, **exactly)
    assert abs(made(X, Y) - called[0]) > 1e-3
    assert made.config() == before


# Scales and state


@pytest.mark.parametrize("name", OBJECTIVES)
def test_config_is_json_and_builds_the_same_objective(name):
    objective = learnable(name)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.25
    config = json.loads(json.dumps(objective.config()))
    start = make_objective(name).inv_tau.item()
    assert config["inv_tau"] == pytest.approx(start * math.exp(0.25), rel=1e-6)
    assert config.get("bias") == (-9.75 if name == "siglip" else None)
    again = ContrastiveObjective(**config)
    assert again.config().keys() == config.keys()
    assert_close(again.state_dict(), objective.state_dict())
    fresh = learnable(name)
    fresh.load_state_dict(objective.state_dict())
    assert fresh.config() == objective.config()


@pytest.mark.parametrize("name", PAPER_OBJECTIVES)
def test_a_temperature_that_learns_takes_the_mean_since_the_papers_scale_only_raises_it(
    name,
):
    assert make_objective(name, learnable_inv_tau=True).scale == "unit"
    message = "learnable_inv_tau=True needs scale='unit'"
    paper = {"scale": "paper"}
    raises(ValueError, message, make_objective, name, learnable_inv_tau=True, **paper)
    # pairs that have nothing to do with each other: the temperature should fall
    contrast, hopfield = FAMILY[name][:2]
    for scale, rises in (("paper", True), ("unit", False)):
        start = torch.tensor(math.log(30.0), dtype=torch.float64)
        _, slope = value_and_gradients(
            lambda log_inv_tau, s=scale: cloob_reference(
                X, Y, log_inv_tau.exp(), scale=s, contrast=contrast, hopfield=hopfield
            ),
            start,
        )
        assert (slope < 0) == rises
    given = torch.tensor(30.0, requires_grad=True)
    objective = make_objective(name, learnable_inv_tau=False, **paper)
    message = "logit_scale learns, which needs scale='unit'"
    for logit_scale in (given, given.log().exp()):
        raises(ValueError, message, objective, X, Y, logit_scale=logit_scale)
    with torch.no_grad():  # an evaluation of the same model
        assert objective(X, Y, logit_scale=given) == objective(X, Y, 30.0)


@pytest.fixture
def beyond():
    """CLIP's objective after a last step that has left the bound."""
    objective = ContrastiveObjective.clip()
    objective.log_inv_tau.data.fill_(math.log(250.0))
    return objective


def test_a_learnable_scale_is_bounded_by_100(beyond):
    """Its value always, its parameter in training."""
    fixed = ContrastiveObjective.clip(inv_tau=100.0, learnable_inv_tau=False)
    assert beyond.eval()(X, Y).item() == pytest.approx(fixed(X, Y).item(), rel=1e-5)
    assert beyond.log_inv_tau.item() == pytest.approx(math.log(250.0))
    for training in (False, True):
        # a float32 logarithm of 100 is a little above it
        again = ContrastiveObjective(**beyond.config())
        for objective in (beyond, again):
            assert objective.inv_tau.item() == pytest.approx(100.0)
        beyond.train(training)(X, Y).backward()
    assert beyond.log_inv_tau.item() == pytest.approx(math.log(100.0))
    assert beyond.log_inv_tau.grad != 0  # at its bound it still learns
    message = "inv_tau is 250; a learnable one is kept at 100 or below"
    raises(ValueError, message, ContrastiveObjective.clip, inv_tau=250.0)


@pytest.mark.parametrize("name", ["cloob", "siglip"])
def test_fixed_scales_and_siglips_have_no_bound(name):
    objective = make_objective(name, inv_tau=250.0)
    objective.train().clamp_()
    assert objective.inv_tau.item() == pytest.approx(250.0)


def test_graphs_that_hold_a_bounded_parameter_stay_right(beyond):
    prior = 2 * beyond.log_inv_tau**2
    (beyond(X, Y) + prior).backward()
    assert beyond.log_inv_tau.item() == pytest.approx(math.log(100.0))
    given = torch.tensor(1.6, requires_grad=True)
    computed = given.exp()  # exp(1.6) = 4.95 is over the bound
    torch.func.functional_call(beyond, {"log_inv_tau": computed}, (X, Y)).backward()
    assert given.grad.isfinite()
    assert computed == given.exp()


def test_a_given_logit_scale_takes_the_place_of_inv_tau_and_learns():
    x = X.float()
    y = Y.float()
    scale = torch.tensor(12.0, requires_grad=True)
    objective = ContrastiveObjective.cloob(scale="unit")
    found = objective(x, y, scale, output_dict=True)
    assert list(found) == ["contrastive_loss"]
    same = ContrastiveObjective.cloob(inv_tau=12.0, scale="unit")
    assert found["contrastive_loss"] == same(x, y) == objective(x, y, 12.0)
    found["contrastive_loss"].backward()
    assert scale.grad.isfinite()
    assert scale.grad != 0
    bias = torch.tensor(-10.0)  # cancels
    assert objective(x, y, 12.0, bias) == objective(x, y, 12.0)


@pytest.mark.parametrize(
    ("name", "call", "without_part"),
    [
        ("cloob", {"hopfield": False}, "log_beta"),
        ("clip", {"logit_scale": 20.0}, "log_inv_tau"),
        ("siglip", {"logit_bias": torch.tensor(-5.0)}, "bias"),
    ],
)
def test_a_parameter_without_a_part_has_a_gradient_of_zero(name, call, without_part):
    """Else DDP stops."""
    objective = learnable(name)
    objective(X, Y, **call).backward()
    for key, parameter in objective.named_parameters():
        assert (parameter.grad == 0) == (key == without_part)


def test_another_fixed_value_is_taken_and_told():
    objective = ContrastiveObjective(inv_tau=30.0)
    saved = ContrastiveObjective(inv_tau=50.0, beta=8.0)
    message = "inv_tau was 30 and is 50 now, as in the state that was loaded"
    with pytest.warns(FixedScaleWarning, match=message) as told:
        assert objective.load_state_dict(saved.state_dict()).missing_keys == []
    assert told[0].filename == __file__
    assert objective(X, Y) == saved(X, Y) != ContrastiveObjective(inv_tau=30.0)(X, Y)
    assert objective.config() == saved.config()
    assert objective.inv_tau.item() == 50.0
    objective.load_state_dict(saved.state_dict())  # the same values: nothing to tell


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_state_with_a_scale_that_is_none_is_refused(value):
    state = ContrastiveObjective().state_dict() | {"fixed_beta": torch.tensor(value)}
    load = ContrastiveObjective().load_state_dict
    raises(RuntimeError, r"fixed_beta is .*; a positive, finite number", load, state)
    del state["fixed_beta"]
    raises(RuntimeError, r"Missing key.*fixed_beta", load, state)


def test_a_state_without_a_bias_is_refused():
    state = make_objective("clip").state_dict()
    load = make_objective("siglip").load_state_dict
    raises(RuntimeError, 'Missing key.*"bias"', load, state)


def test_a_fixed_number_survives_copies_and_casts():
    objective = ContrastiveObjective(inv_tau=30.0)
    saved = ContrastiveObjective(inv_tau=1 / 0.07).state_dict()
    with pytest.warns(FixedScaleWarning):
        objective.load_state_dict(saved)
    copied = copy.deepcopy(objective)
    pickled = pickle.loads(pickle.dumps(objective))
    on_meta = copy.deepcopy(objective).to("cpu", torch.bfloat16).to("meta")
    for other in (copied, pickled, on_meta.to_empty(device="cpu")):
        assert other.config()["inv_tau"] == 1 / 0.07
        assert_close(other.state_dict(), saved, **exactly)


@pytest.mark.parametrize("name", ["siglip", "infonce-hopfield"])
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        ("half", torch.float32),
        ("bfloat16", torch.float32),
        ("double", torch.float64),
    ],
)
def test_learned_scales_are_cast_to_no_lower_precision(cast, dtype, name):
    objective = learnable(name)
    objective(X.float(), Y.float()).backward()
    scales = dict(objective.named_parameters())
    values = {key: (p.clone(), p.grad.clone()) for key, p in scales.items()}
    objective.head = nn.Linear(2, 2)  # of a subclass: cast as usual
    getattr(objective, cast)()
    assert objective.head.weight.dtype == getattr(torch, cast)
    for key, scale in scales.items():
        assert objective.get_parameter(key) is scale  # which an optimiser holds
        assert scale.dtype == dtype
        now = (scale, scale.grad)
        assert_close(now, values[key], check_dtype=False, **exactly)
    found = {p.dtype for p in objective.float().parameters()}
    assert found == {torch.float32}


# Precision


@pytest.mark.parametrize(("n", "made"), [(16, True), (255, True), (64, False)])
def test_the_gradient_of_rows_in_a_cone_is_right_whenever_it_retrieves(n, made):
    """As where untrained towers begin: the plain form is off by 4 to 94 % there
    (docs/own-loop.md).
    """
    drawn = seeded(0)
    cone = 12.6 * torch.randn(1, 512, generator=drawn)
    cause = cone + torch.randn(n, 512, generator=drawn)
    noise = torch.randn(2, n, 512, generator=drawn) / 3
    x, y = F.normalize(cause + noise, dim=2)
    reference = ContrastiveObjective(backend="reference")
    exact = value_and_gradients(reference, x.double(), y.double())
    chosen = ContrastiveObjective(hopfield=made)
    found = value_and_gradients(chosen, x, y, hopfield=True)
    assert max(map(relative_error, found, exact)) < 1e-2


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}


class _TF32(TorchDispatchMode):
    """Rounds the inputs of matrix products as a GPU does while torch says so."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
        if func.overloadpacket in PRODUCTS and precision == "tf32":
            args = list(map(self.rounded, args))
        return func(*args, **(kwargs or {}))

    def rounded(self, value):
        if value.ndim != 2:
            return value
        return (value.view(torch.int32) + 2**12 & -(2**13)).view(value.dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("newer", [False, True])
def test_tf32_changes_nothing(name, newer):
    """The products of the loss and of its gradient are in float32, by whichever of
    torch's interfaces TF32 is on.
    """
    matmul = torch.backends.cuda.matmul
    if newer and not hasattr(matmul, "fp32_precision"):
        pytest.skip("from torch 2.9 on")
    x, y = pairs(40, 32, dtype=torch.float32)
    expected = value_and_gradients(make_objective(name, backend="streamed"), x, y)
    try:
        if newer:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with _TF32():
            rounded = x @ y.T
            found = value_and_gradients(make_objective(name), x, y)
        assert not newer or matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(rounded, x @ y.T)
    assert_close(found, expected, **exactly)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_backward_pass_inside_autocast_is_as_outside(name):
    """Of rows that are alike, as those of fresh towers."""
    generator = seeded(0)
    axis = F.normalize(torch.randn(128, generator=generator), dim=0)
    rows = F.normalize(torch.randn(64, 128, generator=generator), dim=1)
    x, y = (F.normalize(axis + side / 3, dim=1) for side in (rows, rows.roll(1, 1)))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(make_objective(name)(x, y), x)
        loss = make_objective(name)(x, y)
    (outside,) = torch.autograd.grad(loss, x)
    assert relative_error(inside, outside) < 1e-5


@both_backends
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sides_of_other_precisions_are_lifted(backend, low):
    objective = ContrastiveObjective(backend=backend)
    x = X.to(low)
    y = Y.float()
    loss, by_x, by_y = value_and_gradients(objective, x.float(), y)
    found = value_and_gradients(objective, x, y)
    assert_close(found, [loss, by_x.to(low), by_y], **exactly)


# What is refused, and what is told


def spoil(rows, row, value):
    rows = rows.clone()
    rows[row, 1 if value else slice(None)] = value
    return rows


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("value", "what"),
    [(math.nan, "not finite"), (-math.inf, "not finite"), (0.0, "zero")],
)
def test_bad_rows_are_named(value, what, name):
    objective = make_objective(name)
    two = spoil(spoil(Y, 3, value), 1, value)
    message = f"text_features: 2 of 6 rows are bad; row 1 is {what}"
    raises(NonFiniteFeaturesError, message, objective, X, two)
    one = spoil(X, 4, value)
    message = f"image_features: 1 of 6 rows are bad; row 4 is {what}"
    raises(ValueError, message, objective, one, Y)


def refused(message, **options):
    raises(ValueError, message, ContrastiveObjective, **options)


def test_wrong_names_and_numbers_are_refused():
    said = "contrast is 'infonoc'; one of 'infoloob', 'infonce', 'sigmoid' is exp"
    refused(said, contrast="infonoc")
    refused("backend is 'cuda'; one of 'auto', 'reference', 'streamed'", backend="cuda")
    said = "matmul is 'float16'; one of 'float32', 'bfloat16'"
    refused(said, matmul="float16")
    refused(r"inv_tau is 1e-320; a positive", inv_tau=1e-320)
    refused(r"inv_tau is -1\.0", inv_tau=-1.0, learnable_inv_tau=True)
    refused("exclude_above is nan; a finite number", exclude_above=math.nan)
    refused("beta is inf", beta=math.inf, learnable_beta=True)


def test_settings_that_exclude_each_other_are_refused():
    said = "matmul='bfloat16' needs backend='streamed'"
    refused(said, matmul="bfloat16", backend="reference")
    said = "learnable_beta=True needs hopfield=True"
    refused(said, hopfield=False, learnable_beta=True)
    refused("bias needs contrast='sigmoid'", bias=-1.0)
    refused("contrast='sigmoid' needs hopfield=False", contrast="sigmoid")
    sigmoid = {"contrast": "sigmoid", "hopfield": False}
    refused("bias is inf; a finite number", **sigmoid, bias=math.inf)
    refused("contrast='sigmoid' needs scale='unit'", **sigmoid, scale="paper")


@both_backends
def test_wrong_batches_are_refused(backend):
    objective = ContrastiveObjective(backend=backend)
    raises(TypeError, "text_features is a NoneType", objective, X, None)
    raises(ValueError, r"inv_tau is 0\.0", objective, X, Y, 0.0)
    raises(ValueError, r"inv_tau has shape \(4,\)", objective, X, Y, torch.ones(4))
    message = r"gather=True needs a process group: start with torchrun.* gather='auto'"
    raises(RuntimeError, message, ContrastiveObjective(gather=True), X, Y)
    alone = ContrastiveObjective(gather="auto", backend=backend)
    assert alone(X, Y) == objective(X, Y)
    message = "contrast is 'sigmoid'; one of 'infoloob', 'infonce' is expected"
    siglip = make_objective("siglip")
    raises(ValueError, message, contrast_with_negatives, siglip, X, Y, X)


@both_backends
def test_values_may_go_unchecked(backend):
    unchecked = ContrastiveObjective(backend=backend, check=False, hopfield=False)
    assert unchecked.config()["check"] is False
    assert unchecked(3 * X, Y).isfinite()
    assert not unchecked(spoil(X, 1, math.nan), Y).isfinite()


CONE = F.normalize(4 + torch.randn(64, 32, generator=torch.manual_seed(0)), dim=1)
LN_100 = math.log(100)
LEARNED = torch.tensor(math.log(1 / 0.07), requires_grad=True)


WARNINGS = [
    ("cloob", (X, 3 * Y), r"text_features has rows of length 3 to 3, but .* unit"),
    ("cloob", (0.5 * X, Y), r"image_features has rows of length 0\.5 to 0\.5"),
    ("cloob", (CONE, CONE), r"mean cosine of 0\.\d+"),
    ("infoloob", (CONE, CONE), "ends at its bound"),
    ("clip", (CONE, CONE, LEARNED), r"logit_scale is 2\.659, which is ln\(1/0\.07"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "sides", "message"),
    WARNINGS,
)
def test_the_mistakes_of_copies_are_told_of_once(name, sides, message):
    objective = make_objective(name, learnable_inv_tau=name != "cloob")
    with pytest.warns(UserWarning, match=message) as told:
        objective(*sides)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(*sides)


@pytest.mark.filterwarnings("default")
def test_a_fixed_logarithm_is_told_of():
    with pytest.warns(UserWarning, match=r"inv_tau is 4\.605, which is ln 100"):
        ContrastiveObjective(inv_tau=LN_100)


@pytest.mark.filterwarnings("error")
def test_what_is_no_mistake_is_not_told_of():
    make_objective("infoloob")(CONE, CONE)
    make_objective("clip")(CONE, CONE)
    make_objective("clip", inv_tau=4.9, learnable_inv_tau=False)
    for low in (torch.bfloat16, torch.float16):
        sides = (F.normalize(side.to(low), dim=1) for side in (X, Y))
        ContrastiveObjective()(*sides)


def test_ids_come_as_texts_from_numpy_and_as_a_list():
    np = pytest.importorskip("numpy")
    names = ["a", "b", "a", "c", "d", "e"]
    numbers = [0, 1, 0, 2, 3, 4]
    expected = cloob.ids(iter(names)).tolist()
    assert cloob.ids(names).tolist() == expected
    assert cloob.ids(torch.tensor([1, 2])).tolist() == cloob.ids([1, 2]).tolist()
    assert len({*cloob.ids(["\ud800", "\udcff", "C", "c"]).tolist()}) == 4
    objective = make_objective("infoloob")
    loss = objective(X, Y, ids=cloob.ids(names))
    assert loss == objective(X, Y, ids=np.array(numbers)) != objective(X, Y)
    assert loss == objective(X, Y, ids=numbers)
    raises(TypeError, r"cloob\.ids", objective, X, Y, ids=names)
