"""A running average of the weights: with ``ema`` it is what is validated and exported; training goes on beside it.

The average is PyTorch's own ``AveragedModel``; what is decided here is the decay. A fixed decay d near 1 would keep the
random start in the average for about 1/(1 - d) steps, so the decay rises to d: update n uses
``min(d, (1 + n) / (10 + n))``, with n = 0 for the first, which copies the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.train.config import TrainConfig

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_average(encoder: DualEncoder, config: TrainConfig) -> WeightAverage | None:
    """The average that a configuration asks for, if any; to be made before the towers are compiled or sharded.

    Raises:
        InputError: The weights are to be sharded as well.
    """
    if not config.optim.ema:
        return None
    if config.run.fsdp:
        raise InputError("ema keeps a whole copy of the weights, fsdp has them in shards: leave one of them out")
    return WeightAverage(encoder, config.optim.ema)


def decay_of_update(n: int, decay: float) -> float:
    """The share of the old average in update ``n``: 0 for the first, then rising to ``decay``."""
    return 0.0 if n == 0 else min(decay, (1 + n) / (10 + n))


class WeightAverage:
    """The exponential moving average of the towers' weights and buffers (running means of batch norms among them).

    The objective's temperatures are not averaged: they are a handful of numbers that move slowly. Copied are buffers
    that no checkpoint holds (masks, whose −∞ has no average) and what is no floating-point number (counters).

    Args:
        encoder: The towers as they start; copied, on their device.
        decay: The decay that is reached, in (0, 1).

    Attributes:
        updates: Updates so far.
    """

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._average = AveragedModel(encoder, multi_avg_fn=self._mix, use_buffers=True)
        self._average.requires_grad_(False)
        self._average.eval()
        kept = encoder.state_dict()
        self._copied = [n for n, b in encoder.named_buffers() if n not in kept or not bool(b.isfinite().all())]

    @property
    def encoder(self) -> DualEncoder:
        """The towers with the averaged weights, in eval mode and without gradients."""
        module = self._average.module
        assert isinstance(module, DualEncoder)
        return module

    def update(self, encoder: DualEncoder) -> None:
        """Takes the weights after a step into the average."""
        self._average.update_parameters(encoder)
        self.updates += 1
        for name in self._copied:
            self.encoder.get_buffer(name).copy_(encoder.get_buffer(name))

    def restore(self, weights: dict[str, Tensor], updates: int) -> None:
        """Goes on from an earlier average.

        Args:
            weights: The averaged towers' ``state_dict``.
            updates: The updates behind it; 0 starts anew, with a copy of the weights after the next step.
        """
        self.encoder.load_state_dict(weights)
        self.updates = updates
        self._average.n_averaged.fill_(updates)

    @torch.no_grad()
    def _mix(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        # The count is ours and not the tensor handed over: reading that one would wait for the device in each step.
        keep = decay_of_update(self.updates, self.decay)
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1.0 - keep)
        else:
            torch._foreach_copy_(averaged, current)
