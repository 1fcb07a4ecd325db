"""Gradient checkpointing: a block's activations are computed again in the backward pass instead of being kept.

open_clip's transformers and timm's towers have a switch for it; open_clip's ModifiedResNet (RN50 and its kin) has one
that does nothing, so its residual blocks get it here. Batch normalisation moves its running statistics in each forward
pass in training mode; in a block that is computed twice they would move twice, so the second pass leaves them alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.importing import import_open_clip


def enable_recomputation(encoder: DualEncoder) -> None:
    """Switches gradient checkpointing on in both towers, in place; parameters, their names and values stay.

    Raises:
        InputError: A tower has no blocks that can be computed again.
    """
    resnet = import_open_clip(".modified_resnet").ModifiedResNet
    visual = encoder.model.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and not _timm_can(trunk):
        # open_clip would log a warning and train without.
        raise InputError(f"grad_checkpointing is True, but the image tower of {encoder.name} has no such switch")
    encoder.model.set_grad_checkpointing(True)
    if isinstance(visual, resnet):
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            for block in stage:
                block.forward = functools.partial(_recomputed, block.forward)
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_hold_statistics)
            # Also when the pass is broken off, which is how torch ends the recomputation of a block at its last layer.
            module.register_forward_hook(_release_statistics, always_call=True)


def _timm_can(trunk: Any) -> bool:
    try:
        trunk.set_grad_checkpointing(True)
    except Exception:  # timm asserts, or has no such method
        return False
    return True


def _recomputed(forward: Any, *inputs: torch.Tensor) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def _in_backward() -> bool:
    # What torch.utils.checkpoint asks, too: -1 outside a backward pass.
    return torch._C._current_graph_task_id() != -1


def _hold_statistics(module: nn.Module, _: object) -> None:
    if module.training and _in_backward():
        module._held_momentum = module.momentum
        module.momentum = 0.0  # type: ignore[assignment]


def _release_statistics(module: nn.Module, _: object, output: object) -> None:
    if hasattr(module, "_held_momentum"):
        module.momentum = module._held_momentum
        del module._held_momentum
        module.num_batches_tracked.sub_(1)  # type: ignore[operator]
