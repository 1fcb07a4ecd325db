"""What a call reads of its rows and scales: refuses what no loss can be computed from,
and tells of what looks like a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cloob import distributed
from cloob.functional.checks import check_number, check_rows, extremes

Scales = dict[str, float | Tensor]
"""τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias`` of a call: fixed
numbers, or 0-d tensors.
"""
# on the length of a row; rows made unit in bfloat16 are within half of it
UNIT_TOLERANCE = 0.01
_CONE = 0.8  # mean cosine from which rows are too much alike for retrieval
_ONCE = "(warned once; not with check=False)"


class Values(NamedTuple):
    """Values of a batch, on the host."""

    lengths: dict[str, tuple[float, float]]  # of the shortest and longest row of a side
    scales: dict[str, float]
    cosine: float | None  # mean one of different rows, if it was asked for

    @property
    def of_other_length(self) -> list[str]:
        """The sides whose rows are not of unit length."""
        low, high = 1 - UNIT_TOLERANCE, 1 + UNIT_TOLERANCE
        lengths = self.lengths.items()
        return [
            side
            for side, (shortest, longest) in lengths
            if shortest < low or longest > high
        ]

    def notices(self) -> Iterator[tuple[str, str]]:
        """Warnings, and what each is about."""
        if self.of_other_length:
            side = self.of_other_length[0]
            least, greatest = self.lengths[side]
            yield (
                "lengths",
                f"{side} has rows of length {least:.3g} to {greatest:.3g}, but the"
                " objective is one of unit rows: torch.nn.functional.normalize makes"
                f" them {_ONCE}",
            )
        cone = None if self.cosine is None else cone_notice(self.cosine)
        if cone is not None:
            advice = "centre and scale the inputs (cloob.Head does), or begin with"
            yield "cone", f"{cone}: {advice} infoloob {_ONCE}"


def read_values(x: Tensor, y: Tensor, scales: Scales, *, cosine: bool) -> Values:
    """The values of a batch, for which the device is waited for once; refuses rows and
    learned scales that no loss can be computed from.
    """
    sides = {"image_features": x, "text_features": y}
    learned = {
        name: scale for name, scale in scales.items() if isinstance(scale, Tensor)
    }
    cosines = {"cosine": mean_cosine(x, y)} if cosine else {}
    ends = extremes(**sides, **learned, **cosines)
    numbers: dict[str, float] = {}
    for name, scale in scales.items():
        numbers[name] = ends[name][0] if name in learned else float(scale)
        check_number(name, numbers[name], x.dtype, positive=name != "bias")
    for name, rows in sides.items():
        least, greatest = ends[name]
        if not 0 < least <= greatest < math.inf:
            check_rows(name, rows)
    lengths = {side: ends[side] for side in sides}
    return Values(lengths, numbers, ends["cosine"][0] if cosine else None)


def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
    """0-d mean cosine of different rows, on the side whose rows are more alike."""
    n = len(x)
    means = torch.stack(
        [F.normalize(rows.detach(), dim=1).mean(dim=0) for rows in (x, y)]
    )
    return (n * means.square().sum(dim=1).amax() - 1) / max(n - 1, 1)


def cone_notice(cosine: float) -> str | None:
    """A warning of rows that are too much alike for retrieval."""
    alike = (
        f"rows have a mean cosine of {cosine:.2f}, and Hopfield retrieval averages what"
        " is alike"
    )
    return alike if cosine > _CONE else None


def check_finite(**named: Tensor) -> None:
    """NonFiniteFeaturesError for rows that are NaN, infinite or zero, which names them;
    waits for the device.
    """
    for name, rows in named.items():
        check_rows(name, rows)


@torch.no_grad()
def acceptable(x: Tensor, y: Tensor, *scales: Tensor) -> Tensor:
    """0-d bool, unread: on all ranks no row is NaN, infinite or zero, and scales are
    positive and finite.
    """
    lengths = [x.norm(dim=1), y.norm(dim=1)]
    numbers = torch.cat([*lengths, *(scale.reshape(1) for scale in scales)])
    is_good = (numbers.isfinite() & (numbers > 0)).all()
    if distributed.world_size() > 1:
        least_of_ranks = is_good.float()
        dist.all_reduce(least_of_ranks, dist.ReduceOp.MIN)
        is_good = least_of_ranks > 0
    return is_good
