"""AdamW with the right groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from cloob.train.config import OptimConfig

# Norm layers by type. Their weights have one dimension nearly everywhere; the types settle the rest.
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def parameter_groups(encoder: nn.Module, objective: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups, by CLIP's rule: matrices and kernels decay; norms, biases, gains, τ⁻¹ and β do not.

    A parameter decays when it has two dimensions or more, is no bias and belongs to no norm layer. Embeddings
    of tokens and positions are matrices and decay, as in CLIP. No parameter of the objective decays.

    Args:
        encoder: The two towers.
        objective: The objective, with its temperatures.
        weight_decay: Decay of the first group.

    Returns:
        Groups for ``torch.optim.AdamW``, without frozen parameters; an empty group is left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()
    for owner in encoder.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim >= 2 and not name.endswith("bias") and not isinstance(owner, _NORMS)
            (decayed if decays else plain).append(parameter)
    plain += [p for p in objective.parameters() if p.requires_grad]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    encoder: nn.Module, objective: nn.Module, config: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``, fused where the device has it."""
    return torch.optim.AdamW(
        parameter_groups(encoder, objective, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


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
