"""Both towers as modules of one tensor, as torch.export takes them, and the check that a graph computes the same.

Shapes: n items, (H, W) = (image_size, image_size), L = context_length, D = embed_dim.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.encoders import TextEncoder
from cloob.models.aligned.model import AlignedTowers
from cloob.models.encoder import DualEncoder, causal_tower, encode_short

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
    """One tower as a module of one tensor, and what it is tried with."""

    kind: str  # "image" or "text"
    module: nn.Module  # the tensor to (n, D) unit rows
    samples: Tensor  # seven items: (7, 3, H, W) float32 pixels, or (7, L) int64 tokens
    wanted: Tensor  # (7, D), what the encoder makes of them
    pad: int | None = None  # the padding that texts may come without; None: they have L tokens

    def example(self) -> tuple[Tensor]:
        """What a graph is traced with: two items; texts one token short, as no size is to be met by chance."""
        return (self.samples[:2] if self.pad is None else self.samples[:2, :-1].contiguous(),)

    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """The sizes that vary, for ``torch.export``."""
        sizes = {0: torch.export.Dim(f"{self.kind}s", min=1)}
        if self.pad is not None:
            sizes[1] = torch.export.Dim("length", min=2, max=self.samples.shape[1])
        return (sizes,)


class _Rows(nn.Module):
    """One tensor to unit rows; tokens without ``end`` get it in their last place, as transformers.js cuts it off."""

    def __init__(self, model: Any, encode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.encode = model, encode
        self.end: int | None = None

    def forward(self, items: Tensor) -> Tensor:
        if self.end is not None:
            cut = (items != self.end).all(1, keepdim=True)
            items = torch.cat([items[:, :-1], items[:, -1:].masked_fill(cut, self.end)], 1)
        return F.normalize(self.encode(self.model, items), dim=-1)


def towers_of(encoder: DualEncoder) -> tuple[Tower, Tower]:
    """The image tower and the text tower of an encoder on the CPU in float32, which is in eval mode afterwards."""
    encoder.check_weights()
    images, tokens = _samples(encoder)
    encoder.eval()
    with torch.no_grad():
        image_rows, text_rows = encoder(images, tokens)
    encoder.set_channels_last(False)
    image = _Rows(_side(encoder.model, image=True), lambda model, pixels: model.encode_image(pixels))
    return Tower("image", image.eval(), images, image_rows), _text(encoder, tokens, text_rows)


@torch.no_grad()
def worst_difference(name: str, tower: Tower, run: Callable[[Tensor], Tensor], most: float = TOLERANCE) -> float:
    """The largest difference of an entry between a graph's rows and the encoder's, for 1, 2 and 7 items.

    Texts that may come without padding are tried at their own length too. InputError above ``most``.
    """
    worst = 0.0
    for n in _BATCHES:
        items, tried = tower.samples[:n], [tower.samples[:n]]
        if tower.pad is not None:
            longest = int(((items != tower.pad) * torch.arange(1, items.shape[1] + 1)).max())
            tried.append(items[:, : max(longest, 2)].contiguous())
        for some in tried:
            worst = max(worst, float((run(some) - tower.wanted[:n]).abs().nan_to_num(torch.inf).max()))
    if worst > most:
        what = f"the exported {tower.kind} tower is off by {worst:.1g} (at most {most:.0e})"
        raise InputError(f"{name}: {what}; nothing is written")
    return worst


def _text(encoder: DualEncoder, tokens: Tensor, wanted: Tensor) -> Tower:
    """The text tower; up to L tokens where its padding has no part in the result, else L."""
    model = _side(encoder.model, image=False)
    causal = causal_tower(model, encoder.context_length)
    pad: int | None = None
    if causal is not None:
        rows, pad = _Rows(model, lambda model, tokens: encode_short(model, causal, tokens, new_mask=True)), 0
    elif isinstance(model, AlignedTowers) and isinstance(model.text, TextEncoder):
        rows, pad = _Rows(model, lambda model, tokens: model.text_head(model.text.pooled(tokens))), model.text.pad
    else:
        rows = _Rows(model, lambda model, tokens: model.encode_text(tokens))
    with contextlib.suppress(InputError):  # of a model that takes tokens alone
        short, long = encoder.tokenizer(["x", "a " * encoder.context_length]).tolist()
        rows.end = long[-1] if long[-1] in short else None
    return Tower("text", rows.eval(), tokens, wanted, pad)


def _side(model: Any, *, image: bool) -> Any:
    """A model without the parts of the other tower, whose weights a graph would carry along; it shares the rest."""
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
