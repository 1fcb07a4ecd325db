"""The batch of a call, checked, on one rank or over all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.family import Contrast
from cloob.functional.checks import check_number, scalar
from cloob.functional.pairs import Scale, check_pairs
from cloob.functional.private import outside_compiler
from cloob.objective.labels import Labels, check_reach
from cloob.objective.notices import Notices
from cloob.objective.values import Scales, read_values


class Member(NamedTuple):
    """Which loss: what ranks must have in common."""

    contrast: Contrast
    hopfield: bool
    scale: Scale
    exclude_above: float | None


class Call(NamedTuple):
    """What a call was handed, with the scales that are the module's."""

    image_features: Tensor
    text_features: Tensor
    labels: Labels
    scales: Scales
    member: Member
    may_read: bool  # values, for which the device is waited for
    trains: bool
    gives_inv_tau: bool
    trusted: Layout | None


class Batch(NamedTuple):
    """What a loss is computed from: (n, D) rows, what was said of their pairs, scales,
    and the rows of all ranks if they are contrasted.
    """

    x: Tensor
    y: Tensor
    labels: Labels
    scales: Scales
    member: Member
    layout: Layout | None = None
    # β as a number, infinite where it is not known, of rows of unit length
    beta_of_unit_rows: float | None = None

    def values_to_compare(self, *, may_read: bool) -> dict[str, Any]:
        """What ranks compare of their batches, by name."""
        scales = {
            name: float(scale.detach() if isinstance(scale, Tensor) else scale)
            for name, scale in self.scales.items()
        }
        return (
            self.member._asdict()
            | scales
            | {
                "rows": len(self.x),
                "reach": self.labels.reach(may_read=may_read),
                "embedding dimension": self.x.shape[1],
                "dtype": str(self.x.dtype),
                **self.labels.presence(),
            }
        )


def read_batch(call: Call, notices: Notices) -> Batch:
    """The batch of a call by itself."""
    x, y = check_pairs(call.image_features, call.text_features)
    return _read(call, notices, x, y, len(x))


def read_batch_over_ranks(call: Call, notices: Notices) -> Batch:
    """This rank's part of a batch of all ranks, checked.

    A trusted layout is taken. Without one ranks exchange their settings, scales and
    sizes: all raise if one has a fault, or if they differ.
    """
    layout = call.trusted

    def read() -> Batch:
        x, y = check_pairs(call.image_features, call.text_features, at_least=1)
        total = None if layout is None else layout.total
        return _read(call, notices, x, y, total)

    if layout is not None:
        return read()._replace(layout=layout)
    return _agree(read, call)


def _read(
    call: Call, notices: Notices, x: Tensor, y: Tensor, n_candidates: int | None
) -> Batch:
    """The batch, of which so many candidates, None where they are not known yet."""
    member = call.member
    labels = call.labels.checked(
        x, n_candidates, member.contrast, may_read=call.may_read
    )
    check_learned(call, notices)
    scales: Scales = {}
    for name, value in call.scales.items():  # as far as no device is waited for
        scales[name] = value
        if isinstance(value, Tensor):
            scales[name] = scalar(name, value, x, positive=name != "bias")
        else:
            check_number(name, value, x.dtype, positive=name != "bias")
    batch = Batch(x, y, labels, scales, member)
    if call.trusted is not None:
        beta = scales["beta"]
        # of a learned β no number is read
        number = math.inf if isinstance(beta, Tensor) else beta
        return batch._replace(beta_of_unit_rows=number)
    if not call.may_read:
        return batch
    cone = member.hopfield and call.trains and notices.is_first("look at cone")
    values = read_values(x, y, scales, cosine=cone)
    for key, notice in values.notices():
        notices.warn(key, notice)
    if call.gives_inv_tau:
        notices.warn_of_logarithm("logit_scale", values.scales["inv_tau"])
    if values.of_other_length:
        return batch
    return batch._replace(beta_of_unit_rows=values.scales["beta"])


def check_learned(call: Call, notices: Notices) -> None:
    """Refuses a τ⁻¹ that learns where it would rise for all embeddings; warns where it
    does for those that match.
    """
    inv_tau = call.scales["inv_tau"]
    if not isinstance(inv_tau, Tensor) or not inv_tau.requires_grad:
        return
    if not torch.is_grad_enabled():
        return
    if call.member.scale == "paper":
        raise ValueError(
            "logit_scale learns, which needs scale='unit': τ · loss falls with τ⁻¹ for"
            " all embeddings; detach it to use its value alone"
        )
    if call.member.contrast == "infoloob" and call.trains:
        notices.warn(
            "bound",
            "InfoLOOB of pairs that match falls with τ⁻¹: a learned one ends at its"
            " bound; fix it",
        )


@outside_compiler
def _agree(read: Callable[[], Batch], call: Call) -> Batch:
    """The batch that is read, with the layout of all ranks."""
    fault: Exception | None = None
    batch: Batch | None = None
    own_values: dict[str, Any] = {}
    try:
        batch = read()
        own_values = batch.values_to_compare(may_read=call.may_read)
    except Exception as error:
        fault = error
    # The same kind on all ranks: also where this one was handed no tensor.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(call.image_features, Tensor):
        device = call.image_features.device
    values_of_ranks = distributed.agree(own_values, fault, distributed.host(device))
    assert batch is not None  # a rank without one has raised
    layout = Layout(values_of_ranks.pop("rows"))
    check_reach(values_of_ranks.pop("reach"), layout.total)
    for name, of_ranks in values_of_ranks.items():
        check_equal(name, of_ranks, is_scale=name in batch.scales)
    return batch._replace(layout=layout)


def check_equal(name: str, of_ranks: tuple[Any, ...], *, is_scale: bool) -> None:
    """Refuses what ranks must have in common, and have not."""
    advice = ""
    if is_scale:
        # Processors that differ may give other last bits for the exponential of the
        # same parameter.
        size = max(1.0, *map(abs, of_ranks)) if name == "bias" else min(of_ranks)
        differ = max(of_ranks) - min(of_ranks) > 1e-3 * size
        advice = (
            "; average a learnable one's gradient: inside what DDP wraps, or by"
            " yourself"
        )
    else:
        differ = len(set(of_ranks)) > 1
    if differ:
        named = ", ".join(f"rank {r} has {value}" for r, value in enumerate(of_ranks))
        raise ValueError(f"ranks differ in {name}: {named}{advice}")
