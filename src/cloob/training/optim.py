"""AdamW with the right groups, and what a schedule says of a step: its learning rate, and whether it retrieves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cloob.errors import InputError
from cloob.training.config.model import LossConfig
from cloob.training.config.run import OptimConfig
from cloob.training.towers.finetune import layer_depths

# Norm layers by type. Their weights have one dimension nearly everywhere; the types settle the rest.
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def parameter_groups(
    encoder: nn.Module, objective: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups by two rules: what decays, and how fast it learns.

    CLIP's rule for the decay: matrices and kernels decay; norms, biases, gains, τ⁻¹ and β do not. A parameter decays
    when it has two dimensions or more, is no bias and belongs to no norm layer. Embeddings of tokens and positions are
    matrices and decay, as in CLIP. No parameter of the objective decays.

    Layer-wise learning rates (as in ELECTRA and BEiT): a parameter at depth d of a tower of depths 0 … top learns
    with ``layer_decay ** (top − d)`` times the schedule's rate; the objective's temperatures with the whole of it.

    Args:
        encoder: The two towers.
        objective: The objective, with its temperatures.
        weight_decay: Decay of the groups that decay.
        layer_decay: Factor from a layer to the one below it, in (0, 1]; 1 gives two groups at most.

    Returns:
        Groups for ``torch.optim.AdamW``, each with its ``lr_scale``, the largest first; without frozen parameters and
        without empty groups.
    """
    depths = layer_depths(name for name, _ in encoder.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in encoder.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim >= 2 and not name.endswith("bias") and not isinstance(owner, _NORMS)
            depth = depths[f"{path}.{name}" if path else name]
            groups.setdefault((layer_decay ** (depth.top - depth.depth), decays), []).append(parameter)
    scales = [p for p in objective.parameters() if p.requires_grad]
    if scales:
        groups.setdefault((1.0, False), []).extend(scales)
    return [
        {"params": groups[scale, decays], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        for scale, decays in sorted(groups, reverse=True)
    ]


def make_optimizer(
    encoder: nn.Module, objective: nn.Module, config: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``, fused where the device has it; InputError where nothing is left to train."""
    groups = parameter_groups(encoder, objective, config.weight_decay, config.layer_decay)
    if not groups:
        raise InputError("nothing to train: every parameter is frozen")
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group its share of the schedule's rate: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: str, restarts: int = 1) -> float:
    """Learning rate of a step.

    During the warm-up it rises linearly to the peak: (step + 1)/warmup. After it, with the progress
    p = (step − warmup)/(total − warmup) in [0, 1):

    - ``constant``: the peak;
    - ``cosine``: peak · (1 + cos πp)/2;
    - ``cosine-restarts``: the same with p replaced by the fractional part of restarts · p, so that the rate
      jumps back to the peak at the start of each of ``restarts`` cycles (the authors' schedule, with ten).

    Args:
        step: 0 for the first step.
        peak: Highest rate.
        total: Steps of the whole run, warm-up included.
        warmup: Steps of the warm-up.
        schedule: ``"constant"``, ``"cosine"`` or ``"cosine-restarts"``.
        restarts: Number of cosine cycles.

    Returns:
        The rate, a float; 0 beyond the end of a cosine.

    Raises:
        ValueError: The schedule is unknown.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule not in ("cosine", "cosine-restarts"):
        raise ValueError(f"unknown schedule {schedule!r}")
    if step >= total:
        return 0.0
    progress = (step - warmup) / (total - warmup)
    if schedule == "cosine-restarts":
        progress = restarts * progress % 1.0
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(config: OptimConfig, total: int) -> int:
    """Steps of the warm-up: as given, or a tenth of the run, at most 2,000."""
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: OptimConfig, total: int) -> Callable[[int], float]:
    """``learning_rate`` as a function of the step alone."""
    warmup = warmup_steps(config, total)

    def schedule(step: int) -> float:
        return learning_rate(
            step,
            peak=config.lr,
            total=total,
            warmup=warmup,
            schedule=config.schedule,
            restarts=config.restarts,
        )

    return schedule


def make_retrieval_schedule(config: LossConfig, total: int, *, hopfield: bool) -> Callable[[int], bool]:
    """Whether the objective retrieves at a step, a function of the step alone.

    Args:
        config: ``retrieval_from`` is the share of the run after which retrieval joins.
        total: Steps of the whole run.
        hopfield: Whether the objective retrieves at all.
    """
    return lambda step: hopfield and step >= config.retrieval_from * total
