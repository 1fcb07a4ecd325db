from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cloob.objective import make_objective
from cloob.training.config import TrainConfig
from cloob.training.config.parts import OptimConfig
from cloob.training.optim import make_schedule, parameter_groups, warmup_steps


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = nn.Embedding(5, 4)
        self.positions = nn.Parameter(torch.zeros(7, 4))
        self.attention = nn.MultiheadAttention(4, 1)
        self.wide_norm = nn.LayerNorm((2, 4))
        self.gain = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.tied = self.conv


def test_groups_follow_clips_rule() -> None:
    towers = Towers()
    objective = make_objective("siglip-hopfield", learnable_beta=True)
    names = {id(p): name for name, p in [*towers.named_parameters(), *objective.named_parameters()]}
    groups = parameter_groups(towers, objective, 0.3)
    found = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}  # type: ignore[attr-defined]
    assert found == {
        0.3: {"conv.weight", "tokens.weight", "positions", "attention.in_proj_weight", "attention.out_proj.weight"},
        0.0: {
            "conv.bias",
            "norm.weight",
            "norm.bias",
            "attention.in_proj_bias",
            "attention.out_proj.bias",
            "wide_norm.weight",
            "wide_norm.bias",
            "gain",
            "log_inv_tau",
            "log_beta",
            "bias",
        },
    }
    assert sum(len(group["params"]) for group in groups) == 16  # type: ignore[arg-type] # each once


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        # progress 0, 1/8, …, 7/8
        ("cosine", [0.25, 0.5, 0.75, 1.0] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        # two cycles of four steps: progress 0, 1/4, 1/2, 3/4, and again
        (
            "cosine-restarts",
            [0.25, 0.5, 0.75, 1.0, *2 * [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]],
        ),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    config = OptimConfig(lr=2.0, warmup=4, schedule=schedule, restarts=2)  # type: ignore[arg-type]
    rate = make_schedule(config, 12)
    assert [rate(step) for step in range(12)] == pytest.approx([2.0 * value for value in expected], abs=1e-12)
    assert rate(12) == rate(20) == (2.0 if schedule == "constant" else 0.0)


def test_default_warmup() -> None:
    assert warmup_steps(OptimConfig(), 450) == 45
    assert warmup_steps(OptimConfig(), 10**6) == 2000
    assert make_schedule(OptimConfig(lr=1.0, warmup=0), 5)(0) == 1.0
    assert warmup_steps(TrainConfig().override(warmup=0).optim, 450) == 0
