"""Towers readied for training, in place: memory layout, batch norm over ranks, recomputation, compilation, shards.

Names and shapes of parameters stay, so checkpoints are the same for all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cloob.distributed import world_size
from cloob.errors import InputError, require
from cloob.models.encoder import DualEncoder
from cloob.models.importing import import_open_clip
from cloob.training import sharding
from cloob.training.config.parts import RunConfig


def prepare_towers(encoder: DualEncoder, run: RunConfig, device: torch.device) -> None:
    """Does what the configuration asks for; the optimiser has to be made afterwards."""
    encoder.set_channels_last(run.channels_last)
    if run.sync_bn and world_size() > 1:
        if device.type != "cuda":
            raise InputError(f"sync_bn is True, but torch synchronises batch norm on CUDA only, not on {device.type}")
        require("timm.layers", "train").convert_sync_batchnorm(encoder)
    if run.grad_checkpointing:
        _enable_recomputation(encoder)
    if run.compile:
        _compile(encoder, run, device)
    if run.fsdp:
        sharding.shard(encoder, device)


def _compile(encoder: DualEncoder, run: RunConfig, device: torch.device) -> None:
    """Compiles the encoder's forward pass in place, from pixels and tokens to unit rows; the objective stays as it is.

    ``encode_image`` and ``encode_text`` stay uncompiled.
    """
    if run.compile_backend == "inductor" and device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # seconds, which only a compiled run waits for
        from torch._inductor.exc import InvalidCxxCompiler  # likewise

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError(
                "compile is True, but no C++ compiler is found; install g++, or leave --compile out"
            ) from None
    # The two passes of gradient caching are compiled apart and must draw the same random numbers.
    same_randomness = run.compile_backend == "inductor" and run.micro_batch_size > 0
    # In place: a wrapper would put its name into every key of the checkpoint.
    encoder.compile(backend=run.compile_backend, options={"fallback_random": True} if same_randomness else None)


def _enable_recomputation(encoder: DualEncoder) -> None:
    """Gradient checkpointing: a block's activations are computed again in the backward pass instead of being kept.

    open_clip's transformers and timm's towers have a switch for it; open_clip's ModifiedResNet (RN50 and its kin) has
    one that does nothing, so its residual blocks get it here. Batch normalisation moves its running statistics in each
    forward pass in training mode; in a block that is computed twice they would move twice, so the second pass leaves
    them alone.
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


def _hold_statistics(module: nn.Module, _: object) -> None:
    in_backward = torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint asks, too
    if module.training and in_backward:
        module._held_momentum = module.momentum
        module.momentum = 0.0  # type: ignore[assignment]


def _release_statistics(module: nn.Module, _: object, output: object) -> None:
    if hasattr(module, "_held_momentum"):
        module.momentum = module._held_momentum
        del module._held_momentum
        module.num_batches_tracked.sub_(1)  # type: ignore[operator]
