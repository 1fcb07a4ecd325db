from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.objective import ContrastiveObjective, make_objective
from cloob.train.step import Stepper, TowersWithLoss


class Towers(nn.Module):
    """Linear towers with batch norm; pixels and tokens are plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.text = nn.Linear(3, 4)
        self.register_buffer("centre", torch.zeros(4))
        self.seen: list[torch.dtype] = []

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.image(images), self.text(tokens)
        self.seen += [x.dtype, y.dtype]
        self.centre = 0.5 * self.centre + 0.5 * y.detach().mean(0).float()  # a new tensor in the place of the last
        return F.normalize(self.norm(x.float()), dim=-1), F.normalize(y.float(), dim=-1)


class Watching(ContrastiveObjective):
    """Notes in what precision it is called."""

    def forward(self, image_features: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.called = (image_features.dtype, torch.is_autocast_enabled("cpu"))
        return super().forward(image_features, *args, **kwargs)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)


def stepper(objective: ContrastiveObjective | None = None, precision: str = "fp32", clip: float = 0.0) -> Stepper:
    torch.manual_seed(0)
    module = TowersWithLoss(Towers(), objective or make_objective("cloob"), precision).train()
    return Stepper(module, torch.optim.SGD(module.parameters(), lr=9.0), clip)


def reference_step(take: Stepper, lr: float, clip: float = math.inf) -> tuple[float, float, list[Tensor]]:
    """The same step written out."""
    module = copy.deepcopy(take.module)
    x, y = module.encoder(*batch())
    loss = module.objective(x, y)
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    factor = min(1.0, clip / norm)
    return (
        float(loss.detach()),
        norm,
        [p.detach() - lr * factor * g for p, g in zip(parameters, gradients, strict=True)],
    )


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_step_is_the_plain_step(clip: float) -> None:
    take = stepper(clip=clip)
    loss, norm, after = reference_step(take, 0.05, clip or math.inf)
    result = take(*batch(), None, 0.05)
    assert result.finite and result.loss == pytest.approx(loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for parameter, wanted in zip((p for p in take.module.parameters() if p.requires_grad), after, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=2e-4, atol=1e-7)
    assert all(p.grad is None for p in take.module.parameters())
    torch.testing.assert_close(result.image_features.norm(dim=1), torch.ones(6))
    assert not result.image_features.requires_grad


def test_autocast_covers_the_towers_only() -> None:
    watching = Watching(contrast="infonce", hopfield=False)
    take = stepper(watching, precision="bf16")
    assert take(*batch(), None, 0.1).finite
    assert set(take.module.encoder.seen) == {torch.bfloat16}  # type: ignore[arg-type]
    assert watching.called == (torch.float32, False)
    plain = stepper(Watching())
    plain(*batch(), None, 0.1)
    assert set(plain.module.encoder.seen) == {torch.float32}  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["features", "gradient"])
def test_a_step_that_is_not_finite_leaves_no_trace(where: str) -> None:
    take = stepper()
    take.optimizer = torch.optim.AdamW(take.module.parameters(), lr=1e-2)
    take(*batch(), None, 1e-2)
    before = copy.deepcopy((take.module.state_dict(), take.optimizer.state_dict()))
    images, tokens = batch()
    if where == "features":
        images[2, 1] = math.nan
        result = take(images, tokens, None, 1e-2)
        assert not math.isfinite(result.loss)
    else:
        hook = take.module.encoder.text.weight.register_hook(lambda gradient: gradient * math.inf)  # type: ignore
        result = take(images, tokens, None, 1e-2)
        hook.remove()
        assert math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert not result.finite
    after = (take.module.state_dict(), take.optimizer.state_dict())
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value), name  # running means of the batch norm among them
    for index, state in before[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(after[1]["state"][index][name], value), (index, name)
    assert take(*batch(), None, 1e-2).finite


def test_clips_inverse_temperature_stays_below_100() -> None:
    take = stepper(make_objective("clip", inv_tau=99.99))
    # Two matching pairs far apart: a sharper contrast lowers the loss.
    for _ in range(20):
        take(torch.eye(5)[:3], torch.eye(3), None, 0.5)
    assert float(take.module.objective.inv_tau.detach()) <= 100.0 + 1e-3


def test_ids_reach_the_objective() -> None:
    soft = {"name": "clip", "inv_tau": 1.0, "learnable_inv_tau": False}  # so that every negative counts
    x, y = (rows.detach() for rows in stepper().module.encoder(*batch()))
    logits = x @ y.T
    without = logits.clone()
    without[0, 1] = without[1, 0] = -math.inf
    losses = [
        float(sum(F.cross_entropy(rows, torch.arange(6)) for rows in (table, table.T))) / 2
        for table in (logits, without)
    ]
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    found = [stepper(make_objective(**soft))(*batch(), given, 0.1).loss for given in (None, ids)]  # type: ignore
    assert found == pytest.approx(losses, rel=1e-5) and abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("objective", ["clip", "cloob"])
def test_micro_batches_take_the_step_of_the_whole_batch(size: int, objective: str) -> None:
    whole, parts = stepper(make_objective(objective)), stepper(make_objective(objective))
    for take in (whole, parts):  # batch norm would see micro-batches
        take.module.encoder.norm = nn.Identity()
    parts.micro_batch_size = size
    ids = torch.tensor([0, 1, 2, 1, 4, 5])
    one, other = whole(*batch(), ids, lr=0.1), parts(*batch(), ids, lr=0.1)
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    torch.testing.assert_close(other.image_features, one.image_features)
    torch.testing.assert_close(other.text_features, one.text_features)
    for p, q in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(q, p)


def test_no_pair_is_alone_in_a_micro_batch_where_samples_are_left_out() -> None:
    take = stepper()
    take.micro_batch_size = 4
    images, tokens = (side[:5] for side in batch())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(4)(torch.zeros(1, 4))
    assert take(images, tokens, None, lr=0.1).finite
    assert take.module.encoder.norm.num_batches_tracked == 2


@pytest.mark.parametrize("micro", [0, 2])
def test_a_step_says_whether_to_retrieve(micro: int) -> None:
    called, plain, default = stepper(make_objective("cloob")), stepper(make_objective("infoloob")), stepper()
    for take in (called, plain, default):
        take.micro_batch_size = micro
    one = called(*batch(), None, lr=0.1, hopfield=False)
    assert one.loss == plain(*batch(), None, lr=0.1).loss != default(*batch(), None, lr=0.1).loss
    for p, q in zip(called.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert called.module.objective.hopfield


def test_micro_batches_with_a_non_finite_row_change_nothing() -> None:
    take = stepper()
    take.micro_batch_size = 2
    before = copy.deepcopy(take.module.state_dict())
    x, y = batch()
    x[3] = math.nan
    assert not take(x, y, None, lr=0.1).finite
    for name, value in take.module.state_dict().items():
        assert torch.equal(value, before[name]), name
