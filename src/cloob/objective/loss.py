"""The loss of a batch, on one rank or over the rows of all."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.functional import streamed
from cloob.functional.pairs import Directions, in_scale, pair_loss
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
    x, y, labels, scales, member, layout, beta_of_unit_rows = batch
    n_candidates = len(x) if layout is None else layout.total
    if negatives is not None:
        n_candidates += negatives[1].total
    module = choose_backend(backend, matmul, member.hopfield, n_candidates, x.device)
    dtype = torch.bfloat16 if matmul == "bfloat16" else None
    if layout is not None:
        return _loss_over_ranks(batch, layout, module, dtype, negatives)
    return pair_loss(
        module,
        x,
        y,
        scales["inv_tau"],
        scales["beta"],
        contrast=member.contrast,
        hopfield=member.hopfield,
        scale=member.scale,
        bias=scales["bias"],
        ids=labels.ids,
        exclude_above=member.exclude_above,
        targets=labels.targets,
        weights=labels.weights,
        beta_of_unit_rows=beta_of_unit_rows if module is streamed else None,
        matmul=dtype,
    )


def _loss_over_ranks(
    batch: Batch,
    layout: Layout,
    backend: ModuleType,
    matmul: torch.dtype | None,
    negatives: tuple[Tensor, Layout] | None,
) -> Tensor:
    """The global loss of the (n, D) rows of every rank, by the functions of a backend,
    with this rank's gradient.
    """
    member = batch.member
    directions = Directions(
        backend,
        member.contrast,
        bias=batch.scales["bias"],
        exclude_above=member.exclude_above,
        matmul=matmul,
        targets=batch.labels.targets,
        weights=batch.labels.weights,
    )
    own: Pairing = {"positive_offset": layout.local.start}
    ids = batch.labels.ids
    if ids is not None:
        own["ids"] = ids
        own["candidate_ids"] = distributed.gather_rows(ids, layout)
    softmax_both = None
    if backend is streamed and not member.hopfield and negatives is None:
        softmax_both = directions.function_of_two("softmax_both")
    if softmax_both is not None:
        both = softmax_both(
            batch.x,
            distributed.gather_rows(batch.y, layout),
            batch.scales["inv_tau"],
            stack_ranks=lambda value: distributed.stack_ranks(value, layout),
            **directions.options,
            **own,
        )
    else:
        both = _two_products(batch, layout, directions, own, negatives)
    share = len(batch.x) / layout.total
    loss = in_scale(both, batch.scales["inv_tau"], member.scale)
    return distributed.global_sum(loss * share, layout)


def _two_products(
    batch: Batch,
    layout: Layout,
    directions: Directions,
    own: Pairing,
    negatives: tuple[Tensor, Layout] | None,
) -> Tensor:
    """The sum of both directions of the own anchors, a product of logits each."""
    x, y, inv_tau = batch.x, batch.y, batch.scales["inv_tau"]
    hopfield = batch.member.hopfield

    def retrieve(query: Tensor, memory: Tensor) -> Tensor:
        if not hopfield:
            return query
        options = {"matmul": directions.matmul} if directions.matmul else {}
        retrieved: Tensor = directions.backend.hopfield_retrieval(
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
    if directions.are_equal:
        # Both directions are one sum over all pairs: so is the sum over ranks of one.
        return 2 * directions.one(u_x, all_u_y, inv_tau, **own)
    return directions.of_retrieved((u_x, v_y), (all_u_y, all_v_x), inv_tau, **own)


def _gather_both(left: Tensor, right: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    both = distributed.gather_rows(torch.cat([left, right], dim=1), layout)
    return both[:, : left.shape[1]], both[:, left.shape[1] :]
