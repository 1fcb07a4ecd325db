"""Both towers as functions of one tensor, as torch.export takes them, and the check that a program computes the same.

Shapes: n items, (H, W) = (image_size, image_size), L = context_length, D = embed_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.encoders import TextEncoder
from cloob.models.aligned.model import AlignedTowers
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import evaluating
from cloob.models.texts import causal_tower, encode_short

TOLERANCE = 1e-4
"""The most that an entry of a unit row may be off; towers that are exported well are off by 1e-6."""
_BATCHES = (1, 2, 7)
_IMAGE_PARTS = ("visual", "image_head")
_TEXTS = (
    "a photo of a dog",
    "",
    "Ein Mädchen & zwei Katzen — 3 Bäume!",
    "a long sentence about many things that somebody has seen on a walk by the river in the early morning " * 3,
    "x",
    "an old map of the harbour, drawn in ink",
    "🙂 smile",
)


@dataclass(frozen=True)
class Tower:
    """One tower as a module of one tensor, and what it is tried with.

    Attributes:
        kind: ``"image"`` or ``"text"``.
        module: The tensor to (n, D) unit rows.
        samples: Seven items: (7, 3, H, W) float32 pixels, or (7, L) int64 tokens.
        wanted: (7, D), what the encoder makes of them.
        pad: The padding that texts may come without; None: they have L tokens.
    """

    kind: str
    module: nn.Module
    samples: Tensor
    wanted: Tensor
    pad: int | None = None

    def example(self) -> tuple[Tensor]:
        """What a program is traced with: two items; texts one token short, as no size is to be met by chance."""
        return (self.samples[:2] if self.pad is None else self.samples[:2, :-1].contiguous(),)

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """The sizes that vary, as ``torch.export`` is told of them."""
        sizes = {0: torch.export.Dim("n", min=1)}
        if self.pad is not None:
            sizes[1] = torch.export.Dim("length", min=2, max=self.samples.shape[1])
        return (sizes,)


class Rows(nn.Module):
    """One tensor to unit rows."""

    def __init__(self, model: Any, encode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode

    def forward(self, items: Tensor) -> Tensor:
        """(n, ...) to (n, D)."""
        return F.normalize(self.encode(self.model, items), dim=-1)


@contextmanager
def exportable(encoder: DualEncoder) -> Iterator[tuple[Tower, Tower]]:
    """Both towers of an encoder on the CPU, in float32; its modes and layout are as before afterwards."""
    encoder.check_weights()
    images, tokens = _samples(encoder)
    channels_last = encoder._layout == torch.channels_last
    with evaluating(encoder):
        wanted = encoder(images, tokens)
        try:
            encoder.set_channels_last(False)
            image = Rows(_side(encoder.model, image=True), lambda model, pixels: model.encode_image(pixels))
            yield Tower("image", image.eval(), images, wanted[0]), _text(encoder, tokens, wanted[1])
        finally:
            encoder.set_channels_last(channels_last)


def worst_difference(tower: Tower, run: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of an entry between a program's rows and the encoder's, for 1, 2 and 7 items.

    Texts that may come without padding are tried at their own length too.
    """
    worst = 0.0
    for n in _BATCHES:
        items, wanted = tower.samples[:n], tower.wanted[:n]
        tried = [items]
        if tower.pad is not None:
            longest = int(((items != tower.pad) * torch.arange(1, items.shape[1] + 1)).max())
            tried.append(items[:, : max(longest, 2)].contiguous())
        for some in tried:
            rows = run(some)
            if rows.shape != wanted.shape or not bool(torch.isfinite(rows).all()):
                raise InputError(f"the {tower.kind} tower's program gives {tuple(rows.shape)} numbers, not all finite")
            worst = max(worst, float((rows - wanted).abs().max()))
    return worst


def checked(name: str, tower: Tower, run: Callable[[Tensor], Tensor]) -> float:
    """As :func:`worst_difference`; InputError above ``TOLERANCE``."""
    worst = worst_difference(tower, run)
    if worst > TOLERANCE:
        raise InputError(
            f"{name}: the exported {tower.kind} tower is off by {worst:.1g} (at most {TOLERANCE:.0e} is let through); "
            "nothing is written"
        )
    return worst


def _text(encoder: DualEncoder, tokens: Tensor, wanted: Tensor) -> Tower:
    """The text tower; up to L tokens where its padding has no part in the result, else L."""
    model = _side(encoder.model, image=False)
    causal = causal_tower(model, encoder.context_length)
    pad: int | None = None
    if causal is not None:
        rows, pad = Rows(model, lambda model, tokens: encode_short(model, causal, tokens, new_mask=True)), 0
    elif isinstance(model, AlignedTowers) and isinstance(model.text, TextEncoder):
        rows, pad = Rows(model, lambda model, tokens: model.text_head(model.text.pooled(tokens))), model.text.pad
    else:
        rows = Rows(model, lambda model, tokens: model.encode_text(tokens))
    return Tower("text", rows.eval(), tokens, wanted, pad)


def _side(model: Any, *, image: bool) -> Any:
    """A model without the parts of the other tower, whose weights a program would carry along; it shares the rest."""
    side = copy.copy(model)
    for held in ("_modules", "_parameters", "_buffers"):
        values = {key: value for key, value in getattr(model, held).items() if (key in _IMAGE_PARTS) == image}
        side.__dict__[held] = values
    return side


def _samples(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
    """Seven pictures of noise, smooth and rough, and the tokens of seven texts."""
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    noise = [torch.rand(1, 3, side, side, generator=generator) for side in (2, 3, 5, 8, 13, 21, size)]
    pictures = torch.cat([F.interpolate(picture, size, mode="bilinear") for picture in noise])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    try:
        tokens = encoder.tokenizer(list(_TEXTS))
    except InputError:  # a model that takes tokens alone
        tables = [module.num_embeddings for module in encoder.model.modules() if isinstance(module, nn.Embedding)]
        shape = (len(_TEXTS), encoder.context_length)
        tokens = torch.randint(1, max(tables, default=2), shape, generator=generator)
    return (pictures - mean) / std, tokens
