"""Images and texts to embeddings, once: float32 on the CPU, unit rows.

n images or pairs, T texts, D the embedding dimension, F the width of the image tower's
features. A sample that cannot be read keeps its place as a row of NaN: it counts as
wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cloob.data.batch import BadSample, Skip, decoding
from cloob.data.batch import Reader as Reader
from cloob.errors import InputError
from cloob.machine import in_threads
from cloob.models.encoder import DualEncoder
from cloob.models.encoder import evaluating as evaluating
from cloob.pictures import decode

Encoder = DualEncoder  # or any object with its preprocess, encode_image and encode_text
Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after every batch."""


@dataclass(frozen=True)
class EmbedOptions:
    """How pictures and texts are embedded; embeddings depend on it by rounding
    alone.
    """

    device: str | torch.device = "cpu"  # where models are loaded to
    batch_size: int = 256  # images or texts a forward pass
    # threads that read and decode ahead of the model; 0 decodes in between
    workers: int = 0


class ImageEmbeddings(NamedTuple):
    """The n images of a set; NaN rows where unreadable."""

    features: Tensor  # (n, D)
    keys: tuple[str, ...]  # of the n samples
    bad: list[Skip]  # one per row of NaN, in order
    captions: tuple[tuple[str, ...], ...] = ()  # of every image
    tower: Tensor | None = None  # (n, F) features of the image tower, if requested


@dataclass(frozen=True)
class PairEmbeddings:
    """The n images of a set of pairs, and (T, D) of their captions, image by image; NaN
    rows where unreadable.
    """

    images: ImageEmbeddings
    texts: Tensor

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The T captions, empty where unreadable."""
        return tuple(caption for group in self.images.captions for caption in group)

    @cached_property
    def image_of_text(self) -> Tensor:
        """(T,) int64, ascending: the image that every caption describes."""
        counts = torch.tensor([len(group) for group in self.images.captions])
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def first_texts(self) -> Tensor:
        """(n,) int64, the first caption of every image: what is measured on pairs takes
        this one.
        """
        return torch.searchsorted(
            self.image_of_text, torch.arange(len(self.images.keys))
        )

    @property
    def unreadable(self) -> dict[str, int]:
        """How many images and how many captions of readable images could not be used,
        by reason.
        """
        counts = Counter(skip.reason for skip in self.images.bad)
        readable = torch.isfinite(self.images.features).all(dim=1)
        is_empty = torch.tensor([not caption for caption in self.captions])
        n_empty = int((readable[self.image_of_text] & is_empty).sum())
        if n_empty:
            counts["missing caption"] += n_empty
        return dict(sorted(counts.items()))


@dataclass
class _Loaded:
    """A sample with its pixels, or why it has none."""

    key: str
    captions: tuple[str, ...]
    pixels: Tensor | None = None
    bad: Skip | None = None


def embed_images(
    encoder: Encoder,
    reader: Reader,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
    *,
    tower: bool = False,
) -> ImageEmbeddings:
    """Embeds every image of a set, in order; InputError if none can be read, or an
    embedding is not finite.
    """
    options = options or EmbedOptions()
    load = partial(_load, encoder, reader)
    ahead = 2 * options.batch_size
    loaded = in_threads(load, range(len(reader)), options.workers, ahead)
    samples: list[_Loaded] = []
    features: list[Tensor] = []
    towers: list[Tensor] = []
    capturing = capture_tower(encoder) if tower else nullcontext()
    with evaluating(encoder), capturing as captured:
        while batch := list(islice(loaded, options.batch_size)):
            rows = _encode(encoder, batch)
            if len(rows):
                features.append(rows)
                towers += [] if captured is None else [captured(rows)]
            samples += batch
            if progress is not None:
                progress(len(samples), len(reader))
    if not features:
        raise InputError(_none_readable(reader.name, samples))
    rows = torch.cat(features)
    _check_finite(encoder, rows, [each.key for each in samples if each.bad is None])
    return _assembled(samples, rows, towers)


def _assembled(
    samples: Sequence[_Loaded], rows: Tensor, towers: Sequence[Tensor]
) -> ImageEmbeddings:
    """All samples in order, with the rows of those that can be read."""
    readable = torch.tensor([sample.bad is None for sample in samples])
    return ImageEmbeddings(
        features=_in_place(rows, readable),
        keys=tuple(sample.key for sample in samples),
        bad=[sample.bad for sample in samples if sample.bad is not None],
        captions=tuple(sample.captions for sample in samples),
        tower=_in_place(torch.cat(list(towers)), readable) if towers else None,
    )


def _load(encoder: Encoder, reader: Reader, index: int) -> _Loaded:
    """A sample ready for the encoder, or why it is bad."""
    captions: tuple[str, ...] = ("",)
    try:
        sample = reader.read(index)
        if isinstance(sample, tuple):
            key, data = sample[:2]
        else:
            key, data = sample.key, sample.image
            captions = getattr(sample, "captions", None) or (sample.caption,)
        with decoding(key):
            return _Loaded(key, captions, encoder.preprocess(decode(data)))
    except BadSample as error:
        return _Loaded(error.key, error.captions or captions, bad=error.skip)


def _encode(encoder: Encoder, samples: Sequence[_Loaded]) -> Tensor:
    """The rows of those that can be read, whose pixels are let go."""
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    for sample in samples:
        sample.pixels = None
    if not pixels:
        return torch.empty(0)
    images = torch.stack(pixels).to(getattr(encoder, "device", "cpu"))
    return encoder.encode_image(images).float().cpu()


def _none_readable(name: str, samples: Sequence[_Loaded]) -> str:
    text = f"{name}: none of the {len(samples)} images can be read"
    if samples and samples[0].bad is not None:
        first = samples[0].bad
        text += f"; the first is {first.key}: {first.reason} ({first.detail})"
    return text


def embed_pairs(
    encoder: Encoder,
    source: Reader,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
    text_progress: Progress | None = None,
) -> PairEmbeddings:
    """Embeds the images and captions of a source; a sample with ``captions`` has as
    many texts.
    """
    options = options or EmbedOptions()
    images = embed_images(encoder, source, options, progress)
    captions = [caption for group in images.captions for caption in group]
    usable = [caption for caption in captions if caption]
    features = embed_texts(encoder, usable, options.batch_size, text_progress)
    is_usable = torch.tensor([bool(caption) for caption in captions])
    return PairEmbeddings(images, _in_place(features, is_usable))


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """(T, D) of texts; equal texts go through the tower once.

    InputError if an embedding is not finite.
    """
    if not texts:
        raise InputError(f"{encoder.name}: no texts to embed")
    # Texts of similar length together: a batch costs what its longest text does
    # (cloob.models.encoder).
    distinct = sorted(dict.fromkeys(texts), key=len)
    place = {text: i for i, text in enumerate(distinct)}
    parts = []
    with evaluating(encoder):
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            parts.append(encoder.encode_text(batch).float().cpu())
            if progress is not None:
                progress(start + len(batch), len(distinct))
    features = torch.cat(parts)
    _check_finite(encoder, features, distinct)
    return features[torch.tensor([place[text] for text in texts])]


@contextmanager
def capture_tower(encoder: object) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from the embeddings of the batch just encoded to features of
    its tower, (n, F) on the CPU.

    As CLIP took them: the input of the projection in open_clip's vision transformers
    (``proj``), timm towers (``head``) and heads on frozen encoders (``image_head``),
    the output of other image towers, the embeddings without one.
    """
    model = getattr(encoder, "model", None)
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        yield lambda embeddings: embeddings.float().cpu()
        return
    head = getattr(model, "image_head", None)
    if hasattr(visual, "trunk"):  # of timm
        head = getattr(visual, "head", None)
    projection = getattr(visual, "proj", None)
    seen: list[Tensor] = []
    if head is not None:
        handle = head.register_forward_pre_hook(partial(_keep_input, seen))
    else:
        handle = visual.register_forward_hook(partial(_keep_output, seen, projection))
    try:
        if isinstance(projection, nn.Parameter) and head is None:
            # the hook projects, so that one pass gives both
            visual.register_parameter("proj", None)
        yield lambda _: torch.cat([seen.pop(0) for _ in range(len(seen))]).float().cpu()
    finally:
        handle.remove()
        if isinstance(projection, nn.Parameter) and head is None:
            visual.register_parameter("proj", projection)


def _keep_input(seen: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keeps what comes into a head, of maps their mean."""
    rows = inputs[0]
    seen.append(rows if rows.ndim == 2 else rows.flatten(2).mean(2))


def _keep_output(
    seen: list[Tensor],
    projection: object,
    _: nn.Module,
    inputs: object,
    output: Tensor | tuple[Tensor, ...],
) -> Tensor | tuple[Tensor, ...]:
    """Keeps what a tower pools, and projects it where the tower has a projection."""
    pooled, *tokens = output if isinstance(output, tuple) else (output,)
    seen.append(pooled)
    if isinstance(projection, nn.Parameter):
        pooled = pooled @ projection
    return (pooled, *tokens) if isinstance(output, tuple) else pooled


def _in_place(rows: Tensor, readable: Tensor) -> Tensor:
    """``rows`` in the places that are ``readable``, NaN in the others."""
    features = torch.full((len(readable), rows.shape[1]), torch.nan)
    features[readable] = rows
    return features


def _check_finite(encoder: Encoder, features: Tensor, names: Sequence[str]) -> None:
    wrong = (~torch.isfinite(features).all(1)).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"{encoder.name}: {len(wrong)} of {len(names)} embeddings are not finite;"
            f" the first is that of {names[int(wrong[0])]!r}"
        )
