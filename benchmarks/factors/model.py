"""The two encoders of a run, and its objective, one of the library's four."""

from __future__ import annotations

from benchmarks.factors.cells import Setting
from benchmarks.factors.world import LETTERS, PIXELS
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.objective import ContrastiveObjective, make_objective

HIDDEN, EMBEDDING = 256, 64


class Encoders(nn.Module):
    """A multilayer perceptron for pictures and one for captions; both give unit
    rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_pictures, self.of_captions = perceptron(PIXELS), perceptron(LETTERS)

    def pictures(self, pictures: Tensor) -> Tensor:
        """(…, P) to (…, D)."""
        return F.normalize(self.of_pictures(pictures), dim=-1)

    def captions(self, captions: Tensor) -> Tensor:
        """(…, C) to (…, D)."""
        return F.normalize(self.of_captions(captions), dim=-1)


def perceptron(inputs: int) -> nn.Module:
    layers = (
        nn.Linear(inputs, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, EMBEDDING),
    )
    return nn.Sequential(*layers)


def objective_of(method: str, setting: Setting) -> ContrastiveObjective:
    """A method's objective; the mean of both directions for all, so that no loss is
    larger by convention.
    """
    beta = {} if setting.beta is None else {"beta": setting.beta}
    return make_objective(
        method,
        scale="unit",
        inv_tau=setting.inv_tau,
        learnable_inv_tau=setting.learned,
        **beta,
    )
