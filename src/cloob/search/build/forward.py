"""Pictures through a model: pixels for it, and rows of it; and whose turn it is on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cloob.machine import warn_of_emulated_bfloat16
from cloob.models.encoding import Encoder, evaluating
from cloob.pictures import Encoded
from cloob.search.identity import Making

_SPARE = 2  # sides of a picture that is decoded smaller, at least, in sides of the model's input


class Forward:
    """What makes vectors of pictures.

    On a CPU the decoding threads rest while the model runs: both have a thread for each processor, and those of a
    matrix product wait for each other, so that one picture beside it holds up all of them.

    Args:
        encoder: Gives the model, when it is first needed; it may be called from several threads.
        making: How its vectors are made.
    """

    def __init__(self, encoder: Callable[[], Encoder], making: Making) -> None:
        self._encoder, self._making = encoder, making
        self._begun = False
        self._decoding = threading.Event()
        self._decoding.set()

    def wait(self) -> None:
        """Comes back when the processors are not the model's."""
        self._decoding.wait()

    def pixels(self, encoded: Encoded) -> Tensor:
        """Decodes one picture: uint8 (3, H, W).

        Raises:
            Unreadable: It is damaged.
        """
        encoder = self._encoder()
        reduction = draft_reduction(encoded.stored, getattr(encoder, "image_size", None)) if self._making.draft else 1
        return encoder.preprocess(encoded.rgb(reduction))

    def rows(self, pixels: Sequence[Tensor]) -> Tensor:
        """Embeds n pictures: (n, D) float32 on the CPU."""
        encoder = self._encoder()
        device = torch.device(getattr(encoder, "device", "cpu"))
        bf16 = self._making.precision == "bf16"
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        if bf16 and device.type == "cpu" and not self._begun:
            warn_of_emulated_bfloat16()
        self._begun = True
        if device.type == "cpu":
            self._decoding.clear()
        try:
            with evaluating(encoder), autocast:
                return encoder.encode_image(torch.stack(list(pixels)).to(device)).float().cpu()
        finally:
            self._decoding.set()


def draft_reduction(stored: tuple[int, int], side: int | None) -> int:
    """By how much a JPEG file may come out smaller: 1, 2, 4 or 8, with twice the model's input left on each side.

    Args:
        stored: Width and height at which it would be decoded, pixels.
        side: Of the model's input; None where it is not known.
    """
    reduction = 1
    while side and reduction < 8 and min(stored) >= 2 * reduction * _SPARE * side:
        reduction *= 2
    return reduction
