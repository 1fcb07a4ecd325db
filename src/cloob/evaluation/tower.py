"""The features of the image tower, beside the embeddings that it makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def capture_tower(encoder: object) -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes the features of the image tower available beside the embeddings of the same pass.

    Args:
        encoder: A :class:`cloob.models.encoder.DualEncoder`, or any other encoder.

    Yields:
        A function that takes the embeddings of the batch that was just encoded and gives its features, (n, F) float32
        on the CPU: before the projection for open_clip's vision transformers (parameter ``proj``) and timm towers
        (module ``head``), the image tower's output for others (ResNets, Hugging Face towers), and for an encoder that
        is no open_clip module the embeddings themselves.
    """
    visual: Any = getattr(getattr(encoder, "model", None), "visual", None)
    if not isinstance(visual, nn.Module):
        yield lambda embeddings: embeddings.float().cpu()
        return
    seen: list[Tensor] = []
    projection = getattr(visual, "proj", None)
    head = getattr(visual, "head", None)
    takes_projection = isinstance(projection, nn.Parameter)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        pooled, *others = output if isinstance(output, tuple) else (output,)
        seen.append(pooled)
        if not takes_projection:
            return None
        projected = pooled @ projection
        return (projected, *others) if isinstance(output, tuple) else projected

    def before_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(1) if inputs[0].ndim == 2 else inputs[0].flatten(2).mean(2))

    timm_tower = hasattr(visual, "trunk") and isinstance(head, nn.Module)
    handle = head.register_forward_pre_hook(before_head) if timm_tower else visual.register_forward_hook(after)  # type: ignore[union-attr]
    try:
        if takes_projection:
            visual.proj = None  # type: ignore[assignment]  # the hook projects, so that one pass gives both
        yield lambda _: torch.cat([seen.pop(0) for _ in range(len(seen))]).float().cpu()
    finally:
        handle.remove()
        if takes_projection:
            visual.proj = projection  # type: ignore[assignment]
