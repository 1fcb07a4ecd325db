"""The objectives: the library's four, and the sum of two of them."""

from __future__ import annotations

import dataclasses

from benchmarks.factors.plan import Setting
from torch import Tensor, nn

from cloob.objective import ContrastiveObjective, make_objective


class Sum(nn.Module):
    """The mean of two objectives with one τ⁻¹: of the embeddings, and of what retrieval makes of them."""

    hopfield = True

    def __init__(self, plain: ContrastiveObjective, retrieved: ContrastiveObjective) -> None:
        super().__init__()
        self.plain, self.retrieved = plain, retrieved
        self.inv_tau, self.beta = retrieved.inv_tau, retrieved.beta

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of (n, D) unit rows of pictures and of captions."""
        loss: Tensor = (self.plain(x, y) + self.retrieved(x, y)) / 2
        return loss


Objective = ContrastiveObjective | Sum


def objective_of(method: str, setting: Setting) -> Objective:
    """A method's objective; the mean of both directions for all, so that no loss is larger by convention."""
    if method == "sum":
        return Sum(_member("infoloob", dataclasses.replace(setting, beta=None)), _member("cloob", setting))
    return _member(method, setting)


def _member(method: str, setting: Setting) -> ContrastiveObjective:
    beta = {} if setting.beta is None else {"beta": setting.beta}
    return make_objective(method, scale="unit", inv_tau=setting.inv_tau, learnable_inv_tau=setting.learned, **beta)
