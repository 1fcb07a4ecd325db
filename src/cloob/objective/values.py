"""What the rows and the scales of a call must be: looked at, or decided on the device without waiting for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cloob.distributed import Layout, world_size
from cloob.functional.checks import check_lengths, check_number, extremes, scalar

if TYPE_CHECKING:
    from cloob.objective.module import ContrastiveObjective

Scales = dict[str, float | Tensor]
"""τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias`` of a call: numbers where they are fixed, else 0-d
tensors."""

# Lengths further than this from one are told of: rows made unit in bfloat16 are within half of it.
UNIT_TOLERANCE = 0.01
_CONE = 0.8  # mean cosine from which rows are too much alike for retrieval


def check_scales(scales: Scales, like: Tensor) -> Scales:
    """The scales of a call, tensors with the rows' dtype and device.

    ValueError where one is not positive (the bias: any number) and finite, as far as that is seen without waiting for a
    device.
    """
    checked: Scales = {}
    for name, value in scales.items():
        positive = name != "bias"
        if isinstance(value, Tensor):
            checked[name] = scalar(name, value, like, positive=positive)
        else:
            check_number(name, value, like.dtype, positive=positive)
            checked[name] = value
    return checked


def one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    """Raises ValueError for a setting that is none of its options."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(map(repr, options))} is expected")


def check_values(x: Tensor, y: Tensor, scales: Scales, *, cone: bool, given: bool) -> dict[str, str | None]:
    """Looks at rows and learned scales; waits for the device once. Returns what is to be warned of, by its kind.

    NonFiniteFeaturesError for a row that is NaN, infinite or zero; ValueError for a learned scale that is no positive,
    finite number, or a learned bias that is not finite. ``cone``: look whether rows are too much alike for retrieval;
    ``given``: τ⁻¹ is the call's own.
    """
    sides = {"image_features": x, "text_features": y}
    learned = {name: scale for name, scale in scales.items() if isinstance(scale, Tensor)}
    means = {f"mean of {name}": F.normalize(rows.detach(), dim=1).mean(0)[None] for name, rows in sides.items() if cone}
    lengths = extremes(**sides, **learned, **means)
    for name in learned:
        check_number(name, lengths[name][0], x.dtype, positive=name != "bias")
    check_lengths(lengths, **sides)
    notices: dict[str, str | None] = {}
    for name in sides:
        least, greatest = lengths[name]
        if max(1 - least, greatest - 1) > UNIT_TOLERANCE:
            notices.setdefault(
                "lengths",
                f"{name} has rows of length {least:.3g} to {greatest:.3g}, but the objective is one of unit rows: "
                "torch.nn.functional.normalize makes them (said once; check=False says nothing)",
            )
    n, longest = len(x), max((lengths[name][0] for name in means), default=0.0)
    cosine = (n * longest**2 - 1) / max(n - 1, 1)  # of different rows
    if cosine > _CONE:
        notices["cone"] = (
            f"rows have a mean cosine of {cosine:.2f}, and Hopfield retrieval averages what is alike: centre and scale "
            "the inputs (cloob.Head does), or begin with infoloob (said once; check=False says nothing)"
        )
    if given:
        inv_tau = lengths["inv_tau"][0] if "inv_tau" in learned else float(scales["inv_tau"])
        notices["logarithm"] = logarithm_notice("logit_scale", inv_tau)
    return notices


def logarithm_notice(name: str, number: float) -> str | None:
    """A warning of a number that looks like the logarithm of CLIP's τ⁻¹, as its code keeps it."""
    for inv_tau, shown in ((100.0, "ln 100"), (1 / 0.07, "ln(1/0.07)")):
        if abs(number / math.log(inv_tau) - 1) < 0.02:
            return f"{name} is {number:.4g}, which is {shown}: τ⁻¹ itself is meant, {inv_tau:.3g}"
    return None


def check_finite(**named: Tensor) -> None:
    """NonFiniteFeaturesError for rows that are NaN, infinite or zero, which names them; waits once for the device."""
    some = {name: rows for name, rows in named.items() if len(rows)}
    if some:
        check_lengths(extremes(**some), **some)


@contextlib.contextmanager
def without_waiting(objective: ContrastiveObjective, layout: Layout | None = None) -> Iterator[None]:
    """Inside, a call reads nothing from a device: values are not looked at, rows taken to be unit rows.

    :func:`acceptable` says on the device what the look would have said. Much longer rows than those of unit length may
    overflow to a loss that is not finite.

    Args:
        objective: The objective.
        layout: How many rows each rank will bring, for an objective that gathers; ranks then tell each other nothing
            of their arguments, and one whose arguments are wrong leaves the others waiting. None: they do, which waits
            for the device.
    """
    before = objective.check, objective.trusts_lengths, objective.layout
    objective.check, objective.trusts_lengths, objective.layout = False, True, layout
    try:
        yield
    finally:
        objective.check, objective.trusts_lengths, objective.layout = before


@torch.no_grad()
def acceptable(x: Tensor, y: Tensor, *scales: Tensor) -> Tensor:
    """Whether the objective with ``check=True`` takes these values, 0-d bool on their device; nothing is waited for.

    On all ranks no row of (N, D) is NaN, infinite or zero, and every 0-d scale is positive and finite.
    """
    numbers = torch.cat([x.norm(dim=1), y.norm(dim=1), *(scale.reshape(1) for scale in scales)])
    good = (numbers.isfinite() & (numbers > 0)).all()
    if world_size() > 1:
        least = good.float()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        good = least > 0
    return good
