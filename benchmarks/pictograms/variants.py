"""Variants of the objective that the study tries beside the four published forms: ablations, never defaults.

Each wraps a ``ContrastiveObjective`` and has its call and ``clamp_``, which is what the library's ``Stepper`` needs;
``progress`` in [0, 1] is set by the loop before each step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from benchmarks.pictograms.cells import Setting
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.functional import info_loob, info_nce
from cloob.functional.hopfield import hopfield_retrieval
from cloob.functional.reference import cloob_reference
from cloob.objective import ContrastiveObjective, make_objective

OPTIONS = {
    "warm": "no retrieval in the first half of the run: InfoLOOB (InfoNCE), then CLOOB (InfoNCE with retrieval)",
    "early": "as warm, but the retrieval joins after a sixth of the run",
    "ramp": "the loss goes linearly from InfoLOOB without retrieval to CLOOB over the run",
    "centring": "the batch's mean is taken off images and off texts before retrieval and contrast, in training only",
    "sum": "the mean of InfoLOOB on plain and on retrieved embeddings",
    "learned-beta": "beta is trained",
    "perplexity": "beta is set anew in each step so that a query retrieves e^H = 8 patterns on average",
    "queue": "as warm, and what is retrieved from are the batch and the last 1,024 pairs before it",
    "grown-beta": "beta rises geometrically over the run, from its value to four times that",
}
_JOINS = {"warm": 1 / 2, "early": 1 / 6, "queue": 1 / 2}
"""The part of the run after which retrieval joins."""
_MEMBERS = {"cloob-warm": "cloob", "sum": "cloob"}
"""What a method is made of whose other half is its setting's option."""
PERPLEXITY = 8.0
QUEUE = 1024
"""Patterns kept from the batches before."""


def build_objective(method: str, setting: Setting) -> nn.Module:
    """The objective of a cell."""
    overrides: dict[str, Any] = {"inv_tau": setting.inv_tau, "learnable_inv_tau": setting.learnable_inv_tau}
    if setting.beta is not None:
        overrides |= {"beta": setting.beta, "learnable_beta": setting.option == "learned-beta"}
    objective = make_objective(_MEMBERS.get(method, method), **overrides)
    return objective if setting.option in ("", "learned-beta") else Variant(objective, setting.option)


class Variant(nn.Module):
    """A published objective with one of the ``OPTIONS`` that change over the run."""

    def __init__(self, objective: ContrastiveObjective, option: str) -> None:
        super().__init__()
        if option not in OPTIONS:
            raise ValueError(f"option is {option!r}; one of {', '.join(OPTIONS)} is expected")
        self.objective = objective
        self.option = option
        self.progress = 0.0
        self.last_beta = float(objective.beta)
        if option == "queue":
            self.memory = Memory()

    def clamp_(self) -> None:
        """As the objective's own."""
        self.objective.clamp_()

    def forward(self, image_features: Tensor, text_features: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The loss, on the published objective's scale τ·(sum of both directions)."""
        x, y = image_features, text_features
        if self.option in ("perplexity", "grown-beta"):
            return self._retrieved(x, y, ids)
        if self.option == "centring":
            loss: Tensor = self.objective(*(F.normalize(rows - rows.mean(0), dim=1) for rows in (x, y)), ids=ids)
            return loss
        share = {"ramp": self.progress, "sum": 0.5}.get(self.option)
        if share is None:
            share = float(self.progress >= _JOINS[self.option])
        if self.option == "queue" and share > 0:
            return self._queued(x, y, ids)
        loss = x.new_zeros(())
        if share < 1:
            tau_inverse = self.objective.inv_tau.to(x)
            contrast = info_nce if self.objective.contrast == "infonce" else info_loob
            plain = contrast(x, y, tau_inverse, ids=ids) + contrast(y, x, tau_inverse, ids=ids)
            loss = loss + (1 - share) * plain / tau_inverse
        return loss + share * self.objective(x, y, ids=ids) if share > 0 else loss

    def _queued(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        """CLOOB with a memory larger than the batch; the older patterns have no gradient and are no negatives."""
        objective, tau_inverse = self.objective, self.objective.inv_tau.to(x)
        memory = self.memory(torch.stack([x, y]))
        u_x, u_y, v_x, v_y = (hopfield_retrieval(query, m, objective.beta.to(x)) for m in memory for query in (x, y))
        loss = info_loob(u_x, u_y, tau_inverse, ids=ids) + info_loob(v_y, v_x, tau_inverse, ids=ids)
        return loss / tau_inverse

    def _retrieved(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        start = float(self.objective.beta)
        if self.option == "grown-beta":
            self.last_beta = start * 4**self.progress
        else:
            self.last_beta = beta_of_perplexity(torch.cat([x, y]).detach(), x.shape[0], PERPLEXITY)
        contrast, scale = self.objective.contrast, self.objective.scale
        return cloob_reference(x, y, self.objective.inv_tau, self.last_beta, contrast=contrast, scale=scale, ids=ids)


class Memory(nn.Module):
    """The last ``QUEUE`` pairs before a batch; part of the state that a stopped run goes on from."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, batch: Tensor) -> Tensor:
        """(2, N, D) images and texts of a batch, with the kept pairs (no gradient) behind them; keeps the batch."""
        whole = batch if self.kept is None else torch.cat([batch, self.kept], 1)
        self.kept = whole.detach()[:, :QUEUE].clone()
        return whole

    def get_extra_state(self) -> dict[str, Tensor | None]:
        """For ``state_dict``."""
        return {"kept": self.kept}

    def set_extra_state(self, state: dict[str, Tensor | None]) -> None:
        """From ``load_state_dict``."""
        self.kept = state["kept"]


def beta_of_perplexity(rows: Tensor, split: int, perplexity: float) -> float:
    """β at which the crossed queries (texts in the image memory and images in the text memory) retrieve so many.

    e^H of the softmax, H averaged over all queries; found by bisection, H falls monotonically in β.

    Args:
        rows: (2N, D) unit rows, images first.
        split: N.
        perplexity: Between 1 and N.

    Returns:
        β in [1, 500].
    """
    scores = rows[split:] @ rows[:split].T
    both = torch.cat([scores, scores.T])
    low, high = 0.0, math.log(500.0)
    for _ in range(12):
        middle = (low + high) / 2
        log_p = torch.log_softmax(math.exp(middle) * both, 1)
        entropy = -(log_p.exp() * log_p).sum(1).mean()
        low, high = (middle, high) if float(entropy) > math.log(min(perplexity, split)) else (low, middle)
    return math.exp((low + high) / 2)
