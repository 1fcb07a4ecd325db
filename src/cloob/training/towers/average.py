"""A running average of the weights: with ``ema`` it is what is validated and exported; training goes on beside it.

A fixed decay d near 1 would keep the random start in the average for about 1/(1 - d) steps, so the decay rises to d:
update n uses ``min(d, (1 + n) / (10 + n))``, with n = 0 for the first, which copies the weights. Updates are counted on
the device, which may know before the host whether a step left a trace; so nobody waits for it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.training.config import TrainConfig


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


def decay_of_update(n: Tensor, decay: float) -> Tensor:
    """The share of the old average in update ``n`` (0-d): 0 for the first, then rising to ``decay``."""
    return ((1 + n) / (10 + n)).clamp(max=decay) * (n > 0)


class WeightAverage:
    """The exponential moving average of the towers' weights and buffers (running means of batch norms among them).

    The objective's temperatures are not averaged: they are a handful of numbers that move slowly. Copied are buffers
    that no checkpoint holds (masks, whose −∞ has no average) and what is no floating-point number (counters).

    Args:
        encoder: The towers as they start; copied, on their device, but for the tokenizer.
        decay: The decay that is reached, in (0, 1).

    Attributes:
        encoder: The towers with the averaged weights, in eval mode and without gradients.
    """

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.decay = decay
        self.encoder = copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer})
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        device = encoder.device
        # In float64 the shares are those of the formula to the last bit; MPS has none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._count = torch.zeros((), dtype=dtype, device=device)
        kept = encoder.state_dict()
        self._copied = {n for n, b in encoder.named_buffers() if n not in kept or not bool(b.isfinite().all())}

    @property
    def updates(self) -> int:
        """Updates so far; waits for the device."""
        return int(self._count)

    @torch.no_grad()
    def update(self, encoder: DualEncoder, taken: bool | Tensor = True) -> None:
        """Takes the weights after a step into the average.

        Args:
            encoder: The towers.
            taken: Whether the step left a trace, 0-d on their device where the host does not know; else nothing is
                done.
        """
        if taken is False:
            return
        share = (1 - decay_of_update(self._count, self.decay)) * taken
        ours = {**dict(self.encoder.named_parameters()), **dict(self.encoder.named_buffers())}
        theirs = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
        for name, averaged in ours.items():
            if averaged.is_floating_point() and name not in self._copied:
                averaged.lerp_(theirs[name], share.to(averaged.dtype))
            else:
                averaged.copy_(theirs[name])
        self._count += taken

    def restore(self, weights: dict[str, Tensor], updates: int) -> None:
        """Goes on from an earlier average.

        Args:
            weights: The averaged towers' ``state_dict``.
            updates: The updates behind it; 0 starts anew, with a copy of the weights after the next step.
        """
        self.encoder.load_state_dict(weights)
        self._count.fill_(updates)
