"""What a call needs from its batch: rows and scales that are checked, on one rank or
over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from cloob import distributed
from cloob.distributed import Layout
from cloob.functional.checks import check_number, check_rows, extremes
from cloob.functional.private import outside_compiler
from cloob.functional.reference import (
    Scale,
    both_directions_of,
    check_pairs,
    combine,
    direction_of,
    is_symmetric,
    weighted_direction,
)
from cloob.objective.labels import Labels, check_reach

Scales = dict[str, float | Tensor]
"""τ⁻¹ (``inv_tau``), β (``beta``) and the sigmoid loss's ``bias`` of a call: fixed
numbers, or 0-d tensors.
"""
UNIT_TOLERANCE = (
    0.01  # on the length of a row; rows made unit in bfloat16 are within half of it
)
_CONE = 0.8  # mean cosine from which rows are too much alike for retrieval


def check_values(
    x: Tensor,
    y: Tensor,
    scales: Scales,
    *,
    looks_for_cone: bool,
    looks_for_logarithm: bool,
) -> tuple[dict[str, str | None], float | None]:
    """Refuses rows and learned scales that no loss can be computed from, for which it
    waits for the device once; returns warnings by their kind, and β as a number where
    the rows are of unit length.
    """
    sides = {"image_features": x, "text_features": y}
    learned = {
        name: scale for name, scale in scales.items() if isinstance(scale, Tensor)
    }
    lengths = extremes(
        **sides, **learned, **({"cosine": mean_cosine(x, y)} if looks_for_cone else {})
    )
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
                f"{name} has rows of length {least:.3g} to {greatest:.3g}, but the"
                " objective is one of unit rows: torch.nn.functional.normalize makes"
                " them (warned once; not with check=False)",
            )
    if looks_for_cone and (notice := cone_notice(lengths["cosine"][0])):
        advice = "centre and scale the inputs (cloob.Head does), or begin with infoloob"
        notices["cone"] = f"{notice}: {advice} (warned once; not with check=False)"
    if looks_for_logarithm:
        inv_tau = (
            lengths["inv_tau"][0] if "inv_tau" in learned else float(scales["inv_tau"])
        )
        notices["logarithm"] = logarithm_notice("logit_scale", inv_tau)
    if "lengths" in notices:
        return notices, None
    beta = lengths["beta"][0] if "beta" in learned else float(scales["beta"])
    return notices, beta


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


def logarithm_notice(name: str, number: float) -> str | None:
    """A warning of a number that looks like the logarithm of CLIP's τ⁻¹, as its code
    keeps it.
    """
    for inv_tau, shown in ((100.0, "ln 100"), (1 / 0.07, "ln(1/0.07)")):
        if abs(number / math.log(inv_tau) - 1) < 0.02:
            return (
                f"{name} is {number:.4g}, which is {shown}: τ⁻¹ itself is meant,"
                f" {inv_tau:.3g}"
            )
    return None


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
    numbers = torch.cat(
        [x.norm(dim=1), y.norm(dim=1), *(scale.reshape(1) for scale in scales)]
    )
    good = (numbers.isfinite() & (numbers > 0)).all()
    if distributed.world_size() > 1:
        least = good.float()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        good = least > 0
    return good


class Batch(NamedTuple):
    """What a loss is computed from: (n, D) rows, what was said of their pairs, scales,
    and the rows of all ranks if they are contrasted.
    """

    x: Tensor
    y: Tensor
    labels: Labels
    scales: Scales
    layout: Layout | None
    # β as a number, infinite where it is not known, of rows of unit length
    beta_of_unit_rows: float | None = None

    @property
    def n_candidates(self) -> int:
        """How many rows every row is contrasted with."""
        return len(self.x) if self.layout is None else self.layout.total


def read_batch(
    image_features: Tensor,
    text_features: Tensor,
    labels: Labels,
    prepare: Callable[[Tensor, Tensor], tuple[Scales, float | None]],
    contrast: str,
    *,
    look: bool,
) -> Batch:
    """The batch of a call by itself; ``look`` also reads the values of labels."""
    x, y = check_pairs(image_features, text_features)
    labels = labels.checked(x, len(x), contrast, look=look)
    scales, beta_of_unit_rows = prepare(x, y)
    return Batch(x, y, labels, scales, None, beta_of_unit_rows)


@outside_compiler
def read_batch_over_ranks(
    image_features: Tensor,
    text_features: Tensor,
    labels: Labels,
    prepare: Callable[[Tensor, Tensor], tuple[Scales, float | None]],
    member: Mapping[str, Any],
    *,
    look: bool,
    layout: Layout | None,
) -> Batch:
    """This rank's part of a batch of all ranks, checked.

    A ``layout`` is trusted. Without one ranks exchange their settings, scales and
    sizes: all raise if one has a fault, or if they differ.
    """
    fault: Exception | None = None
    own_values: dict[str, Any] = dict(member)
    batch: Batch | None = None
    try:
        x, y = check_pairs(image_features, text_features, at_least=1)
        total = None if layout is None else layout.total
        labels = labels.checked(x, total, member["contrast"], look=look)
        batch = Batch(x, y, labels, prepare(x, y)[0], layout)
        if layout is not None:
            return batch
        own_values |= values_to_compare(batch)
        own_values["reach"] = labels.reach(look=look)
    except Exception as error:
        if layout is not None:
            raise
        fault = error
    # The same kind on all ranks: also where this one was handed no tensor.
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = image_features.device if isinstance(image_features, Tensor) else default
    values_of_ranks = distributed.agree(own_values, fault, distributed.host(device))
    assert batch is not None  # a rank without one has raised
    layout_of_all = Layout(values_of_ranks.pop("rows"))
    check_reach(values_of_ranks.pop("reach"), layout_of_all.total)
    for name, of_ranks in values_of_ranks.items():
        check_equal(name, of_ranks, is_scale=name in batch.scales)
    return batch._replace(layout=layout_of_all)


def values_to_compare(batch: Batch) -> dict[str, Any]:
    """A rank's values that must equal the others', and its number of rows, by name."""
    scales = {
        name: float(scale.detach() if isinstance(scale, Tensor) else scale)
        for name, scale in batch.scales.items()
    }
    return scales | {
        "rows": len(batch.x),
        "embedding dimension": batch.x.shape[1],
        "dtype": str(batch.x.dtype),
        **batch.labels.presence(),
    }


def check_equal(name: str, of_ranks: tuple[Any, ...], *, is_scale: bool) -> None:
    """Refuses what ranks must have in common, and have not."""
    if is_scale:
        # Processors that differ may give other last bits for the exponential of the
        # same parameter.
        size = max(1.0, *map(abs, of_ranks)) if name == "bias" else min(of_ranks)
        differ = max(of_ranks) - min(of_ranks) > 1e-3 * size
    else:
        differ = len(set(of_ranks)) > 1
    if not differ:
        return
    named = ", ".join(f"rank {r} has {value}" for r, value in enumerate(of_ranks))
    advice = "; average a learnable one's gradient: inside what DDP wraps, or by"
    raise ValueError(
        f"ranks differ in {name}: {named}{f'{advice} yourself' if is_scale else ''}"
    )


def loss_over_ranks(
    batch: Batch,
    backend: ModuleType,
    *,
    contrast: str,
    hopfield: bool,
    scale: Scale,
    exclude_above: float | None = None,
    matmul: torch.dtype | None = None,
    negatives: tuple[Tensor, Layout] | None = None,
) -> Tensor:
    """The global loss of the (n, D) rows of every rank, by the functions of a backend,
    with this rank's gradient.

    ``negatives``: further candidates of the anchors x, with their layout. They are
    stored in no memory.
    """
    layout = batch.layout
    assert layout is not None
    both_directions = both_directions_of(backend, contrast, hopfield)
    if both_directions is not None and negatives is None and not batch.labels.weigh:
        both = both_directions(
            batch.x,
            distributed.gather_rows(batch.y, layout),
            batch.scales["inv_tau"],
            exclude_above=exclude_above,
            matmul=matmul,
            stack_ranks=partial(distributed.stack_ranks, layout=layout),
            **_place_among_all(batch, layout),
        )
    else:
        both = _two_products(
            batch, layout, backend, contrast, hopfield, exclude_above, matmul, negatives
        )
    share = len(batch.x) / layout.total
    loss = combine(both, batch.scales["inv_tau"], scale)
    return distributed.global_sum(loss * share, layout)


def _place_among_all(batch: Batch, layout: Layout) -> dict[str, Any]:
    """Where the own pairs are among those of all ranks, and the ids of both."""
    ids = batch.labels.ids
    return {
        "positive_offset": layout.local.start,
        "ids": ids,
        "candidate_ids": None if ids is None else distributed.gather_rows(ids, layout),
    }


def _two_products(
    batch: Batch,
    layout: Layout,
    backend: ModuleType,
    contrast: str,
    hopfield: bool,
    exclude_above: float | None,
    matmul: torch.dtype | None,
    negatives: tuple[Tensor, Layout] | None,
) -> Tensor:
    """The sum of both directions of the own anchors, a product of logits each."""
    x, y, labels, scales, *_ = batch
    place = _place_among_all(batch, layout)

    def retrieve(query: Tensor, memory: Tensor) -> Tensor:
        if not hopfield:
            return query
        options = {"matmul": matmul} if matmul else {}
        retrieved: Tensor = backend.hopfield_retrieval(
            query, memory, scales["beta"], **options
        )
        return retrieved

    all_x, all_y = _gather_both(x, y, layout)
    u_x, u_y = retrieve(x, all_x), retrieve(y, all_x)
    v_x, v_y = retrieve(x, all_y), retrieve(y, all_y)
    all_u_y, all_v_x = all_y, all_x
    if hopfield:
        all_u_y, all_v_x = _gather_both(u_y, v_x, layout)
    if negatives is not None:
        z, layout_of_z = negatives
        further_candidates = distributed.gather_rows(retrieve(z, all_x), layout_of_z)
        all_u_y = torch.cat([all_u_y, further_candidates])
    bias = scales["bias"]
    if labels.weigh:
        direction = weighted_direction(
            backend, contrast, bias, exclude_above, labels.targets, labels.weights
        )
    else:
        direction = direction_of(backend, contrast, bias, exclude_above, matmul)
    images = direction(u_x, all_u_y, scales["inv_tau"], **place)
    if is_symmetric(contrast, hopfield, exclude_above) and not labels.weigh:
        # Both directions are one sum over all pairs: so is the sum over ranks of one.
        return 2 * images
    return images + direction(v_y, all_v_x, scales["inv_tau"], **place)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]
