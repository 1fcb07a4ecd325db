"""The module: its members, scales and state, choice of path, and what it refuses.

That it computes the formula: ``functional/test_matrix.py``; over ranks:
``test_distributed.py``."""

import copy
import json
import math
import pickle
import warnings
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cloob
from cloob.family import CONTRASTS, FAMILY, Contrast, ContrastRow
from cloob.functional import cloob_reference, reference
from cloob.functional.streamed import tiles
from cloob.interop.negatives import contrast_with_negatives
from cloob.objective import (
    OBJECTIVES,
    PAPER_OBJECTIVES,
    ContrastiveObjective,
    NonFiniteFeaturesError,
    make_objective,
)
from cloob.scales import FixedScaleWarning
from paper_loops import MEMBERS, pairs, relative_error, value_and_gradients
from support import raises

both_backends = pytest.mark.parametrize("backend", ["reference", "streamed"])


def test_members_by_name():
    assert tuple(FAMILY) == OBJECTIVES and tuple(CONTRASTS) == get_args(Contrast)
    assert [make_objective(name).name for name in OBJECTIVES] == [*OBJECTIVES]
    config = ContrastiveObjective().config()
    assert config == config | {
        "contrast": "infoloob",
        "hopfield": True,
        "scale": "paper",
        "inv_tau": 30.0,
        "beta": 8.0,
    }
    assert make_objective("cloob").config() == config
    between = make_objective("infonce-hopfield", inv_tau=5.0).config()
    assert (
        between == ContrastiveObjective.cloob(contrast="infonce", inv_tau=5.0).config()
    )
    with pytest.raises(
        ValueError,
        match=(
            "objective is 'clop'; one of 'clip', 'infoloob', 'infonce-hopfield',"
            " 'cloob'"
        ),
    ):
        make_objective("clop")


def test_a_new_contrast_is_a_function_and_a_row(monkeypatch):
    """Without a fast path it runs in the reference form."""

    def hinge(anchors, candidates, inv_tau, *, positive_offset=0, ids=None):
        logits = inv_tau * anchors @ candidates.T
        return (1 + logits - logits.diagonal()[:, None]).relu().mean()

    monkeypatch.setitem(CONTRASTS, "hinge", ContrastRow("hinge", "a hinge"))
    monkeypatch.setattr("cloob.functional.reference.hinge", hinge, raising=False)
    x, y = pairs(6, 5)
    for hopfield in (True, False):
        objective = ContrastiveObjective(
            contrast="hinge", hopfield=hopfield, scale="unit", inv_tau=2.0
        )
        u_x, u_y, v_x, v_y = reference.retrieve(x, y, 8.0) if hopfield else (x, y, x, y)
        expected = (
            hinge(u_x, u_y, torch.tensor(2.0)) + hinge(v_y, v_x, torch.tensor(2.0))
        ) / 2
        torch.testing.assert_close(objective(x, y), expected)
        assert objective.name == "hinge"


@pytest.mark.parametrize(
    ("name", "theirs", "start", "given"),
    [
        ("clip", "ClipLoss", {"log_inv_tau": math.log(1 / 0.07)}, (12.0,)),
        (
            "siglip",
            "SigLipLoss",
            {"log_inv_tau": math.log(10), "bias": -10.0},
            (12.0, -4.0),
        ),
    ],
)
def test_clip_and_siglip_are_open_clips_losses(name, theirs, start, given):
    """``logit_scale`` and ``logit_bias`` take the places of their own, as open_clip's
    trainer hands them over.
    """
    objective = make_objective(name)
    assert {key: p.item() for key, p in objective.named_parameters()} == pytest.approx(
        start
    )
    loss = getattr(pytest.importorskip("open_clip.loss"), theirs)()
    inputs = (
        *pairs(7, 5),
        *(torch.tensor(value, dtype=torch.float64) for value in given),
    )
    ours = value_and_gradients(
        lambda *values: objective(*values, output_dict=True)["contrastive_loss"],
        *inputs,
    )
    torch.testing.assert_close(
        ours, value_and_gradients(loss, *inputs), rtol=1e-12, atol=1e-14
    )


@both_backends
@pytest.mark.parametrize("hopfield", [True, False])
def test_a_call_says_whether_to_retrieve(hopfield, backend):
    """The loss and gradient of the member that a call asks for, whichever it was made
    as; the module stays as it is.
    """
    made, wanted = (
        ContrastiveObjective(hopfield=h, backend=backend)
        for h in (not hopfield, hopfield)
    )
    before = made.config()
    x, y = pairs(9, 5)
    called = value_and_gradients(lambda x, y: made(x, y, hopfield=hopfield), x, y)
    for one, other in zip(called, value_and_gradients(wanted, x, y), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert abs(made(x, y) - called[0]) > 1e-3
    assert made.config() == before


def test_config_is_json_and_builds_the_same_objective():
    for name in OBJECTIVES:
        retrieves = name == "cloob" or "hopfield" in name
        objective = make_objective(
            name, learnable_inv_tau=True, learnable_beta=retrieves, matmul="bfloat16"
        )
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter += 0.25
        config = json.loads(json.dumps(objective.config()))
        assert config["inv_tau"] == pytest.approx(
            make_objective(name).inv_tau.item() * math.exp(0.25), rel=1e-6
        )
        assert config.get("bias") == (-9.75 if "siglip" in name else None)
        again = ContrastiveObjective(**config)
        assert again.config().keys() == config.keys()
        torch.testing.assert_close(again.state_dict(), objective.state_dict())
        fresh = make_objective(
            name, learnable_inv_tau=True, learnable_beta=retrieves, matmul="bfloat16"
        )
        fresh.load_state_dict(objective.state_dict())
        assert fresh.config() == objective.config()


@pytest.mark.parametrize("name", PAPER_OBJECTIVES)
def test_a_temperature_that_learns_takes_the_mean_since_the_papers_scale_only_raises_it(
    name,
):
    assert make_objective(name, learnable_inv_tau=True).scale == "unit"
    with pytest.raises(ValueError, match="learnable_inv_tau=True needs scale='unit'"):
        make_objective(name, learnable_inv_tau=True, scale="paper")
    x, y = pairs(
        8, 5
    )  # pairs that have nothing to do with each other: the temperature should fall
    for scale, rises in (("paper", True), ("unit", False)):
        log_inv_tau = torch.tensor(
            math.log(30.0), dtype=torch.float64, requires_grad=True
        )
        member = {
            "contrast": make_objective(name).contrast,
            "hopfield": make_objective(name).hopfield,
        }
        cloob_reference(x, y, log_inv_tau.exp(), scale=scale, **member).backward()
        assert log_inv_tau.grad is not None and (log_inv_tau.grad.item() < 0) == rises
    given = torch.tensor(30.0, requires_grad=True)
    objective = make_objective(name, learnable_inv_tau=False, scale="paper")
    for logit_scale in (given, given.log().exp()):
        raises(
            ValueError,
            "logit_scale learns, which needs scale='unit'",
            objective,
            x,
            y,
            logit_scale=logit_scale,
        )
    with torch.no_grad():  # an evaluation of the same model
        assert objective(x, y, logit_scale=given) == objective(x, y, 30.0)


def test_a_learnable_scale_is_bounded_by_100():
    """Its value always, its parameter in training: an optimiser's last step may end
    beyond.
    """
    objective = ContrastiveObjective.clip()
    x, y = pairs(4, 3)
    with torch.no_grad():
        objective.log_inv_tau.fill_(math.log(250.0))
    fixed = ContrastiveObjective.clip(inv_tau=100.0, learnable_inv_tau=False)
    assert objective.eval()(x, y).item() == pytest.approx(fixed(x, y).item(), rel=1e-5)
    assert objective.log_inv_tau.item() == pytest.approx(math.log(250.0))
    for training in (False, True):
        assert objective.inv_tau.item() == pytest.approx(100.0)
        again = ContrastiveObjective(
            **objective.config()
        )  # a float32 logarithm of 100 is a little above it
        assert again.inv_tau.item() == pytest.approx(100.0)
        objective.train(training)(x, y).backward()
    assert objective.log_inv_tau.item() == pytest.approx(math.log(100.0))
    assert objective.log_inv_tau.grad != 0  # at its bound it still learns
    with pytest.raises(
        ValueError, match="inv_tau is 250; a learnable one is kept at 100 or below"
    ):
        ContrastiveObjective.clip(inv_tau=250.0)
    for free in (
        ContrastiveObjective.cloob(inv_tau=250.0),
        ContrastiveObjective.siglip(inv_tau=250.0),
    ):
        free.train().clamp_()  # fixed ones and SigLIP's stay as they were asked for
        assert free.inv_tau.item() == pytest.approx(250.0)
    with torch.no_grad():  # graphs that hold the parameter stay right
        objective.log_inv_tau.fill_(math.log(250.0))
    prior = 2 * objective.log_inv_tau**2
    (objective(x, y) + prior).backward()
    assert objective.log_inv_tau.item() == pytest.approx(math.log(100.0))
    given = torch.tensor(1.6, requires_grad=True)
    computed = given.exp()  # exp(1.6) = 4.95 is over the bound
    torch.func.functional_call(objective, {"log_inv_tau": computed}, (x, y)).backward()
    assert given.grad.isfinite() and computed == given.exp()


def test_a_given_logit_scale_takes_the_place_of_inv_tau_and_learns():
    x, y = pairs(6, 5, dtype=torch.float32)
    scale = torch.tensor(12.0, requires_grad=True)
    objective = ContrastiveObjective.cloob(scale="unit")
    found = objective(x, y, scale, output_dict=True)
    assert list(found) == ["contrastive_loss"]
    same = ContrastiveObjective.cloob(inv_tau=12.0, scale="unit")
    assert found["contrastive_loss"] == same(x, y) == objective(x, y, 12.0)
    found["contrastive_loss"].backward()
    assert scale.grad.isfinite() and scale.grad != 0
    assert objective(
        x, y, logit_scale=12.0, logit_bias=torch.tensor(-10.0)
    ) == objective(x, y, 12.0)


def test_a_parameter_without_a_part_has_a_gradient_of_zero():
    """Else DDP stops."""
    x, y = pairs(6, 8)
    cloob = ContrastiveObjective(learnable_beta=True)
    cloob(x, y, hopfield=False).backward()
    assert cloob.log_beta.grad == 0
    clip = ContrastiveObjective.clip()
    clip(x, y, logit_scale=20.0).backward()
    assert clip.log_inv_tau.grad == 0
    siglip = ContrastiveObjective.siglip()
    siglip(x, y, logit_bias=torch.tensor(-5.0)).backward()
    assert (
        siglip.bias is not None
        and siglip.bias.grad == 0
        and siglip.log_inv_tau.grad != 0
    )


def test_another_fixed_value_is_taken_and_told():
    objective, saved = (
        ContrastiveObjective(inv_tau=30.0),
        ContrastiveObjective(inv_tau=50.0, beta=8.0),
    )
    with pytest.warns(
        FixedScaleWarning,
        match="inv_tau was 30 and is 50 now, as in the state that was loaded",
    ) as told:
        assert objective.load_state_dict(saved.state_dict()).missing_keys == []
    assert told[0].filename == __file__
    x, y = pairs(6, 5)
    assert objective(x, y) == saved(x, y) != ContrastiveObjective(inv_tau=30.0)(x, y)
    assert objective.config() == saved.config() and objective.inv_tau.item() == 50.0
    objective.load_state_dict(saved.state_dict())  # the same values: nothing to tell


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_state_with_a_scale_that_is_none_is_refused(value):
    state = ContrastiveObjective().state_dict()
    state["fixed_beta"] = torch.tensor(value)
    load = ContrastiveObjective().load_state_dict
    raises(RuntimeError, r"fixed_beta is .*; a positive, finite number", load, state)
    del state["fixed_beta"]
    raises(RuntimeError, r"Missing key.*fixed_beta", load, state)
    state = make_objective("clip").state_dict()
    raises(
        RuntimeError,
        'Missing key.*"bias"',
        make_objective("siglip").load_state_dict,
        state,
    )


def test_a_fixed_number_survives_copies_and_casts():
    objective, saved = (
        ContrastiveObjective(inv_tau=30.0),
        ContrastiveObjective(inv_tau=1 / 0.07).state_dict(),
    )
    with pytest.warns(FixedScaleWarning):
        objective.load_state_dict(saved)
    moved = (
        copy.deepcopy(objective)
        .to("cpu", torch.bfloat16)
        .to("meta")
        .to_empty(device="cpu")
    )
    for copied in (
        copy.deepcopy(objective),
        pickle.loads(pickle.dumps(objective)),
        moved,
    ):
        assert copied.config()["inv_tau"] == 1 / 0.07
        torch.testing.assert_close(copied.state_dict(), saved, rtol=0, atol=0)


LEARNED = {
    "siglip": {},
    "infonce-hopfield": {"learnable_inv_tau": True, "learnable_beta": True},
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_learned_scales_are_cast_to_no_lower_precision(cast, name):
    objective = make_objective(name, **LEARNED[name])
    objective.head = nn.Linear(2, 2)  # of a subclass: cast as usual
    x, y = pairs(6, 5, dtype=torch.float32)
    objective(x, y).backward()
    before = {name: p for name, p in objective.named_parameters() if p.ndim == 0}
    values = {name: (p.clone(), p.grad.clone()) for name, p in before.items()}
    getattr(objective, cast)()
    assert objective.head.weight.dtype == getattr(torch, cast)
    for name, parameter in before.items():
        assert objective.get_parameter(name) is parameter  # which an optimiser holds
        assert parameter.dtype == (torch.float64 if cast == "double" else torch.float32)
        torch.testing.assert_close(
            (parameter, parameter.grad), values[name], rtol=0, atol=0, check_dtype=False
        )
    assert {p.dtype for p in objective.float().parameters()} == {torch.float32}


@pytest.mark.parametrize(("n", "made"), [(16, True), (255, True), (64, False)])
def test_the_gradient_of_rows_in_a_cone_is_right_whenever_it_retrieves(n, made):
    """As where untrained towers begin: the plain form is off by 4 to 94 % there
    (docs/own-loop.md).
    """
    drawn = torch.Generator().manual_seed(0)
    cone = 12.6 * torch.randn(1, 512, generator=drawn)
    shared = torch.randn(n, 512, generator=drawn)
    x, y = (
        F.normalize(cone + shared + torch.randn(n, 512, generator=drawn) / 3, dim=1)
        for _ in range(2)
    )
    exact = value_and_gradients(
        ContrastiveObjective(backend="reference"), x.double(), y.double()
    )
    found = value_and_gradients(
        ContrastiveObjective(hopfield=made), x, y, hopfield=True
    )
    assert max(map(relative_error, found, exact)) < 1e-2


class _TF32(TorchDispatchMode):
    """Rounds the inputs of matrix products as a GPU does while torch says so."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.addmm,
            torch.ops.aten.addmm_,
        ):
            backend = torch.backends.cuda.matmul
            if getattr(backend, "fp32_precision", None) == "tf32" or not hasattr(
                backend, "fp32_precision"
            ):
                args = [
                    (
                        (a.view(torch.int32) + 2**12 & -(2**13)).view(a.dtype)
                        if a.ndim == 2
                        else a
                    )
                    for a in args
                ]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("newer", [False, True])
def test_tf32_changes_nothing(name, newer):
    """The products of the loss and of its gradient are in float32, by whichever of
    torch's interfaces TF32 is on.
    """
    if newer and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("from torch 2.9 on")
    x, y = pairs(40, 32, dtype=torch.float32)
    expected = value_and_gradients(make_objective(name, backend="streamed"), x, y)
    try:
        if newer:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        with _TF32():
            rounded = x @ y.T
            found = value_and_gradients(make_objective(name), x, y)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32" or not newer
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not torch.equal(rounded, x @ y.T)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_backward_pass_inside_autocast_is_as_outside(name):
    gradients = []
    for inside in (True, False):
        generator = torch.Generator().manual_seed(
            0
        )  # rows that are alike, as those of fresh towers
        axis = F.normalize(torch.randn(128, generator=generator), dim=0)
        rows = F.normalize(torch.randn(64, 128, generator=generator), dim=1)
        x, y = (F.normalize(axis + side / 3, dim=1) for side in (rows, rows.roll(1, 1)))
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = make_objective(name)(x, y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) < 1e-5


@both_backends
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_sides_of_other_precisions_are_lifted(backend, low):
    x, y = pairs(6, 5, dtype=torch.float32)
    objective = ContrastiveObjective(backend=backend)
    expected = value_and_gradients(objective, x.to(low).float(), y)
    found = value_and_gradients(objective, x.to(low), y)
    assert found[0].dtype == torch.float32 and found[0] == expected[0]
    assert torch.equal(found[1], expected[1].to(low)) and torch.equal(
        found[2], expected[2]
    )


def spoil(rows, row, value):
    rows = rows.clone()
    rows[row, 1 if value else slice(None)] = value
    return rows


@pytest.mark.parametrize(
    ("value", "what"),
    [(math.nan, "not finite"), (-math.inf, "not finite"), (0.0, "zero")],
)
def test_bad_rows_are_named(value, what):
    x, y = pairs(5, 4)
    for contrast, hopfield in MEMBERS:
        objective = ContrastiveObjective(contrast=contrast, hopfield=hopfield)
        with pytest.raises(
            NonFiniteFeaturesError,
            match=f"text_features: 2 of 5 rows are bad; row 1 is {what}",
        ):
            objective(x, spoil(spoil(y, 3, value), 1, value))
        raises(
            ValueError,
            f"image_features: 1 of 5 rows are bad; row 4 is {what}",
            objective,
            spoil(x, 4, value),
            y,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"contrast": "infonoc"},
            (
                "contrast is 'infonoc'; one of 'infoloob', 'infonce', 'sigmoid' is"
                " expected"
            ),
        ),
        (
            {"backend": "cuda"},
            "backend is 'cuda'; one of 'auto', 'reference', 'streamed'",
        ),
        ({"matmul": "float16"}, "matmul is 'float16'; one of 'float32', 'bfloat16'"),
        (
            {"matmul": "bfloat16", "backend": "reference"},
            "matmul='bfloat16' needs backend='streamed'",
        ),
        ({"inv_tau": 1e-320}, r"inv_tau is 1e-320; a positive"),
        ({"inv_tau": -1.0, "learnable_inv_tau": True}, r"inv_tau is -1\.0"),
        ({"exclude_above": math.nan}, "exclude_above is nan; a finite number"),
        ({"beta": math.inf, "learnable_beta": True}, "beta is inf"),
        ({"bias": -1.0}, "bias needs contrast='sigmoid'"),
        (
            {"contrast": "sigmoid", "hopfield": False, "bias": math.inf},
            "bias is inf; a finite number",
        ),
        (
            {"contrast": "sigmoid", "scale": "paper", "hopfield": False},
            "contrast='sigmoid' needs scale='unit'",
        ),
        ({"contrast": "sigmoid"}, "contrast='sigmoid' needs hopfield=False"),
        (
            {"hopfield": False, "learnable_beta": True},
            "learnable_beta=True needs hopfield=True",
        ),
    ],
)
def test_wrong_settings_are_refused(options, message):
    raises(ValueError, message, ContrastiveObjective, **options)


@both_backends
def test_wrong_batches_are_refused(backend):
    objective, (x, y) = ContrastiveObjective(backend=backend), pairs(4, 3)
    raises(TypeError, "text_features is a NoneType", objective, x, None)
    for scale, message in (
        (0.0, r"inv_tau is 0\.0"),
        (torch.ones(4), r"inv_tau has shape \(4,\)"),
    ):
        raises(ValueError, message, objective, x, y, logit_scale=scale)
    with pytest.raises(
        RuntimeError,
        match=r"gather=True needs a process group: start with torchrun.* gather='auto'",
    ):
        ContrastiveObjective(gather=True)(x, y)
    assert ContrastiveObjective(gather="auto", backend=backend)(x, y) == objective(x, y)
    with pytest.raises(
        ValueError,
        match="contrast is 'sigmoid'; one of 'infoloob', 'infonce' is expected",
    ):
        contrast_with_negatives(make_objective("siglip"), x, y, x)
    unchecked = ContrastiveObjective(backend=backend, check=False, hopfield=False)
    assert unchecked.config()["check"] is False and unchecked(3 * x, y).isfinite()
    assert not unchecked(spoil(x, 1, math.nan), y).isfinite()


def test_rows_that_are_no_unit_vectors_are_told_of_once():
    x, y = pairs(6, 5)
    objective = ContrastiveObjective()
    with pytest.warns(
        UserWarning, match=r"text_features has rows of length 3 to 3, but .* unit rows"
    ) as told:
        objective(x, 3 * y)
    assert told[0].filename == __file__
    objective(x, 3 * y)  # warnings are errors here
    with pytest.warns(
        UserWarning, match=r"image_features has rows of length 0\.5 to 0\.5"
    ):
        ContrastiveObjective()(0.5 * x, y)
    for low in (torch.bfloat16, torch.float16):
        ContrastiveObjective()(
            F.normalize(x.to(low), dim=1), F.normalize(y.to(low), dim=1)
        )


class _Reads(TorchDispatchMode):
    """Counts the values that are read one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(monkeypatch, **options):
    """How often a call waits for the device."""
    objective, (x, y) = (
        ContrastiveObjective(**options),
        pairs(6, 8, dtype=torch.float32),
    )
    counted, lists = _Reads(), []
    tolist = Tensor.tolist
    with monkeypatch.context() as patch, counted:
        patch.setattr(Tensor, "tolist", lambda t: (lists.append(t), tolist(t))[1])
        objective(x, y)
    return counted.count + len(lists)


@pytest.mark.filterwarnings("default")
def test_the_mistakes_of_copies_are_told_of_once():
    cone = F.normalize(
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 4, dim=1
    )
    objective, learned = (
        ContrastiveObjective(),
        make_objective("infoloob", learnable_inv_tau=True),
    )
    with pytest.warns(UserWarning, match=r"mean cosine of 0\.\d+"):
        objective(cone, cone)
    with pytest.warns(UserWarning, match="ends at its bound"):
        learned(cone, cone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(cone, cone)
        learned(cone, cone)
        make_objective("infoloob")(cone, cone)
        make_objective("clip")(cone, cone)
        make_objective("clip", inv_tau=4.9, learnable_inv_tau=False)
    with pytest.warns(UserWarning, match=r"inv_tau is 4\.605, which is ln 100"):
        ContrastiveObjective(inv_tau=math.log(100))
    with pytest.warns(
        UserWarning, match=r"logit_scale is 2\.659, which is ln\(1/0\.07\)"
    ):
        make_objective("clip")(
            cone, cone, torch.tensor(math.log(1 / 0.07), requires_grad=True)
        )


def test_ids_come_as_texts_from_numpy_and_as_a_list():
    np = pytest.importorskip("numpy")
    names = ["a", "b", "a", "c"]
    x, y = (
        F.normalize(
            torch.randn(4, 8, generator=torch.Generator().manual_seed(i)), dim=1
        )
        for i in (0, 1)
    )
    objective = make_objective("infoloob")
    assert cloob.ids(names).tolist() == cloob.ids(iter(names)).tolist()
    assert cloob.ids(torch.tensor([1, 2])).tolist() == cloob.ids([1, 2]).tolist()
    assert len({*cloob.ids(["\ud800", "\udcff", "C", "c"]).tolist()}) == 4
    loss = objective(x, y, ids=cloob.ids(names))
    assert loss == objective(x, y, ids=np.array([0, 1, 0, 2])) != objective(x, y)
    assert loss == objective(x, y, ids=[0, 1, 0, 2])
    raises(TypeError, r"cloob\.ids", objective, x, y, ids=names)


def test_a_call_waits_for_the_device_once_or_not_at_all(monkeypatch):
    assert [
        reads(monkeypatch, check=check, backend="reference") for check in (True, False)
    ] == [1, 0]
    # Of several tiles the streamed path has to know whether exponentials stay in range.
    assert [reads(monkeypatch, check=check) for check in (True, False)] == [1, 0]
    monkeypatch.setitem(tiles.TILE, "cpu", 2)
    assert [reads(monkeypatch, check=check) for check in (True, False)] == [1, 1]
