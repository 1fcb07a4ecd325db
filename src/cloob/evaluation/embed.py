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
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloob.cache import Cache
from cloob.data.batch import BadSample, Skip, decoding
from cloob.data.batch import Reader as Reader
from cloob.errors import InputError, refuse
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
    workers: int = (
        0  # threads that read and decode ahead of the model; 0 decodes in between
    )
    cache: Cache | None = None  # where embeddings outlive the process


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
        readable = (
            torch.isfinite(self.images.features).all(1)[self.image_of_text].tolist()
        )
        if empty := sum(
            good and not caption
            for good, caption in zip(readable, self.captions, strict=True)
        ):
            counts["missing caption"] += empty
        return dict(sorted(counts.items()))


class _Loaded(NamedTuple):
    key: str
    captions: tuple[str, ...]
    pixels: Tensor | None
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
    samples: list[_Loaded] = []
    features, of_tower = [], []

    def load(index: int) -> _Loaded:
        captions: tuple[str, ...] = ("",)
        try:
            sample = reader.read(index)
            key, data, *_ = (
                sample if isinstance(sample, tuple) else (sample.key, sample.image)
            )
            captions = getattr(sample, "captions", None) or (
                getattr(sample, "caption", ""),
            )
            with decoding(key):
                return _Loaded(key, captions, encoder.preprocess(decode(data)))
        except BadSample as error:
            return _Loaded(error.key, error.captions or captions, None, error.skip)

    loaded = in_threads(
        load, range(len(reader)), options.workers, 2 * options.batch_size
    )
    with (
        evaluating(encoder),
        capture_tower(encoder) if tower else nullcontext() as captured,
    ):
        while batch := list(islice(loaded, options.batch_size)):
            samples += [sample._replace(pixels=None) for sample in batch]
            if pixels := [
                sample.pixels for sample in batch if sample.pixels is not None
            ]:
                images = torch.stack(pixels).to(getattr(encoder, "device", "cpu"))
                features.append(encoder.encode_image(images).float().cpu())
                if captured is not None:
                    of_tower.append(captured(features[-1]))
            if progress is not None:
                progress(len(samples), len(reader))
    bad = [sample.bad for sample in samples if sample.bad is not None]
    if not features:
        first = (
            f"; the first is {bad[0].key}: {bad[0].reason} ({bad[0].detail})"
            if bad
            else ""
        )
        raise InputError(
            f"{reader.name}: none of the {len(samples)} images can be read{first}"
        )
    readable = [sample.bad is None for sample in samples]
    rows = torch.cat(features)
    _check_finite(
        encoder, rows, [sample.key for sample in samples if sample.bad is None]
    )
    keys, captions = (
        tuple(values)
        for values in zip(*((s.key, s.captions) for s in samples), strict=True)
    )
    towers = _in_place(torch.cat(of_tower), readable) if tower else None
    return ImageEmbeddings(_in_place(rows, readable), keys, bad, captions, towers)


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
    features = embed_texts(
        encoder,
        [caption for caption in captions if caption],
        options.batch_size,
        text_progress,
    )
    return PairEmbeddings(
        images, _in_place(features, [bool(caption) for caption in captions])
    )


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """(T, D) of texts; equal texts go through the tower once.

    InputError if an embedding is not finite.
    """
    refuse({f"{encoder.name}: no texts to embed": not texts})
    # Texts of similar length together: a batch costs what its longest text does
    # (cloob.models.encoder).
    distinct = sorted(dict.fromkeys(texts), key=len)
    place = {text: i for i, text in enumerate(distinct)}
    parts = []
    with evaluating(encoder):
        for i in range(0, len(distinct), batch_size):
            parts.append(
                encoder.encode_text(distinct[i : i + batch_size]).float().cpu()
            )
            if progress is not None:
                progress(min(i + batch_size, len(distinct)), len(distinct))
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
    model: Any = getattr(encoder, "model", None)
    visual: Any = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        yield lambda embeddings: embeddings.float().cpu()
        return
    seen: list[Tensor] = []
    projection = getattr(visual, "proj", None)
    head: Any = (
        getattr(visual, "head", None)
        if hasattr(visual, "trunk")
        else getattr(model, "image_head", None)
    )

    def before_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(
            inputs[0].flatten(1)
            if inputs[0].ndim == 2
            else inputs[0].flatten(2).mean(2)
        )

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        pooled, *others = output if isinstance(output, tuple) else (output,)
        seen.append(pooled)
        if isinstance(projection, nn.Parameter):
            pooled = pooled @ projection
        return (pooled, *others) if isinstance(output, tuple) else pooled

    hooked = isinstance(head, nn.Module)
    handle = (
        head.register_forward_pre_hook(before_head)
        if hooked
        else visual.register_forward_hook(after)
    )
    try:
        if isinstance(projection, nn.Parameter):
            visual.proj = None  # type: ignore[assignment]  # the hook projects, so that one pass gives both
        yield lambda _: torch.cat([seen.pop(0) for _ in range(len(seen))]).float().cpu()
    finally:
        handle.remove()
        if isinstance(projection, nn.Parameter):
            visual.proj = projection


def _in_place(rows: Tensor, readable: Sequence[bool]) -> Tensor:
    """``rows`` in the places that are ``readable``, NaN in the others."""
    features = torch.full((len(readable), rows.shape[1]), torch.nan)
    features[torch.tensor(readable)] = rows
    return features


def _check_finite(encoder: Encoder, features: Tensor, names: Sequence[str]) -> None:
    wrong = (~torch.isfinite(features).all(1)).nonzero()[:, 0]
    if len(wrong):
        first = f"the first is that of {names[int(wrong[0])]!r}"
        raise InputError(
            f"{encoder.name}: {len(wrong)} of {len(names)} embeddings are not finite;"
            f" {first}"
        )
