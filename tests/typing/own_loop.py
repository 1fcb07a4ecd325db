"""The loss in a loop: what needs torch alone."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob import (
    ContrastiveObjective,
    audit,
    cached_backward,
    functional,
    ids,
    make_objective,
    suspects,
)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(6, 4)
        self.text = nn.Linear(5, 4)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(
            self.text(texts), dim=1
        )


def step(towers: Towers, images: Tensor, texts: Tensor, captions: list[str]) -> float:
    objective = ContrastiveObjective.cloob(beta=14.3)
    assert_type(objective, ContrastiveObjective)
    x, y = towers.forward(images, texts)
    loss: Tensor = objective(x, y, ids=ids(captions))
    assert_type(objective.forward(x, y), Tensor | dict[str, Tensor])
    assert_type(objective.inv_tau, Tensor)
    assert_type(make_objective("clip"), ContrastiveObjective)
    assert_type(functional.info_loob(x, y, 30.0), Tensor)
    assert_type(functional.hopfield_retrieval(x, y, 8.0), Tensor)
    assert_type(suspects(x.detach(), y.detach().numpy(), ids(captions)), Tensor)
    assert_type(audit(objective).faults, tuple[str, ...])
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    return loss.item()


def large_step(towers: Towers, images: Tensor, texts: Tensor) -> Tensor:
    parts = list(zip(torch.split(images, 8), torch.split(texts, 8), strict=True))
    objective = make_objective("infoloob", gather=True)
    return cached_backward(
        lambda part: towers.forward(*part), objective, parts, towers=towers
    )


def mistakes(images: Tensor) -> None:
    """What a type checker has to refuse; an ignore that is not needed is an error
    too.
    """
    ContrastiveObjective("infoloob")  # type: ignore[call-arg]
    ContrastiveObjective(contrast="loob")  # type: ignore[arg-type]
    ContrastiveObjective(backend="fast")  # type: ignore[arg-type]
    make_objective(3)  # type: ignore[arg-type]
    cached_backward(torch.sin, torch.cos, images)  # type: ignore[call-arg, arg-type]
    ContrastiveObjective().forward(images)  # type: ignore[call-arg]
