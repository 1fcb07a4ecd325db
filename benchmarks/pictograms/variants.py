"""Two forms of the objective beside the four published ones: retrieval that joins late, and the sum of both terms.

The forms that were tried before (``benchmarks/LOG.md``) are in this file at commit fc415074.
"""

from __future__ import annotations

from typing import Any

from benchmarks.pictograms.cells import Setting
from torch import Tensor, nn

from cloob.functional import info_loob, info_nce
from cloob.objective import ContrastiveObjective, make_objective

OPTIONS = {
    "warm": "no retrieval in the first half of the run: InfoLOOB (InfoNCE), then CLOOB (InfoNCE with retrieval)",
    "sum": "the mean of InfoLOOB on plain and on retrieved embeddings",
}
_MEMBERS = {"cloob-warm": "cloob", "sum": "cloob"}
"""What a method is made of whose other half is its setting's option."""


def build_objective(method: str, setting: Setting) -> nn.Module:
    """The objective of a cell."""
    overrides: dict[str, Any] = {"inv_tau": setting.inv_tau, "learnable_inv_tau": setting.learnable_inv_tau}
    if setting.beta is not None:
        overrides["beta"] = setting.beta
    objective = make_objective(_MEMBERS.get(method, method), **overrides)
    return Variant(objective, setting.option) if setting.option else objective


class Variant(nn.Module):
    """A published objective with one of the ``OPTIONS``; it has the call and ``clamp_`` that ``Stepper`` needs.

    ``progress`` in [0, 1] is set by the loop before each step.
    """

    def __init__(self, objective: ContrastiveObjective, option: str) -> None:
        super().__init__()
        if option not in OPTIONS:
            raise ValueError(f"option is {option!r}; one of {', '.join(OPTIONS)} is expected")
        self.objective = objective
        self.option = option
        self.progress = 0.0

    def clamp_(self) -> None:
        """As the objective's own."""
        self.objective.clamp_()

    def forward(self, image_features: Tensor, text_features: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The loss, on the published objective's scale τ·(sum of both directions)."""
        x, y = image_features, text_features
        share = 0.5 if self.option == "sum" else float(self.progress >= 0.5)
        loss = x.new_zeros(())
        if share < 1:
            tau_inverse = self.objective.inv_tau.to(x)
            contrast = info_nce if self.objective.contrast == "infonce" else info_loob
            plain = contrast(x, y, tau_inverse, ids=ids) + contrast(y, x, tau_inverse, ids=ids)
            loss = loss + (1 - share) * plain / tau_inverse
        return loss + share * self.objective(x, y, ids=ids) if share > 0 else loss
