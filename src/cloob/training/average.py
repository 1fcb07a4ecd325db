"""The exponential moving average of the towers' weights (Polyak averaging)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Average:
    """torch's ``AveragedModel`` of an encoder, with its running statistics; from the first step on.

    ``decay`` is the share of the average that a step keeps. A step that was not finite leaves no trace.
    """

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        self._decay, self._share = decay, torch.zeros(())
        self._averaged = AveragedModel(encoder, avg_fn=self._mixed, use_buffers=True).requires_grad_(False)

    @property
    def encoder(self) -> Any:
        """The encoder with the averaged weights."""
        return self._averaged.module

    def update(self, encoder: nn.Module, finite: Tensor) -> None:
        """Moves towards the encoder's weights if the 0-d ``finite`` is true; waits for no device."""
        self._share = finite * (1 - self._decay)
        self._averaged.update_parameters(encoder)

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from an average that was saved."""
        self.encoder.load_state_dict(state)
        self._averaged.n_averaged.fill_(1)

    def _mixed(self, averaged: Tensor, now: Tensor, _: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return now
        # Attention masks are buffers of −∞, whose difference is NaN.
        return averaged + self._share.to(averaged.dtype) * (now - averaged).nan_to_num()
