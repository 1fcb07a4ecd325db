"""The optimiser with its groups, the schedule of its rate, and the average of the
weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cloob.errors import InputError, nearest, one_line, require
from cloob.functional.private import NORMS
from cloob.models.encoder import DualEncoder
from cloob.training.config import TrainConfig
from cloob.training.sharding import is_sharded

Tower = Literal["image", "text"]
Group = dict[str, Any]  # as torch's optimisers take them
MakeOptimizer = Callable[[list[Group]], torch.optim.Optimizer]
Takes = Callable[[str, nn.Parameter], bool]
GivenOptimizer = MakeOptimizer | Sequence[tuple[Takes, MakeOptimizer]]


def tower_of(name: str) -> Tower:
    """The tower that a parameter of this name belongs to."""
    return "image" if name.removeprefix("model.").startswith("visual.") else "text"


def freeze(encoder: DualEncoder, tower: str) -> None:
    """Takes a tower out of the training: no gradients, no dropout, and batch norms use
    and keep their statistics.
    """
    for name, parameter in encoder.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(False)
    for name, child in encoder.model.named_children():
        if tower_of(f"{name}.") == tower:
            child.eval()


def parameter_groups(
    encoder: nn.Module,
    objective: nn.Module,
    weight_decay: float,
    *,
    embeddings_apart: bool = False,
) -> list[Group]:
    """Groups by weight decay, those that decay first.

    CLIP's rule: a parameter decays when it has two dimensions or more, is no bias and
    belongs to no norm layer. ``embeddings_apart``: timm's Muon leaves embeddings to
    AdamW.
    """
    weights: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = encoder.get_submodule(name.rpartition(".")[0])
        is_plain = parameter.ndim < 2 or isinstance(owner, NORMS)
        if is_plain or name.endswith("bias"):
            without_decay.append(parameter)
        elif embeddings_apart and _is_embedding(name, owner):
            embeddings.append(parameter)
        else:
            weights.append(parameter)
    without_decay += [p for p in objective.parameters() if p.requires_grad]
    groups: list[Group] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": weight_decay, "use_fallback": True},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_embedding(name: str, owner: nn.Module) -> bool:
    return isinstance(owner, nn.Embedding) or "embed" in name.rpartition(".")[2]


def make_optimizer(
    encoder: nn.Module,
    objective: nn.Module,
    config: TrainConfig,
    device: torch.device,
    custom: GivenOptimizer | None = None,
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it, one of timm's, or ``custom``, whose rates
    are peaks.
    """
    is_muon = custom is None and "muon" in config.optimizer
    groups = parameter_groups(
        encoder, objective, config.weight_decay, embeddings_apart=is_muon
    )
    if not groups:
        raise InputError(
            "nothing learns: no parameter of the towers or the loss requires a gradient"
        )
    if custom is not None:
        named = [*encoder.named_parameters(), *objective.named_parameters()]
        names = {p: name.removeprefix("model.") for name, p in named}
        return _given_optimizer(custom, groups, names, config.lr)
    for group in groups:
        group["lr"] = config.lr
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=device.type in ("cpu", "cuda"),
        )
    if is_sharded(encoder):
        raise InputError(
            f"optimizer is {config.optimizer!r}: --fsdp shards the weights, which only"
            " adamw is tried with"
        )
    return _timm_optimizer(groups, config)


def _timm_optimizer(groups: list[Group], config: TrainConfig) -> torch.optim.Optimizer:
    """One of timm's optimisers by its name."""
    timm = require("timm.optim", "train")
    name, names = config.optimizer, timm.list_optimizers()
    if name not in names:
        raise InputError(
            f"optimizer is {name!r}: timm has no such; {nearest(name, names)}"
        )
    try:
        optimizer: torch.optim.Optimizer = timm.create_optimizer_v2(
            groups, name, config.lr, config.weight_decay
        )
    except Exception as error:  # a package or CUDA is missing: mostly an assertion
        raise InputError(f"optimizer is {name!r}: {one_line(error)}") from error
    return optimizer


def _given_optimizer(
    custom: GivenOptimizer,
    groups: list[Group],
    names: Mapping[nn.Parameter, str],
    peak: float,
) -> torch.optim.Optimizer:
    """The caller's optimiser; its rates become shares of ``peak``.

    Groups that shall not decay say so; others take the optimiser's own decay.
    """
    for group in groups:
        if group["weight_decay"]:
            del group["weight_decay"]
    try:
        if callable(custom):
            optimizer = custom(groups)
        else:
            optimizer = _by_predicate(custom, groups, names)
    except (TypeError, ValueError) as error:  # as Muon of a bias
        raise InputError(f"optimizer: {one_line(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer: returned {type(optimizer).__name__}; a torch.optim.Optimizer"
            " is expected"
        )
    _check_complete(optimizer, groups)
    for group in optimizer.param_groups:
        group["lr_scale"] = group.get("lr_scale", 1.0) * float(group["lr"]) / peak
    return optimizer


def _check_complete(optimizer: torch.optim.Optimizer, groups: list[Group]) -> None:
    """InputError for an optimiser that leaves parameters out."""
    expected = {p for group in groups for p in group["params"]}
    missing = expected - {p for g in optimizer.param_groups for p in g["params"]}
    if missing:
        raise InputError(
            f"optimizer: does not hold {len(missing)} of the {len(expected)} parameters"
            " that learn; give it all groups, or freeze the others"
            " (requires_grad_(False))"
        )


def _by_predicate(
    parts: Sequence[tuple[Takes, MakeOptimizer]],
    groups: list[Group],
    names: Mapping[nn.Parameter, str],
) -> Optimizers:
    """An optimiser for the parameters that each predicate takes of those left."""
    optimizers = []
    left = set(names)
    for takes, make in parts:
        taken = {p for p in left if takes(names[p], p)}
        left -= taken
        chosen = [
            {**group, "params": [p for p in group["params"] if p in taken]}
            for group in groups
        ]
        chosen = [group for group in chosen if group["params"]]
        if chosen:
            optimizers.append(make(chosen))
    return Optimizers(optimizers)


class Optimizers(torch.optim.Optimizer):
    """Several optimisers as one, whose groups and state are theirs."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


class Average:
    """The moving average of an encoder's weights and statistics, each of them once,
    also where two towers share a module; ``begun``: it has a value.
    """

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self._decay = decay
        self.begun = False
        # Counts are copied, and so is a mask of −∞, whose differences are NaN.
        self._moves = [
            tensor.is_floating_point() and bool(tensor.isfinite().all())
            for tensor in _tensors(encoder)
        ]

    @torch.no_grad()
    def update(self, encoder: nn.Module, finite: Tensor) -> None:
        """Moves towards the encoder's weights if the 0-d ``finite`` is true."""
        moving: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        before, after = _tensors(self.encoder), _tensors(encoder)
        for old, now, moves in zip(before, after, self._moves, strict=True):
            (moving if moves and self.begun else copied).append((old, now))
        self.begun = True
        if copied:
            torch._foreach_copy_([old for old, _ in copied], [now for _, now in copied])
        if moving:
            averages = [old for old, _ in moving]
            steps = torch._foreach_sub([now for _, now in moving], averages)
            torch._foreach_mul_(steps, finite * (1 - self._decay))
            torch._foreach_add_(averages, steps)


def _tensors(encoder: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each of them once."""
    return [*encoder.parameters(), *encoder.buffers()]


def warmup_steps(config: TrainConfig, total: int) -> int:
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 0 for the first of ``total``.

    During the warm-up it rises linearly to the peak: (step + 1)/warmup. Then, with the
    progress p = (step − warmup)/(total − warmup) in [0, 1):

    - ``constant``: the peak;
    - ``cosine``: peak · (1 + cos πp)/2; 0 beyond the end;
    - ``cosine-restarts``: the same of the fractional part of restarts · p (the authors'
      schedule, with ten).
    """
    warmup = warmup_steps(config, total)

    def schedule(step: int) -> float:
        """The learning rate of a step."""
        if step < warmup:
            return config.lr * (step + 1) / warmup
        if config.schedule == "constant":
            return config.lr
        if step >= total:
            return 0.0
        progress = (step - warmup) / (total - warmup)
        if config.schedule == "cosine-restarts":
            progress = config.restarts * progress % 1.0
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    return schedule
