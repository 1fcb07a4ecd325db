"""The loss of a batch, on one rank or over the rows of all."""

from __future__ import annotations

import torch
from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.functional import streamed
from cloob.functional.pairs import PairContrast, in_scale
from cloob.functional.reference import Pairing
from cloob.objective.backends import Backend, Products, choose_backend
from cloob.objective.batch import Batch


def loss_of(
    batch: Batch,
    backend: Backend,
    matmul: Products,
    negatives: tuple[Tensor, Layout] | None = None,
) -> Tensor:
    """The 0-d loss of a batch.

    ``negatives``: further candidates of the anchors x, with their layout. They are
    stored in no memory.
    """
    member = batch.member
    layout = batch.layout
    n_candidates = len(batch.x) if layout is None else layout.total
    if negatives is not None:
        n_candidates += negatives[1].total
    pair_contrast = PairContrast(
        choose_backend(backend, matmul, member.hopfield, n_candidates, batch.x.device),
        member.contrast,
        bias=batch.scales["bias"],
        exclude_above=member.exclude_above,
        matmul=torch.bfloat16 if matmul == "bfloat16" else None,
        targets=batch.labels.targets,
        weights=batch.labels.weights,
    )
    if layout is not None:
        return _loss_over_ranks(batch, layout, pair_contrast, negatives)
    is_streamed = pair_contrast.backend is streamed
    return pair_contrast.loss(
        batch.x,
        batch.y,
        batch.scales["inv_tau"],
        batch.scales["beta"],
        hopfield=member.hopfield,
        scale=member.scale,
        ids=batch.labels.ids,
        beta_of_unit_rows=batch.beta_of_unit_rows if is_streamed else None,
    )


def _loss_over_ranks(
    batch: Batch,
    layout: Layout,
    pair_contrast: PairContrast,
    negatives: tuple[Tensor, Layout] | None,
) -> Tensor:
    """The global loss of the (n, D) rows of every rank, with this rank's gradient."""
    member = batch.member
    own: Pairing = {"positive_offset": layout.local.start}
    ids = batch.labels.ids
    if ids is not None:
        own["ids"] = ids
        own["candidate_ids"] = distributed.gather_rows(ids, layout)
    softmax_both = None
    if pair_contrast.backend is streamed and not member.hopfield and negatives is None:
        softmax_both = pair_contrast.function_of_two("softmax_both")
    if softmax_both is not None:
        both = softmax_both(
            batch.x,
            distributed.gather_rows(batch.y, layout),
            batch.scales["inv_tau"],
            stack_ranks=lambda value: distributed.stack_ranks(value, layout),
            **pair_contrast.options,
            **own,
        )
    else:
        both = _two_products(batch, layout, pair_contrast, own, negatives)
    share = len(batch.x) / layout.total
    loss = in_scale(both, batch.scales["inv_tau"], member.scale)
    return distributed.global_sum(loss * share, layout)


def _two_products(
    batch: Batch,
    layout: Layout,
    pair_contrast: PairContrast,
    own: Pairing,
    negatives: tuple[Tensor, Layout] | None,
) -> Tensor:
    """The sum of both directions of the own anchors, a product of logits each."""
    x, y, inv_tau = batch.x, batch.y, batch.scales["inv_tau"]
    hopfield = batch.member.hopfield

    def retrieve(query: Tensor, memory: Tensor) -> Tensor:
        if not hopfield:
            return query
        options = {"matmul": pair_contrast.matmul} if pair_contrast.matmul else {}
        retrieved: Tensor = pair_contrast.backend.hopfield_retrieval(
            query, memory, batch.scales["beta"], **options
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
    if pair_contrast.directions_are_equal:
        # Both directions are one sum over all pairs: so is the sum over ranks of one.
        return 2 * pair_contrast.one_direction(u_x, all_u_y, inv_tau, **own)
    return pair_contrast.of_retrieved((u_x, v_y), (all_u_y, all_v_x), inv_tau, **own)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]
