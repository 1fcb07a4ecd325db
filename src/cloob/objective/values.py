"""What the rows and the scales of a call must be: looked at, or decided on the device without waiting for it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cloob.distributed import world_size
from cloob.functional.checks import check_number, check_rows, extremes, scalar

Scales = dict[str, float | Tensor]
"""τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias`` of a call: numbers where they are fixed, else 0-d
tensors."""

# Lengths further than this from one are told of: rows made unit in bfloat16 are within half of it.
UNIT_TOLERANCE = 0.01
_CONE = 0.8  # mean cosine from which rows are too much alike for retrieval


def check_scales(scales: Scales, like: Tensor) -> Scales:
    """The scales of a call, checked as far as no device is waited for; tensors with the rows' dtype and device."""
    checked = dict(scales)
    for name, value in scales.items():
        if isinstance(value, Tensor):
            checked[name] = scalar(name, value, like, positive=name != "bias")
        else:
            check_number(name, value, like.dtype, positive=name != "bias")
    return checked


def check_values(x: Tensor, y: Tensor, scales: Scales, *, cone: bool, given: bool) -> dict[str, str | None]:
    """Looks at rows and learned scales; waits for the device once. Returns what is to be warned of, by its kind.

    ``cone``: look whether rows are too much alike for retrieval; ``given``: τ⁻¹ is the call's own.
    """
    sides = {"image_features": x, "text_features": y}
    learned = {name: scale for name, scale in scales.items() if isinstance(scale, Tensor)}
    lengths = extremes(**sides, **learned, **({"cosine": mean_cosine(x, y)} if cone else {}))
    for name in learned:
        check_number(name, lengths[name][0], x.dtype, positive=name != "bias")
    notices: dict[str, str | None] = {}
    for name, rows in sides.items():
        least, greatest = lengths[name]
        if not 0 < least <= greatest < math.inf:
            check_rows(name, rows)
        if max(1 - least, greatest - 1) > UNIT_TOLERANCE:
            notices.setdefault(
                "lengths",
                f"{name} has rows of length {least:.3g} to {greatest:.3g}, but the objective is one of unit rows: "
                "torch.nn.functional.normalize makes them (said once; check=False says nothing)",
            )
    if cone and (notice := cone_notice(lengths["cosine"][0])):
        advice = "centre and scale the inputs (cloob.Head does), or begin with infoloob"
        notices["cone"] = f"{notice}: {advice} (said once; check=False says nothing)"
    if given:
        inv_tau = lengths["inv_tau"][0] if "inv_tau" in learned else float(scales["inv_tau"])
        notices["logarithm"] = logarithm_notice("logit_scale", inv_tau)
    return notices


def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
    """0-d mean cosine of different rows, on the side whose rows are more alike."""
    n, means = len(x), torch.stack([F.normalize(rows.detach(), dim=1).mean(dim=0) for rows in (x, y)])
    return (n * means.square().sum(dim=1).amax() - 1) / max(n - 1, 1)


def cone_notice(cosine: float) -> str | None:
    """A warning of rows that are too much alike for retrieval."""
    alike = f"rows have a mean cosine of {cosine:.2f}, and Hopfield retrieval averages what is alike"
    return alike if cosine > _CONE else None


def logarithm_notice(name: str, number: float) -> str | None:
    """A warning of a number that looks like the logarithm of CLIP's τ⁻¹, as its code keeps it."""
    for inv_tau, shown in ((100.0, "ln 100"), (1 / 0.07, "ln(1/0.07)")):
        if abs(number / math.log(inv_tau) - 1) < 0.02:
            return f"{name} is {number:.4g}, which is {shown}: τ⁻¹ itself is meant, {inv_tau:.3g}"
    return None


def check_finite(**named: Tensor) -> None:
    """NonFiniteFeaturesError for rows that are NaN, infinite or zero, which names them; waits for the device."""
    for name, rows in named.items():
        check_rows(name, rows)


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
