"""Batches on their way to the device."""

from __future__ import annotations

from typing import Any

import torch

from cloob.data.batch import Batch


class Copies:
    """Moves batches to a device; to CUDA on a stream of their own, so that a copy overlaps the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device, for work on its current stream; waits only for memory that is not pinned."""
        if self._stream is None:
            return batch.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in (moved.images, moved.tokens, moved.ids):
            tensor.record_stream(current)  # else its memory would be handed out again on the stream of the copies
        return moved
