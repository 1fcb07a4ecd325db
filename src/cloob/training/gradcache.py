"""Gradient caching: the gradient of a batch that does not fit in memory, from
micro-batches that do (Gao et al. 2021).

Embed every micro-batch without a graph, differentiate the objective once with respect
to all embeddings, then embed every micro-batch again and backpropagate its embeddings'
gradients: one micro-batch's activations at a time, for a second forward pass, with the
same random state and buffers. Batch normalisation sees micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cloob.functional.private import buffers_of
from cloob.training.generators import set_torch_rng_state, torch_rng_state

T = TypeVar("T")
Rows = tuple[Tensor, ...] | Mapping[str, Tensor]


def cached_backward(
    encode: Callable[[T], Rows],
    objective: Callable[..., Tensor],
    micro_batches: Iterable[T],
    *,
    towers: nn.Module,
    ids: Tensor | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
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
        TypeError: ``encode`` returns neither two tensors (n, D) nor a mapping of (n,
            …), or the objective no 0-d tensor.
        ValueError: No micro-batch; gradients are off; DDP with ``static_graph=True``;
            whatever the objective raises. All before any gradient was added.

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
    # both passes need the same: a shuffling loader would give others
    micro_batches = list(micro_batches)
    if not micro_batches:
        raise ValueError("no micro-batches: gradient caching needs at least one")
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are off (no_grad, inference_mode): gradient caching is for them"
        )
    no_sync: Any = nullcontext
    if isinstance(towers, DistributedDataParallel):
        # a rank with fewer parts would average while another has not finished its own
        no_sync = towers.no_sync
        _prepare_ddp(towers)
    if ids is not None:
        options["ids"] = ids
    device = next(towers.parameters()).device
    embedded, states = _first_pass(encode, micro_batches, towers, device)
    loss, incoming, learned = _differentiate(objective, embedded, options, scale)
    last = len(micro_batches) - 1
    for i, micro_batch in enumerate(micro_batches):
        with nullcontext() if i == last else no_sync():
            set_torch_rng_state(states[i], device)
            features = encode(micro_batch)
            pairs = list(zip(_rows(features), incoming[i], strict=True))
            if i == last:
                pairs += learned
            _backward(pairs)
    return loss.detach()


def _differentiate(
    objective: Callable[..., Tensor],
    embedded: Sequence[Rows],
    options: dict[str, Any],
    scale: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, list[tuple[Tensor | None, ...]], list[tuple[Tensor, Tensor | None]]]:
    """The loss of all rows; its gradients at the rows of every micro-batch; and what
    else learns, with its gradient.
    """
    rows = [torch.cat(side) for side in zip(*map(_rows, embedded), strict=True)]
    for side in rows:
        side.requires_grad_(side.is_floating_point())
    roots, leaves = _learned(objective, options)
    if isinstance(embedded[0], Mapping):
        named = dict(zip(embedded[0], rows, strict=True))
        loss = objective(named, **(options | leaves))
    else:
        loss = objective(*rows, **(options | leaves))
    _check_loss(loss)
    differentiable = [side for side in rows if side.requires_grad]
    differentiable += (roots | leaves).values()
    # an autocast of the caller's would reach the products of the gradient
    with torch.autocast(rows[0].device.type, enabled=False):
        scaled = loss if scale is None else scale(loss)
        found = iter(torch.autograd.grad(scaled, differentiable, allow_unused=True))
    sizes = [len(_rows(features)[0]) for features in embedded]
    sides = [_cut(next(found) if side.requires_grad else None, sizes) for side in rows]
    learned: list[tuple[Tensor, Tensor | None]]
    learned = list(zip(roots.values(), found, strict=True))
    return loss, list(zip(*sides, strict=True)), learned


def _learned(
    objective: Callable[..., Tensor], options: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What learns beside the towers, by name: the objective's parameters and tensors
    among its options; and leaves in the place of the latter.
    """
    roots: dict[str, Tensor] = {}
    if isinstance(objective, nn.Module):
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                roots[f"objective.{name}"] = parameter
    leaves: dict[str, Tensor] = {}
    for name, value in options.items():
        if isinstance(value, Tensor) and value.requires_grad:
            roots[name] = value
            leaves[name] = value.detach().requires_grad_()
    return roots, leaves


def _cut(gradient: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if gradient is None else torch.split(gradient, sizes)


def _rows(features: Rows) -> list[Tensor]:
    return list(features.values() if isinstance(features, Mapping) else features)


def _check_loss(loss: object) -> None:
    if isinstance(loss, Tensor) and not loss.ndim:
        return
    found = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        found = f"shape {tuple(loss.shape)}"
    raise TypeError(f"the objective returned {found}; a 0-d tensor is expected")


def _backward(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Backpropagates gradients from their roots, but for roots that lead nowhere, such
    as a frozen tower's features.
    """
    live = [
        (root, gradient)
        for root, gradient in pairs
        if root.requires_grad and gradient is not None
    ]
    if live:
        torch.autograd.backward(
            [root for root, _ in live], [gradient for _, gradient in live]
        )


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


class Buffers:
    """Buffers of modules as they are now (running statistics, power iterations),
    whether written or replaced later.

    Values of one dtype lie behind one another, so that a device is given a few
    operations and not some for every buffer.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held = [
            (buffers_of(owner), name, buffer)
            for owner in modules
            for name, buffer in buffers_of(owner).items()
        ]
        self._kinds: dict[Any, list[int]] = {}  # places in the list above
        for place, (_, _, buffer) in enumerate(self._held):
            if buffer is not None and buffer.numel() > 0:
                kind = (buffer.dtype, buffer.device)
                self._kinds.setdefault(kind, []).append(place)
        self._values: dict[int, Tensor] = {}
        for places in self._kinds.values():
            buffers = [self._held[place][2] for place in places]
            parts = _split_as(_flat(buffers), buffers)
            self._values.update(zip(places, parts, strict=True))

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the modules back the buffers they had, with their values."""
        for buffers, name, buffer in self._held:
            if buffers.get(name) is not buffer:
                buffers[name] = buffer
        for places in self._kinds.values():
            held: Any = [self._held[place][2] for place in places]
            torch._foreach_copy_(held, [self._values[place] for place in places])

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Puts values back where the 0-d bool ``good`` is false; waits for no
        device.
        """
        for places in self._kinds.values():
            found = [self._held[place][0].get(self._held[place][1]) for place in places]
            present = [
                (now, self._values[place])
                for now, place in zip(found, places, strict=True)
                if now is not None
            ]
            if present:
                now, before = (list(side) for side in zip(*present, strict=True))
                chosen = torch.where(good, _flat(now), _flat(before))
                torch._foreach_copy_(now, _split_as(chosen, now))


def _flat(tensors: Sequence[Any]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _split_as(flat: Tensor, tensors: Sequence[Any]) -> list[Tensor]:
    """Parts of a flat tensor in the shapes of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    return [
        part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)
    ]


def _first_pass(
    encode: Callable[[T], Rows],
    micro_batches: Sequence[T],
    towers: nn.Module,
    device: torch.device,
) -> tuple[list[Rows], list[Any]]:
    """Every micro-batch's features, without a graph, and the states of random
    generators before it, to be put back.
    """
    features, states, buffers = [], [], Buffers(towers.modules())
    try:
        with torch.no_grad():
            for micro_batch in micro_batches:
                states.append(torch_rng_state(device))
                embedded: Any = encode(micro_batch)
                _check_features(embedded)
                features.append(embedded)
    finally:
        buffers.restore()
    # Inside an autocast of the caller's, older PyTorch hands weights that were cast
    # without a graph to the second pass.
    torch.clear_autocast_cache()
    return features, states


def _check_features(features: Any) -> None:
    """TypeError unless there are two (n, D) tensors, or (n, …) by name."""
    named = isinstance(features, Mapping)
    several = named or isinstance(features, tuple | list)
    shapes = [_shape(side) for side in (_rows(features) if several else [features])]
    fits = named or [len(shape) for shape in shapes] == [2, 2]
    if not fits or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise TypeError(
            f"encode returned {shapes}; two tensors (n, D) of the same n are expected,"
            " or a mapping of tensors (n, …)"
        )


def _shape(side: object) -> tuple[Any, ...]:
    return tuple(side.shape) if isinstance(side, Tensor) else (type(side).__name__,)
