"""Gradient caching: the gradient of a batch that does not fit in memory, from
micro-batches that do (Gao et al. 2021).

Embed every micro-batch without a graph, differentiate the objective once with respect
to all embeddings, then embed every micro-batch again and backpropagate its embeddings'
gradients: one micro-batch's activations at a time, for a second forward pass, with the
same random state and buffers. Batch normalisation sees micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cloob.functional.private import buffers_of
from cloob.training.generators import set_torch_rng_state, torch_rng_state

T = TypeVar("T")
Rows = tuple[Tensor, ...] | Mapping[str, Tensor]
Learned = tuple[Tensor, Tensor]
"""A tensor that learns beside the towers, and the leaf in its place whose gradient is
its own; a parameter is its own leaf.
"""
Arriving = tuple[Tensor, Tensor | None]
"""A root, and the gradient that arrives at it."""


def cached_backward(
    encode: Callable[[T], Rows],
    objective: Callable[..., Tensor],
    micro_batches: Iterable[T],
    *,
    towers: nn.Module,
    ids: Tensor | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
    **options: object,
) -> Tensor:
    """Adds the gradient of ``objective`` on the full batch to the parameters'
    ``.grad``; runs ``encode`` twice.

    Args:
        encode: A micro-batch of n items -> (n, D) image and text features, or a mapping
            of names to tensors (n, …). Under DDP it calls the wrapped module; for mixed
            precision it enters ``torch.autocast``.
        objective: ``objective(image_features, text_features)`` -> 0-d loss, or of the
            mapping ``objective(features)``, called once
            with the rows of all micro-batches; with
            ``gather=True`` it gathers over the ranks. The learnable parameters of a
            module get their gradient once, in the last backward pass: DDP has to wrap
            them together with the towers. Parameters in a plain function get none.
        micro_batches: This rank's batch in parts, at least one. Sizes, and over ranks
            numbers, may differ (with layers that communicate, as SyncBatchNorm, not the
            numbers).
        towers: The modules that ``encode`` runs: their buffers are put back after the
            first pass. Under DDP the wrapped module, whose gradients travel in the last
            backward pass alone: ``find_unused_parameters`` has to be off when the
            objective has parameters or an option learns, and ``static_graph`` always.
        ids: (N,) ids of all pairs, passed to the objective as ``ids=``.
        scale: Multiplies the loss for the backward pass, as ``GradScaler.scale`` does.
        **options: Passed to the objective. A tensor that requires grad, as
            ``logit_scale=model.logit_scale.exp()``, gets its gradient.

    Returns:
        The objective's 0-d value, detached and without ``scale``. It may be NaN, and
        then the gradients are, too.

    Raises:
        ValueError: No micro-batch; gradients are off; DDP with ``static_graph=True``.
            These, and what ``encode`` and the objective raise, come before any
            gradient was added.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cloob import ContrastiveObjective, cached_backward
        >>> towers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(5, 4)])
        >>> def encode(part):
        ...     rows = (tower(x) for tower, x in zip(towers, part))
        ...     return tuple(nn.functional.normalize(x, dim=1) for x in rows)
        >>> images, texts = torch.randn(32, 6), torch.randn(32, 5)
        >>> # the activations of 8 pairs at a time
        >>> parts = list(zip(images.split(8), texts.split(8)))
        >>> objective = ContrastiveObjective.cloob()
        >>> loss = cached_backward(encode, objective, parts, towers=towers)
        >>> towers[0].weight.grad.shape
        torch.Size([4, 6])
    """
    learned: list[Learned] = []
    if isinstance(objective, nn.Module):
        learned += [(p, p) for p in objective.parameters() if p.requires_grad]
    for name, value in options.items():
        if isinstance(value, Tensor) and value.requires_grad:
            leaf = value.detach().requires_grad_()
            learned.append((value, leaf))
            options[name] = leaf
    if ids is not None:
        options["ids"] = ids

    def loss_of(features: Rows) -> Tensor:
        if isinstance(features, Mapping):
            return objective(features, **options)
        return objective(*features, **options)

    return backward_in_parts(
        encode, loss_of, list(micro_batches), towers, learned, scale
    )


def backward_in_parts(
    encode: Callable[[T], Rows],
    loss_of: Callable[[Rows], Tensor],
    micro_batches: Sequence[T],
    towers: nn.Module,
    learned: Sequence[Learned],
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """As ``cached_backward``, of a loss of all rows in the form of ``encode``; called
    once.
    """
    _check_parts(micro_batches)
    # a rank with fewer parts would average while another has not finished its own
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if isinstance(towers, DistributedDataParallel):
        _prepare_ddp(towers)
        no_sync = towers.no_sync
    device = next(towers.parameters()).device
    embedded, states = _first_pass(encode, micro_batches, towers, device)

    rows = [torch.cat(side) for side in zip(*map(_rows, embedded), strict=True)]
    for side in rows:
        side.requires_grad_(side.is_floating_point())
    loss = loss_of(_as_encoded(rows, embedded[0]))
    # an autocast of the caller's would reach the products of the gradient
    with torch.autocast(device.type, enabled=False):
        scaled = loss if scale is None else scale(loss)
        gradients, outside_the_towers = _gradients(scaled, rows, learned)
    sizes = [len(_rows(features)[0]) for features in embedded]
    incoming = [_cut(gradient, sizes) for gradient in gradients]

    last = len(micro_batches) - 1
    for i, micro_batch in enumerate(micro_batches):
        with no_sync() if i < last else nullcontext():
            set_torch_rng_state(states[i], device)
            features = _rows(encode(micro_batch))
            arriving = [side[i] for side in incoming]
            pairs: list[Arriving] = list(zip(features, arriving, strict=True))
            if i == last:
                pairs += outside_the_towers
            _backward(pairs)
    return loss.detach()


def _check_parts(micro_batches: Sequence[object]) -> None:
    if not micro_batches:
        raise ValueError("no micro-batches: gradient caching needs at least one")
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are off (no_grad, inference_mode): gradient caching is for them"
        )


def _gradients(
    loss: Tensor, rows: Sequence[Tensor], learned: Sequence[Learned]
) -> tuple[list[Tensor | None], list[Arriving]]:
    """The gradient of every matrix of rows, None where it has none; and what arrives at
    the roots of what else the loss learns.
    """
    leaves = [side for side in rows if side.requires_grad]
    leaves += [leaf for _, leaf in learned]
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    of_rows = [next(found) if side.requires_grad else None for side in rows]
    roots = [root for root, _ in learned]
    return of_rows, list(zip(roots, found, strict=True))


def _as_encoded(rows: list[Tensor], features: Rows) -> Rows:
    """The rows of all parts in the form of one part's features: by name, or a tuple."""
    if isinstance(features, Mapping):
        return dict(zip(features, rows, strict=True))
    return tuple(rows)


def _rows(features: Rows) -> list[Tensor]:
    return list(features.values() if isinstance(features, Mapping) else features)


def _cut(gradient: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if gradient is None else torch.split(gradient, sizes)


def _backward(pairs: Sequence[Arriving]) -> None:
    """Backpropagates gradients from their roots, but for roots that lead nowhere, such
    as a frozen tower's features.
    """
    live = [
        (root, gradient)
        for root, gradient in pairs
        if root.requires_grad and gradient is not None
    ]
    if live:
        roots, gradients = zip(*live, strict=True)
        torch.autograd.backward(roots, gradients)


def _prepare_ddp(towers: DistributedDataParallel) -> None:
    """The buffers become rank 0's, from which both passes begin."""
    if towers.static_graph:
        raise ValueError(
            "DDP has static_graph=True, but the passes of gradient caching differ:"
            " leave it out"
        )
    if towers.broadcast_buffers:  # the first pass ends with those from before it
        for buffer in towers.buffers():
            torch.distributed.broadcast(
                buffer.detach(), src=0, group=towers.process_group
            )


def _first_pass(
    encode: Callable[[T], Rows],
    micro_batches: Sequence[T],
    towers: nn.Module,
    device: torch.device,
) -> tuple[list[Rows], list[dict[str, Tensor]]]:
    """Every micro-batch's features, without a graph, and the states of random
    generators before it, to be put back.
    """
    features, states, buffers = [], [], Buffers(towers.modules())
    try:
        with torch.no_grad():
            for micro_batch in micro_batches:
                states.append(torch_rng_state(device))
                features.append(encode(micro_batch))
    finally:
        buffers.restore()
    # Inside an autocast of the caller's, older PyTorch hands weights that were cast
    # without a graph to the second pass.
    torch.clear_autocast_cache()
    return features, states


class Buffers:
    """Buffers of modules as they are now (running statistics, power iterations),
    whether written or replaced later.

    Copies of one dtype lie behind one another, so that a device is given a few
    operations and not some for every buffer.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._owners = list(map(buffers_of, modules))
        self._before = [dict(owner) for owner in self._owners]
        places: dict[tuple[torch.dtype, torch.device], list[tuple[int, str]]] = {}
        for number, owner in enumerate(self._before):
            for name, buffer in owner.items():
                if buffer is not None and buffer.numel() > 0:
                    kind = (buffer.dtype, buffer.device)
                    places.setdefault(kind, []).append((number, name))
        self._copies = [
            (part, _flat(self._tensors(self._before, part))) for part in places.values()
        ]

    def _tensors(
        self, owners: Sequence[dict[str, Tensor | None]], part: list[tuple[int, str]]
    ) -> list[Tensor]:
        tensors = [owners[number][name] for number, name in part]
        return [tensor for tensor in tensors if tensor is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the modules back the buffers they had, with their values."""
        for owner, before in zip(self._owners, self._before, strict=True):
            owner.update(before)
        for part, copy in self._copies:
            tensors = self._tensors(self._before, part)
            torch._foreach_copy_(tensors, _split_as(copy, tensors))

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Puts values back where the 0-d bool ``good`` is false; waits for no
        device.
        """
        for part, copy in self._copies:
            tensors = self._tensors(self._owners, part)
            chosen = torch.where(good, _flat(tensors), copy)
            torch._foreach_copy_(tensors, _split_as(chosen, tensors))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _split_as(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a flat tensor in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    return [
        part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)
    ]
