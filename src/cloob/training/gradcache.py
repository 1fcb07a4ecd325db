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

from cloob.functional.private import buffers_of, tree_flatten, tree_unflatten
from cloob.training.generators import set_torch_rng_state, torch_rng_state

T = TypeVar("T")
F = TypeVar("F")  # features: a tuple of rows, or rows by name
Learned = tuple[Tensor, Tensor]
"""A tensor that learns beside the towers, and the leaf in its place whose gradient is
its own; a parameter is its own leaf.
"""
Arriving = tuple[Tensor, Tensor | None]
"""A root, and the gradient that arrives at it."""
Owner = dict[str, Tensor | None]
"""The buffers of a module by name, as it holds them."""


def cached_backward(
    encode: Callable[[T], tuple[Tensor, ...] | Mapping[str, Tensor]],
    objective: Callable[..., Tensor],
    micro_batches: Iterable[T],
    *,
    towers: nn.Module,
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
        scale: Multiplies the loss for the backward pass, as ``GradScaler.scale`` does.
        **options: Passed to the objective, as the (N,) ``ids=`` of all pairs. A tensor
            that requires grad, as ``logit_scale=model.logit_scale.exp()``, gets its
            gradient.

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

    def loss_of(features: tuple[Tensor, ...] | Mapping[str, Tensor]) -> Tensor:
        if isinstance(features, Mapping):
            return objective(features, **options)
        return objective(*features, **options)

    loss, _ = backward_in_parts(
        encode, loss_of, list(micro_batches), towers, learned, scale
    )
    return loss


def backward_in_parts(
    encode: Callable[[T], F],
    loss_of: Callable[[F], Tensor],
    micro_batches: Sequence[T],
    towers: nn.Module,
    learned: Sequence[Learned],
    scale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, F]:
    """As ``cached_backward``, of a loss of the features of all rows, called once; the
    loss and these features.
    """
    _check_parts(micro_batches)
    if isinstance(towers, DistributedDataParallel):
        _share_buffers_of_ddp(towers)
    device = next(towers.parameters()).device
    parts, states = _first_pass(encode, micro_batches, towers, device)
    features = joined(parts)
    rows, _ = tree_flatten(features)
    for side in rows:
        side.requires_grad_(side.is_floating_point())
    loss = loss_of(features)
    # an autocast of the caller's would reach the products of the gradient
    with torch.autocast(device.type, enabled=False):
        scaled = loss if scale is None else scale(loss)
        of_rows, beside_the_towers = _gradients(scaled, rows, learned)
    sizes = [len(tree_flatten(part)[0][0]) for part in parts]
    of_parts = [None if g is None else torch.split(g, sizes) for g in of_rows]
    _second_pass(
        encode, micro_batches, towers, device, states, of_parts, beside_the_towers
    )
    return loss.detach(), features


def _check_parts(micro_batches: Sequence[object]) -> None:
    if not micro_batches:
        raise ValueError("no micro-batches: gradient caching needs at least one")
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are off (no_grad, inference_mode): gradient caching is for them"
        )


def joined(parts: Sequence[F]) -> F:
    """The features of micro-batches as those of one batch."""
    leaves, (form, *_) = zip(*map(tree_flatten, parts), strict=True)
    rows = [torch.cat(side) for side in zip(*leaves, strict=True)]
    features: F = tree_unflatten(rows, form)
    return features


def _gradients(
    loss: Tensor, rows: Sequence[Tensor], learned: Sequence[Learned]
) -> tuple[list[Tensor | None], list[Arriving]]:
    """The gradient of every matrix of rows, None where it has none; and what arrives at
    the roots of what else the loss learns.
    """
    sides = [side for side in rows if side.requires_grad]
    leaves = [leaf for _, leaf in learned]
    found = iter(torch.autograd.grad(loss, [*sides, *leaves], allow_unused=True))
    of_rows = [next(found) if side.requires_grad else None for side in rows]
    roots = [root for root, _ in learned]
    return of_rows, list(zip(roots, found, strict=True))


def _second_pass(
    encode: Callable[[T], F],
    micro_batches: Sequence[T],
    towers: nn.Module,
    device: torch.device,
    states: Sequence[dict[str, Tensor]],
    of_parts: Sequence[Sequence[Tensor] | None],
    beside_the_towers: Sequence[Arriving],
) -> None:
    """Embeds every micro-batch again, as it was before, and backpropagates what arrives
    at its rows; with the last one what arrives beside the towers.
    """
    # a rank with fewer parts would average while another has not finished its own
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    if isinstance(towers, DistributedDataParallel):
        no_sync = towers.no_sync
    last = len(micro_batches) - 1
    for number, micro_batch in enumerate(micro_batches):
        with no_sync() if number < last else nullcontext():
            set_torch_rng_state(states[number], device)
            rows, _ = tree_flatten(encode(micro_batch))
            arriving: list[Arriving] = [
                (side, parts[number])
                for side, parts in zip(rows, of_parts, strict=True)
                if parts is not None
            ]
            if number == last:
                arriving += beside_the_towers
            _backward(arriving)


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


def _share_buffers_of_ddp(towers: DistributedDataParallel) -> None:
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
    encode: Callable[[T], F],
    micro_batches: Sequence[T],
    towers: nn.Module,
    device: torch.device,
) -> tuple[list[F], list[dict[str, Tensor]]]:
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
        self._before: list[tuple[Owner, str, Tensor | None]] = []
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Owner, str]]] = {}
        for owner in map(buffers_of, modules):
            for name, buffer in owner.items():
                self._before.append((owner, name, buffer))
                if buffer is not None and buffer.numel() > 0:
                    kind = (buffer.dtype, buffer.device)
                    alike.setdefault(kind, []).append((owner, name))
        # buffers of one kind, by their owners and names, and their values
        self._copies = [(places, _flat(_at(places))) for places in alike.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the modules back the buffers they had, with their values."""
        for owner, name, buffer in self._before:
            owner[name] = buffer
        for places, copy in self._copies:
            _write(copy, _at(places))

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Puts values back where the 0-d bool ``good`` is false; waits for no
        device.
        """
        for places, copy in self._copies:
            tensors = _at(places)
            _write(torch.where(good, _flat(tensors), copy), tensors)


def _at(places: Sequence[tuple[Owner, str]]) -> list[Tensor]:
    """The buffers that are there now."""
    buffers = [owner[name] for owner, name in places]
    return [buffer for buffer in buffers if buffer is not None]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _write(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copies the parts of a flat tensor into the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    shaped = [part.view(to.shape) for part, to in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)
