"""What the log says of a step."""

from __future__ import annotations

from typing import Any

import torch

from cloob.distributed import rank, world_size
from cloob.functional.geometry import effective_eigenvalues, saturation
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig
from cloob.training.parts import Parts
from cloob.training.ranks import gather_objects
from cloob.training.step import StepResult
from cloob.training.watch.log import finite

# Enough for a number that is watched; the time that it takes grows with the square.
_MEASURED_PAIRS = 2048


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether the batch of a step is measured."""
    return step % config.log.log_every == 0


def step_metrics(parts: Parts, result: StepResult | None, step: int, lr: float, *, hopfield: bool) -> dict[str, Any]:
    """The line of a step but for its times; all ranks call this.

    Args:
        parts: The run's.
        result: The step's, None where it had too few samples.
        step: Its number.
        lr: Its learning rate.
        hopfield: Whether its objective retrieved.
    """
    progress = parts.progress
    line: dict[str, Any] = {
        "step": step,
        "epoch": progress.epoch + 1,
        "samples_seen": progress.samples_seen,
        "loss": finite(result.loss) if result else None,
        "lr": lr,
        "grad_norm": finite(result.grad_norm) if result else None,
    }
    due = result is not None and result.finite and is_due(parts.config, step)
    for name, scale in parts.objective.scale_values().items():
        if isinstance(scale, float):
            line[name] = scale
        else:
            line[name] = result.scales[name] if result else None
    if not hopfield:
        line["beta"] = None
    if parts.config.optim.layer_decay < 1:
        line["lr_lowest"] = lr * min(group["lr_scale"] for group in parts.stepper.optimizer.param_groups)
    if result is not None and parts.config.run.precision == "fp16":
        line["loss_scale"] = result.loss_scale
    if result is not None and due:
        line |= _measure(result, parts.objective)
    return line


def _measure(result: StepResult, objective: ContrastiveObjective) -> dict[str, float]:
    """On rank 0 saturation and effective eigenvalues of the batch, or of pairs evenly spread over it and its ranks.

    Saturation is that of a softmax, which the sigmoid loss has none of.
    """
    most = _MEASURED_PAIRS // world_size()
    both = [rows[:: -(-len(rows) // most)].cpu() for rows in (result.image_features, result.text_features)]
    everywhere = gather_objects(both)
    if rank() != 0:
        return {}
    images, texts = (torch.cat([features[side] for features in everywhere]) for side in (0, 1))
    softmax = objective.contrast != "sigmoid"
    return {
        **({"saturation": float(saturation(images, texts, float(objective.inv_tau.detach())))} if softmax else {}),
        "effective_eigenvalues_image": int(effective_eigenvalues(images)),
        "effective_eigenvalues_text": int(effective_eigenvalues(texts)),
    }
