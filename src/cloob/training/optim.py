"""AdamW with the right groups, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cloob.functional.private import NORMS
from cloob.training.config.parts import OptimConfig
from cloob.training.finetune import layer_depths


def parameter_groups(
    encoder: nn.Module, objective: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups by two rules: what decays, and how fast it learns; each with its ``lr_scale``, the largest first.

    CLIP's rule for the decay: matrices and kernels decay, embeddings among them; norms, biases, gains, τ⁻¹ and β do
    not. A parameter decays when it has two dimensions or more, is no bias and belongs to no norm layer.

    Layer-wise learning rates (as in ELECTRA and BEiT): a parameter at depth d of a tower of depths 0 … top learns
    with ``layer_decay ** (top − d)`` times the schedule's rate; the objective's temperatures with the whole of it.
    """
    depths = layer_depths(name for name, _ in encoder.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in encoder.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim >= 2 and not name.endswith("bias") and not isinstance(owner, NORMS)
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
    """AdamW over ``parameter_groups``, fused where the device has it."""
    groups = parameter_groups(encoder, objective, config.weight_decay, config.layer_decay)
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    betas, fused = (config.beta1, config.beta2), device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group its share of the schedule's rate: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def warmup_steps(config: OptimConfig, total: int) -> int:
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: OptimConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 0 for the first of ``total``.

    During the warm-up it rises linearly to the peak: (step + 1)/warmup. After it, with the progress
    p = (step − warmup)/(total − warmup) in [0, 1):

    - ``constant``: the peak;
    - ``cosine``: peak · (1 + cos πp)/2; 0 beyond the end;
    - ``cosine-restarts``: the same with p replaced by the fractional part of restarts · p, so that the rate
      jumps back to the peak at the start of each of ``restarts`` cycles (the authors' schedule, with ten).
    """
    warmup = warmup_steps(config, total)

    def schedule(step: int) -> float:
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
