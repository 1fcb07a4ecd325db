"""The objective over ranks: a rank's rows against those of all. The gradient contract is :mod:`cloob.distributed`'s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.family import Contrast
from cloob.functional.checks import check_ids
from cloob.functional.modes import outside_compiler
from cloob.functional.reference import Scale, check_pairs, combine, direction_of, is_symmetric
from cloob.objective.values import Scales


class LocalRows(NamedTuple):
    """What this rank brings: x and y (n, D), ids (n,) or None, and the scales; and how many rows each rank has."""

    x: Tensor
    y: Tensor
    ids: Tensor | None
    scales: Scales
    layout: Layout


@outside_compiler
def local_rows(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    prepare: Callable[[Tensor, Tensor], Scales],
    member: Mapping[str, Any],
    layout: Layout | None,
) -> LocalRows:
    """This rank's rows, once every rank found its arguments in order; ``prepare`` looks at rows and gives the scales.

    The first rank's fault is raised on all ranks, as is ValueError where their widths, dtypes, scales or ``member``
    (contrast, hopfield, scale and margin) differ. With a ``layout`` ranks compare nothing.
    """
    fault: Exception | None = None
    facts: dict[str, Any] = dict(member)
    scales: Scales = {}
    x, y = image_features, text_features
    try:
        x, y = check_pairs(x, y, at_least=1)
        both = check_ids(ids, None, len(x), len(x), x.device)
        ids = None if both is None else both[0].to(torch.int64)
        scales = prepare(x, y)
        if layout is not None:
            return LocalRows(x, y, ids, scales, layout)
        facts |= {name: float(scale.detach() if isinstance(scale, Tensor) else scale) for name, scale in scales.items()}
        facts |= {"rows": len(x), "embedding dimension": x.shape[1], "dtype": str(x.dtype), "ids": ids is not None}
    except Exception as error:
        if layout is not None:
            raise
        fault = error
    # The same on all ranks: also where this one was handed no tensor.
    somewhere = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = image_features.device if isinstance(image_features, Tensor) else somewhere
    by_name = distributed.agree(facts, fault, distributed.host(device))
    for name, of_ranks in by_name.items():
        if name in scales:
            # Processors that differ may give other last bits for the exponential of the same parameter.
            size = max(1.0, *map(abs, of_ranks)) if name == "bias" else min(of_ranks)
            differ = max(of_ranks) - min(of_ranks) > 1e-3 * size
        else:
            differ = name != "rows" and len(set(of_ranks)) > 1
        if differ:
            named = ", ".join(f"rank {r} has {value}" for r, value in enumerate(of_ranks))
            advice = "; average a learnable one's gradient: inside what DDP wraps, or by yourself"
            raise ValueError(f"ranks differ in {name}: {named}{advice if name in scales else ''}")
    return LocalRows(x, y, ids, scales, Layout(by_name["rows"]))


def loss_over_ranks(
    x: Tensor,
    y: Tensor,
    ids: Tensor | None,
    scales: Scales,
    layout: Layout,
    backend: ModuleType,
    *,
    contrast: Contrast,
    hopfield: bool,
    scale: Scale,
    exclude_above: float | None,
    matmul: torch.dtype | None,
) -> Tensor:
    """The global loss by the functions of a backend, with the gradient of this rank's rows."""
    inv_tau, beta = scales["inv_tau"], scales["beta"]
    all_x, all_y = _gather_both(x, y, layout)
    if hopfield:
        u_x, u_y, v_x, v_y = (
            backend.hopfield_retrieval(query, memory, beta, **({"matmul": matmul} if matmul else {}))
            for memory in (all_x, all_y)
            for query in (x, y)
        )
        all_u_y, all_v_x = _gather_both(u_y, v_x, layout)
    else:
        u_x, v_y, all_u_y, all_v_x = x, y, all_y, all_x
    direction = direction_of(backend, contrast, scales["bias"], exclude_above, matmul)
    positives = {
        "positive_offset": layout.local.start,
        "ids": ids,
        "candidate_ids": None if ids is None else distributed.gather_rows(ids, layout),
    }
    images = direction(u_x, all_u_y, inv_tau, **positives)
    # Where both directions are one sum over all pairs, the sum over ranks of the first is that sum.
    texts = images if is_symmetric(contrast, hopfield, exclude_above) else direction(v_y, all_v_x, inv_tau, **positives)
    share = len(x) / layout.total
    return distributed.global_sum(combine(images, texts, inv_tau, scale) * share)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Both matrices from all ranks in one exchange."""
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]
