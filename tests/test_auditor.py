"""Right losses and wrong ones, each transcribed here, and what ``cloob.audit`` says."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

import cloob
from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed
from cloob.objective import OBJECTIVES, ContrastiveObjective
from support import raises


def retrieve(state, stored, beta, unit=True):
    weights = (beta * state @ stored.T).softmax(dim=1)
    found = weights @ stored
    return F.normalize(found) if unit else found


def info_nce(anchors, candidates, inv_tau):
    scores = inv_tau * anchors @ candidates.T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def info_loob(anchors, candidates, inv_tau, mask=-torch.inf):
    scores = inv_tau * anchors @ candidates.T
    own = torch.eye(len(scores), dtype=torch.bool)
    negatives = scores.masked_fill(own, mask).logsumexp(dim=1)
    return (negatives - scores.diagonal()).mean()


def subtracted(anchors, candidates, inv_tau, floor=0.0):
    scores = inv_tau * anchors @ candidates.T
    positives = scores.diagonal()
    negatives = scores.exp().sum(dim=1) - positives.exp() + floor
    return (negatives.log() - positives).mean()


def both(contrast, *arguments):
    return lambda x, y: contrast(x, y, *arguments) + contrast(y, x, *arguments)


def memories(x, y, beta=8.0, unit=True):
    """U_x, U_y, V_x, V_y."""
    return [retrieve(q, m, beta, unit) for m in (x, y) for q in (x, y)]


def cloob_loss(x, y, inv_tau=30.0, beta=8.0, contrast=info_loob, **options):
    u_x, u_y, v_x, v_y = memories(x, y, beta)
    of_x = contrast(u_x, u_y, inv_tau, **options)
    of_y = contrast(v_y, v_x, inv_tau, **options)
    return (of_x + of_y) / inv_tau


def masked_sums(x, y):
    """Positives are set to 0 after exp, and nothing is subtracted."""
    own = torch.eye(len(x), dtype=torch.bool)
    total = 0.0
    for scores in (30 * x @ y.T, 30 * y @ x.T):
        negatives = scores.exp().masked_fill(own, 0).sum(dim=1) + 1e-20
        terms = negatives.log() - scores.diagonal()
        total += terms.mean()
    return total / 2


def cross_entropy(x, y):
    return both(info_nce, 14.3)(x, y) / 2


def in_float32(x, y):
    return cloob_loss(x.float(), y.float())


def by_hand(x, y):
    return 3.3 * both(info_loob, 12.0)(x, y)


def normalises(x, y):
    return cloob_loss(F.normalize(x), F.normalize(y))


RIGHT = {
    "cross entropy": (cross_entropy, "clip", "unit"),
    "cross entropy summed": (both(info_nce, 14.3), "clip", "sum"),
    "log-sum-exp": (both(info_loob, 30.0), "infoloob", "sum"),
    "masked sums": (masked_sums, "infoloob", "unit"),
    "the paper's": (cloob_loss, "cloob", "paper"),
    "in float32": (in_float32, "cloob", "paper"),
    "by hand": (by_hand, "infoloob", "3.3"),
    "normalises": (normalises, "cloob", "paper"),
}
for path in (cloob_reference, cloob_streamed):
    RIGHT[path.__name__] = (lambda x, y, f=path: f(x, y, 20.0, 5.0), "cloob", "paper")


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loss_is_named_and_not_blamed(name):
    loss, member, scale = RIGHT[name]
    report = cloob.audit(loss)
    assert report.faults == (), report
    assert report.name == member
    assert report.scale == scale
    assert report.value_error < 1e-6
    assert report.gradient_error < 1e-4


def fixed(member, **options):
    """A member whose temperature does not learn, where it can be so."""
    if "siglip" not in member:
        options["learnable_inv_tau"] = False
    return cloob.make_objective(member, **options)


@pytest.mark.parametrize("backend", ["reference", "streamed"])
@pytest.mark.parametrize("member", OBJECTIVES)
def test_no_member_of_ours_is_blamed(member, backend):
    scales = ("unit",) if "siglip" in member else ("unit", "paper")
    for scale in scales:
        objective = fixed(member, scale=scale, backend=backend)
        before = copy.deepcopy(objective.state_dict())
        report = cloob.audit(objective, expect=member)
        assert report.faults == (), report
        assert report.name == member
        assert report.scale == scale
        assert report.inv_tau == pytest.approx(objective.inv_tau.item(), rel=1e-4)
        assert report.beta in (None, pytest.approx(8.0, rel=1e-4))
        assert report.value_error < 1e-6
        assert report.gradient_error < 1e-5
        assert str(report).startswith(f"{member} (")
        torch.testing.assert_close(objective.state_dict(), before, rtol=0, atol=0)


def test_learned_scales_of_ours_are_not_blamed():
    for name in ("clip", "siglip", "cloob", "infonce-hopfield"):
        objective = cloob.make_objective(name, learnable_inv_tau=True)
        report = cloob.audit(objective)
        assert report.faults == (), report
        assert report.name == name
        kinds = [finding.kind for finding in report.findings]
        assert ("learned τ" in kinds) == (name == "cloob")
    learned_beta = ContrastiveObjective(learnable_beta=True)
    assert cloob.audit(learned_beta).faults == ()


def gathered(x, y, keep_own, with_gradient=False):
    """InfoLOOB over ranks; their rows come without a graph, or with one."""
    if not dist.is_initialized():
        return cloob_loss(x, y)
    sides = []
    for side in (x, y):
        if with_gradient:
            parts = list(all_gather(side))
        else:
            parts = [torch.zeros_like(side) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, side.detach())
        if keep_own:
            parts[dist.get_rank()] = side
        sides.append(torch.cat(parts))
    return cloob_loss(*sides)


def mixed_memories(x, y):
    u_x, u_y, v_x, v_y = memories(x, y)
    return info_loob(u_x, v_x, 30.0) + info_loob(v_y, u_y, 30.0)


def across(x, y):
    u_x, _, _, v_y = memories(x, y)
    return info_loob(u_x, v_y, 30.0) + info_loob(v_y, u_x, 30.0)


def four_terms(x, y):
    u_x, u_y, v_x, v_y = memories(x, y)
    loss = both(info_loob, 15.0)
    return (loss(u_x, u_y) + loss(v_x, v_y)) / 60


def not_unit(x, y):
    u_x, u_y, v_x, v_y = memories(x, y, unit=False)
    return (info_loob(u_x, u_y, 30.0) + info_loob(v_y, v_x, 30.0)) / 30


def unused(x, y):
    """An ablation whose branch takes the plain rows."""
    for memory in memories(x, y):
        assert memory.shape == x.shape
    return cross_entropy(x, y)


def lowered(x, y):
    """All in bfloat16, as under autocast."""
    return cloob_loss(x.bfloat16(), y.bfloat16()).float()


def detached(x, y):
    u_x, u_y, v_x, v_y = (side.detach() for side in memories(x, y))
    keep = 0.0 * (x.sum() + y.sum())
    return info_loob(u_x, u_y, 30.0) + info_loob(v_y, v_x, 30.0) + keep


class Learned(nn.Module):
    """A learned scale under τ · loss, as copies of CLIP's model keep it."""

    def __init__(self, contrast=info_loob):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.contrast = contrast

    def forward(self, x, y):
        return cloob_loss(x, y, self.logit_scale.exp(), contrast=self.contrast)


def one_direction(x, y):
    u_x, u_y, _, _ = memories(x, y)
    return info_loob(u_x, u_y, 30.0) / 30


WRONG = {
    "logarithm as τ⁻¹": [partial(cloob_loss, inv_tau=math.log(100))],
    "learned τ under τ·loss": [Learned(), Learned(info_nce)],
    "sentinel as mask": [partial(cloob_loss, mask=-1e9)],
    "gather without gradient": [
        partial(gathered, keep_own=False),
        partial(gathered, keep_own=True),
    ],
    "one direction": [partial(info_loob, inv_tau=30.0), one_direction],
    "U and V exchanged": [mixed_memories, across],
    "other terms": [four_terms],
    "rows not of unit length": [not_unit],
    "subtract after exp": [
        both(subtracted, 30.0, 1e-8),
        partial(cloob_loss, contrast=subtracted),
    ],
    "retrieval not used": [unused],
    "gradients lost in a cone": [lowered],
    "gradient of another function": [detached],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_fault_is_found_and_no_other_is(kind):
    for loss in WRONG[kind]:
        report = cloob.audit(loss)
        assert kind in report.faults, report
        others = set(report.faults) - {kind}
        if kind == "gradients lost in a cone":  # bfloat16 shows in the values too
            others.discard("values off")
        assert not others, report
        assert f"FAULT: {kind}: " in str(report)


def test_an_audit_uses_up_no_warning():
    objective = cloob.make_objective("cloob")
    cloob.audit(objective)
    rows = 2 * torch.eye(4)
    with pytest.warns(UserWarning, match="rows of length 2"):
        objective(rows, rows)


def test_a_gather_with_gradient_is_right_on_two_ranks():
    report = cloob.audit(lambda x, y: gathered(x, y, False, with_gradient=True))
    assert report.faults == (), report
    for name in OBJECTIVES:
        for backend in ("reference", "streamed"):
            report = cloob.audit(fixed(name, gather="auto", backend=backend))
            assert report.faults == (), report
            assert "ranks" not in [finding.kind for finding in report.findings]
    assert not dist.is_initialized()


def test_a_scale_is_passed_on():
    scale = torch.tensor(30.0, requires_grad=True)
    assert cloob.audit(cloob_loss, scale=30.0).faults == ()
    assert cloob.audit(cloob_loss, scale=scale).faults == ("learned τ under τ·loss",)
    assert cloob.audit(cloob_loss, scale=math.log(100)).faults == ("logarithm as τ⁻¹",)
    report = cloob.audit(lambda x, y, s: cloob_loss(x, y, math.exp(s)), scale=30.0)
    assert report.faults == ("exponential as τ⁻¹",)
    clip = cloob.make_objective("clip")
    assert cloob.audit(clip, scale=scale).faults == ()


def test_what_is_expected_and_what_is_no_such_loss():
    report = cloob.audit(both(info_loob, 30.0), expect="cloob")
    assert report.faults == ("not what was expected",)
    strange = cloob.audit(lambda x, y: (x - y).square().sum())
    assert strange.name is None
    assert "no form" in str(strange)
    assert "not finite" in cloob.audit(lambda x, y: (x.sum() - x.sum()).log()).faults
    raises(TypeError, "no 0-d tensor", cloob.audit, lambda x, y: (x - y).norm(dim=1))
    raises(ValueError, "expect is 'clop'", cloob.audit, cloob_loss, expect="clop")
