"""An optimiser with the right groups, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cloob.errors import InputError, nearest, one_line, require
from cloob.functional.private import NORMS
from cloob.training.config.parts import OptimConfig
from cloob.training.finetune import layer_depths
from cloob.training.sharding import is_sharded

_WITHOUT_DECAY = ("bn", "ln", "bias", "logit_scale")  # parts of names in the authors' program
_COOLDOWN = 0.2  # the share of a run in which constant-cooldown falls


def parameter_groups(
    encoder: nn.Module,
    objective: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    *,
    embeddings_apart: bool = False,
    by_name: bool = False,
) -> list[dict[str, Any]]:
    """Groups by two rules: what decays, and how fast it learns; each with its ``lr_scale``, the largest first.

    CLIP's rule for the decay: matrices and kernels decay, embeddings among them; norms, biases, gains, τ⁻¹ and β do
    not. A parameter decays when it has two dimensions or more, is no bias and belongs to no norm layer.

    Layer-wise learning rates (as in ELECTRA and BEiT): a parameter at depth d of a tower of depths 0 … top learns
    with ``layer_decay ** (top − d)`` times the schedule's rate; the objective's temperatures with the full rate.
    ``embeddings_apart``: groups of embeddings have ``use_fallback``, by which timm's Muon leaves them to its AdamW.
    ``by_name``: all decays but what the authors' program takes out by name; the temperatures decay.
    """
    depths = layer_depths(name for name, _ in encoder.named_parameters())
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in encoder.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = parameter.ndim >= 2 and not name.endswith("bias") and not isinstance(owner, NORMS)
            full_name = f"{path}.{name}" if path else name
            if by_name:
                decays = not any(part in full_name for part in _WITHOUT_DECAY)
            depth = depths[full_name]
            apart = embeddings_apart and (isinstance(owner, nn.Embedding) or "embed" in name)
            groups.setdefault((layer_decay ** (depth.top - depth.depth), decays, apart), []).append(parameter)
    scales = [p for p in objective.parameters() if p.requires_grad]
    if scales:
        groups.setdefault((1.0, by_name, False), []).extend(scales)
    return [
        {
            "params": groups[scale, decays, apart],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": scale,
            **({"use_fallback": True} if apart else {}),
        }
        for scale, decays, apart in sorted(groups, reverse=True)
    ]


def make_optimizer(
    encoder: nn.Module, objective: nn.Module, config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser over ``parameter_groups``: torch's AdamW, fused where the device has it, or one of timm's."""
    name, decays = config.optimizer, (config.weight_decay, config.layer_decay)
    how = {"embeddings_apart": "muon" in name, "by_name": config.like_ml_jku}
    groups = parameter_groups(encoder, objective, *decays, **how)
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    if name == "adamw":
        betas, fused = (config.beta1, config.beta2), device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    timm, names = require("timm.optim", "train"), require("timm.optim", "train").list_optimizers()
    message = ""
    if name not in names:
        message = f"timm has no such; {nearest(name, names)}"
    elif timm.get_optimizer_info(name).second_order:
        message = "it needs second derivatives, which the objective does not give"
    elif is_sharded(encoder):
        message = "--fsdp shards the weights, which only adamw is tried with"
    if message:
        raise InputError(f"optimizer is {name!r}: {message}")
    try:
        optimizer: torch.optim.Optimizer = timm.create_optimizer_v2(groups, name, config.lr, config.weight_decay)
    except Exception as error:  # a package or CUDA is missing: mostly an assertion
        raise InputError(f"optimizer is {name!r}: {one_line(error)}") from error
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives each group its share of the schedule's rate: ``lr`` times the group's ``lr_scale``, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def warmup_steps(config: OptimConfig, total: int) -> int:
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: OptimConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 0 for the first of ``total``.

    During the warm-up it rises linearly to the peak: (step + 1)/warmup, or step/warmup with ``like_ml_jku``. After it,
    with the progress p = (step − warmup)/(total − warmup) in [0, 1):

    - ``constant``: the peak;
    - ``constant-cooldown``: the peak, and over the last fifth of the run linearly to 0;
    - ``cosine``: peak · (1 + cos πp)/2; 0 beyond the end;
    - ``cosine-restarts``: the same with p replaced by the fractional part of restarts · p, so that the rate
      jumps back to the peak at the start of each of ``restarts`` cycles (the authors' schedule, with ten).
    """
    warmup = warmup_steps(config, total)

    def schedule(step: int) -> float:
        if step < warmup:
            return config.lr * (step + (not config.like_ml_jku)) / warmup
        if config.schedule == "constant":
            return config.lr
        if step >= total:
            return 0.0
        if config.schedule == "constant-cooldown":
            return config.lr * min(1.0, (total - step) / (_COOLDOWN * total))
        progress = (step - warmup) / (total - warmup)
        if config.schedule == "cosine-restarts":
            progress = config.restarts * progress % 1.0
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    return schedule
