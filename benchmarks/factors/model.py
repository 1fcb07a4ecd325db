"""The two encoders of a run, and its objective."""

from __future__ import annotations

from benchmarks.factors.cells import Setting
from benchmarks.factors.world import LETTERS, PIXELS
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.functional import hopfield_retrieval, info_loob
from cloob.objective import ContrastiveObjective, make_objective

HIDDEN = 256
EMBEDDING = 64


class Encoders(nn.Module):
    """A multilayer perceptron for pictures and one for captions; both give unit
    rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_pictures = perceptron(PIXELS)
        self.of_captions = perceptron(LETTERS)

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


class Mixed(nn.Module):
    """InfoLOOB and CLOOB in other proportions than the family has.

    ``both``: half of each. ``cross``: plain anchors against what they retrieve on the
    other side, x against R(y; X) and y against R(x; Y). ``cloob-late``: CLOOB that
    retrieves in the second half of the run; ``progress`` says how far it is.
    """

    def __init__(self, method: str, inv_tau: float, beta: float) -> None:
        super().__init__()
        self.method = method
        self.beta = beta
        self.infoloob = make_objective("infoloob", scale="unit", inv_tau=inv_tau)
        self.cloob = make_objective("cloob", scale="unit", inv_tau=inv_tau, beta=beta)
        self.progress = 0.0

    @property
    def inv_tau(self) -> Tensor:
        return self.cloob.inv_tau

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.method == "cloob-late":
            return self.cloob(x, y, hopfield=self.progress >= 0.5)
        if self.method == "both":
            return (self.infoloob(x, y) + self.cloob(x, y)) / 2
        inv_tau = float(self.inv_tau)
        of_x = info_loob(x, hopfield_retrieval(y, x, self.beta), inv_tau)
        of_y = info_loob(y, hopfield_retrieval(x, y, self.beta), inv_tau)
        return (of_x + of_y) / 2


MIXED = ("both", "cross", "cloob-late")


def objective_of(method: str, setting: Setting) -> ContrastiveObjective | Mixed:
    """A method's objective; the mean of both directions for all, so that no loss is
    larger by convention.
    """
    if method in MIXED:
        assert setting.beta is not None
        return Mixed(method, setting.inv_tau, setting.beta)
    beta = {} if setting.beta is None else {"beta": setting.beta}
    return make_objective(
        method,
        scale="unit",
        inv_tau=setting.inv_tau,
        learnable_inv_tau=setting.learned,
        **beta,
    )
