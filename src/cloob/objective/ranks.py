"""The objective over ranks: a rank's rows against those of all. The gradient contract is :mod:`cloob.distributed`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.functional.checks import as_rows, check_ids, outside_autocast, outside_compiler
from cloob.functional.reference import Contrast, Parts, Scale, combine, is_symmetric
from cloob.objective.values import Scales

_SETTINGS: dict[str, tuple[str | bool, ...]] = {
    "contrast": get_args(Contrast),
    "hopfield": (False, True),
    "scale": get_args(Scale),
}


class LocalRows(NamedTuple):
    """What this rank brings: x and y (n, D), ids (n,) or None, and the scales; and how many rows each rank has."""

    x: Tensor
    y: Tensor
    ids: Tensor | None
    scales: Scales
    layout: Layout


@outside_autocast
def known_rows(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    prepare: Callable[[Tensor, Tensor], Scales],
    layout: Layout,
) -> LocalRows:
    """This rank's rows, where it is known how many each rank has; tells the other ranks nothing."""
    x, y, ids = _checked(image_features, text_features, ids)
    own = layout.local.stop - layout.local.start
    if len(x) != own:
        raise ValueError(f"{len(x)} rows on this rank, where the layout says {own}")
    return LocalRows(x, y, ids, prepare(x, y), layout)


def _checked(image_features: Tensor, text_features: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A rank's arguments, if they fit each other."""
    x, y = as_rows(image_features=image_features, text_features=text_features)
    if len(x) != len(y) or len(x) < 1:
        raise ValueError(f"{len(x)} image_features and {len(y)} text_features: equally many, at least 1, are expected")
    both = check_ids(ids, None, len(x), len(x), x.device)
    return x, y, None if both is None else both[0].to(torch.int64)


@outside_compiler
@outside_autocast
def agree_on_rows(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    prepare: Callable[[Tensor, Tensor], Scales],
    member: Mapping[str, str | bool],
) -> LocalRows:
    """This rank's rows, once every rank found its arguments in order; ``prepare`` looks at rows and gives the scales.

    The first rank's fault is raised on all ranks, as is ValueError where their widths, dtypes, scales or ``member``
    (contrast, hopfield and scale) differ.
    """
    fault, x, y = None, image_features, text_features
    scales: Scales = {"inv_tau": 1.0, "beta": 1.0, "bias": 0.0}
    facts: dict[str, int | float] = dict.fromkeys(("rows", "embedding dimension", "dtype (bytes a number)", "ids"), 0)
    facts |= dict.fromkeys(scales, 1.0)
    settings = {name: _SETTINGS[name].index(value) for name, value in member.items()}
    try:
        x, y, ids = _checked(image_features, text_features, ids)
        scales = prepare(x, y)
        values = (float(scale.detach() if isinstance(scale, Tensor) else scale) for scale in scales.values())
        numbers = (len(x), x.shape[1], x.element_size(), int(ids is not None), *values)
        facts = dict(zip(facts, numbers, strict=True))
    except Exception as error:
        fault = error
    # The same on all ranks: also where this one was handed no tensor.
    somewhere = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = image_features.device if isinstance(image_features, Tensor) else somewhere
    facts_of_ranks = distributed.agree(facts | settings, fault, distributed.host(device))
    for name, by_rank in facts_of_ranks.items():
        # Processors that differ may give other last bits for the exponential of the same parameter.
        size = max(1.0, *map(abs, by_rank)) if name == "bias" else min(map(abs, by_rank))
        tolerance = 1e-3 * size if name in scales else 0.0
        if name != "rows" and max(by_rank) - min(by_rank) > tolerance:
            shown = [_SETTINGS[name][value] for value in by_rank] if name in settings else by_rank
            named = ", ".join(f"rank {r} has {value}" for r, value in enumerate(shown))
            advice = (
                "; average a learnable one's gradient: inside what DDP wraps, or by yourself" if name in scales else ""
            )
            raise ValueError(f"ranks differ in {name}: {named}{advice}")
    return LocalRows(x, y, ids, scales, Layout(facts_of_ranks["rows"]))


@outside_autocast
def loss_over_ranks(
    x: Tensor,
    y: Tensor,
    scales: Scales,
    *,
    ids: Tensor | None,
    layout: Layout,
    parts: Parts,
    contrast: Contrast,
    hopfield: bool,
    scale: Scale,
) -> Tensor:
    """The global loss, with the gradient of this rank's rows; arguments as the functions of ``parts`` have them."""
    inv_tau, beta = scales["inv_tau"], scales["beta"]
    all_x, all_y = _gather_both(x, y, layout)
    if hopfield:
        u_x, u_y, v_x, v_y = (
            parts.hopfield_retrieval(query, memory, beta) for memory in (all_x, all_y) for query in (x, y)
        )
        all_u_y, all_v_x = _gather_both(u_y, v_x, layout)
    else:
        u_x, v_y, all_u_y, all_v_x = x, y, all_y, all_x
    direction = parts.direction(contrast, scales["bias"])
    positives = {
        "positive_offset": layout.local.start,
        "ids": ids,
        "candidate_ids": None if ids is None else distributed.gather_rows(ids, layout),
    }
    images = direction(u_x, all_u_y, inv_tau, **positives)
    # Where both directions are one sum over all pairs, the sum over ranks of the first is that sum.
    texts = images if is_symmetric(contrast, hopfield) else direction(v_y, all_v_x, inv_tau, **positives)
    share = len(x) / layout.total
    return distributed.global_sum(combine(images, texts, inv_tau, scale) * share)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Both matrices from all ranks in one exchange."""
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]
