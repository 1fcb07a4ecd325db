"""Images and texts to embeddings, once; everything else in this package is computed from them.

Legend: n images or pairs, T texts, D the embedding dimension, F the width of the image tower's features. Embeddings are
float32 on the CPU, unit rows. A sample that cannot be read keeps its place as a row of NaN: it stays in every
denominator and counts as wrong.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from warnings import catch_warnings

import torch
from torch import Tensor

from cloob.cache import Cache
from cloob.data.batch import BadSample, Skip
from cloob.data.content import Reader as Reader
from cloob.data.decode import decode
from cloob.errors import InputError
from cloob.evaluation.tower import capture_tower
from cloob.models.encoding import Encoder as Encoder
from cloob.models.encoding import evaluating as evaluating

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after each batch."""


@dataclass(frozen=True)
class EmbedOptions:
    """How pictures and texts are embedded; no embedding depends on it but for rounding.

    Attributes:
        device: Where models are loaded to.
        batch_size: Images or texts a forward pass.
        workers: Threads that read and decode ahead of the model (Pillow decodes and resizes outside the GIL); 0 decodes
            in between.
        cache: Where embeddings outlive the process, see :mod:`cloob.evaluation.cache`; None keeps none.
    """

    device: str | torch.device = "cpu"
    batch_size: int = 256
    workers: int = 0
    cache: Cache | None = None


class ImageEmbeddings(NamedTuple):
    """The images of a set.

    Attributes:
        features: (n, D); NaN rows where the image could not be read.
        keys: The n samples' keys.
        bad: One record for each NaN row, in order.
    """

    features: Tensor
    keys: tuple[str, ...]
    bad: list[Skip]


class PairEmbeddings(NamedTuple):
    """The images and captions of a set of pairs; an image has one caption or several.

    Attributes:
        images: The n images.
        texts: (T, D) of the captions, image by image; NaN rows where the caption could not be read.
        captions: The T captions, empty where unreadable.
        image_of_text: (T,) int64, ascending: the image that each caption describes.
    """

    images: ImageEmbeddings
    texts: Tensor
    captions: tuple[str, ...]
    image_of_text: Tensor

    @property
    def first_texts(self) -> Tensor:
        """(n,) int64, the first caption of each image: what is measured on pairs takes this one."""
        return torch.searchsorted(self.image_of_text, torch.arange(len(self.images.keys)))

    @property
    def unreadable(self) -> dict[str, int]:
        """How many images and how many captions of readable images could not be used, by reason."""
        counts = Counter(skip.reason for skip in self.images.bad)
        readable = torch.isfinite(self.images.features).all(1).tolist()
        pairs = zip(self.image_of_text.tolist(), self.captions, strict=True)
        if empty := sum(not caption and readable[image] for image, caption in pairs):
            counts["missing caption"] += empty
        return dict(sorted(counts.items()))


class _Loaded(NamedTuple):
    key: str
    captions: tuple[str, ...]
    pixels: Tensor | Skip


def embed_images(
    encoder: Encoder, reader: Reader, options: EmbedOptions | None = None, progress: Progress | None = None
) -> ImageEmbeddings:
    """Embeds every image of a set, in order.

    Args:
        encoder: The model; it is put into evaluation mode for the time being.
        reader: The samples.
        options: How; the encoder stays where it is.
        progress: Called after each batch.

    Returns:
        ``(features, keys, bad)``; an image that does not decode is listed in ``bad`` and keeps a row of NaN.

    Raises:
        InputError: The set is empty, none of its images can be read, or an embedding is not finite.
    """
    return _embed(encoder, reader, options, progress)[0]


def embed_images_and_tower(
    encoder: Encoder, reader: Reader, options: EmbedOptions | None = None, progress: Progress | None = None
) -> tuple[ImageEmbeddings, Tensor]:
    """Like :func:`embed_images`, with the (n, F) features of the image tower from the same pass (for probes).

    They are those of :func:`cloob.evaluation.tower.capture_tower`, float32 on the CPU, NaN rows as in the embeddings.
    """
    tower: list[Tensor] = []
    images, _ = _embed(encoder, reader, options, progress, tower)
    readable = torch.cat(tower)
    features = torch.full((len(images.features), readable.shape[1]), torch.nan)
    features[torch.isfinite(images.features).all(1)] = readable
    return images, features


def embed_pairs(
    encoder: Encoder,
    source: Reader,
    options: EmbedOptions | None = None,
    progress: Progress | None = None,
    text_progress: Progress | None = None,
) -> PairEmbeddings:
    """Embeds the images and captions of a source, reading each pair once; arguments as in :func:`embed_images`.

    ``text_progress`` is called after each batch of captions.

    Returns:
        The images, the caption features and the captions. A pair that cannot be read at all has NaN in both. A
        sample with ``captions`` (:mod:`cloob.evaluation.sets.captioned`) has as many texts.

    Raises:
        InputError: As :func:`embed_images`.
    """
    options = options or EmbedOptions()
    images, of_images = _embed(encoder, source, options, progress)
    captions = tuple(caption for group in of_images for caption in group)
    image_of_text = torch.arange(len(of_images)).repeat_interleave(torch.tensor([len(group) for group in of_images]))
    readable = torch.tensor([bool(caption) for caption in captions])
    features = embed_texts(encoder, [caption for caption in captions if caption], options.batch_size, text_progress)
    texts = torch.full((len(captions), features.shape[1]), torch.nan)
    texts[readable] = features
    return PairEmbeddings(images, texts, captions, image_of_text)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None
) -> Tensor:
    """Embeds texts; equal texts go through the tower once.

    Args:
        encoder: The model; it is put into evaluation mode for the time being.
        texts: T texts.
        batch_size: Texts a forward pass.
        progress: Called after each batch with the distinct texts done, and all of them.

    Returns:
        (T, D) float32 on the CPU.

    Raises:
        InputError: No texts, or an embedding is not finite.
    """
    if not texts:
        raise InputError(f"{encoder.name}: no texts to embed")
    # Texts of similar length together: a batch costs what its longest text does (cloob.models.texts).
    distinct = sorted(dict.fromkeys(texts), key=len)
    place = {text: i for i, text in enumerate(distinct)}
    with evaluating(encoder):
        parts: list[Tensor] = []
        for i in range(0, len(distinct), batch_size):
            parts.append(encoder.encode_text(distinct[i : i + batch_size]).float().cpu())
            if progress is not None:
                progress(min(i + batch_size, len(distinct)), len(distinct))
    features = torch.cat(parts)
    _check_finite(encoder, features, distinct)
    return features[torch.tensor([place[text] for text in texts])]


def _embed(
    encoder: Encoder,
    reader: Reader,
    options: EmbedOptions | None,
    progress: Progress | None,
    tower: list[Tensor] | None = None,
) -> tuple[ImageEmbeddings, tuple[tuple[str, ...], ...]]:
    """The images and the captions of each; ``tower``, if there is one, gets the tower's features of each batch."""
    options = options or EmbedOptions()
    batch_size = options.batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    total = len(reader)
    if total == 0:
        raise InputError(f"{reader.name}: the set is empty")
    keys, captions, bad, rows = [], [], [], []
    parts: list[Tensor] = []
    pixels: list[Tensor] = []
    with evaluating(encoder), nullcontext() if tower is None else capture_tower(encoder) as captured:
        for index, sample in enumerate(_load_all(encoder, reader, options.workers, ahead=2 * batch_size)):
            keys.append(sample.key)
            captions.append(sample.captions)
            if isinstance(sample.pixels, Skip):
                bad.append(sample.pixels)
            else:
                pixels.append(sample.pixels)
                rows.append(index)
            if len(pixels) < batch_size and index + 1 < total:
                continue
            if pixels:
                images = torch.stack(pixels).to(getattr(encoder, "device", "cpu"))
                parts.append(encoder.encode_image(images).float().cpu())
                if tower is not None and captured is not None:
                    tower.append(captured(parts[-1]))
                pixels = []
            if progress is not None:
                progress(index + 1, total)
    if not parts:
        first = f"{bad[0].key}: {bad[0].reason} ({bad[0].detail})"
        raise InputError(f"{reader.name}: none of the {total} images can be read; the first is {first}")
    readable = torch.cat(parts)
    _check_finite(encoder, readable, [keys[row] for row in rows])
    features = torch.full((total, readable.shape[1]), torch.nan)
    features[torch.tensor(rows)] = readable
    return ImageEmbeddings(features, tuple(keys), bad), tuple(captions)


def _load_all(encoder: Encoder, reader: Reader, workers: int, ahead: int) -> Iterator[_Loaded]:
    """Every sample in order, decoded by ``workers`` threads at most ``ahead`` samples early."""
    if workers < 1:
        for index in range(len(reader)):
            yield _load(encoder, reader, index)
        return
    waiting: deque[Future[_Loaded]] = deque()
    # decode() sets warning filters, which are the process's; threads that interleave could leave theirs behind.
    with catch_warnings(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for index in range(len(reader)):
                waiting.append(pool.submit(_load, encoder, reader, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _load(encoder: Encoder, reader: Reader, index: int) -> _Loaded:
    try:
        sample = reader.read(index)
    except BadSample as error:
        return _Loaded(error.key, getattr(error, "captions", ("",)), error.skip)
    key, data, *_ = sample if isinstance(sample, tuple) else (sample.key, sample.image)
    captions = getattr(sample, "captions", None) or (getattr(sample, "caption", ""),)
    try:
        return _Loaded(key, captions, encoder.preprocess(decode(data, key)))
    except BadSample as error:
        return _Loaded(key, captions, error.skip)


def _check_finite(encoder: Encoder, features: Tensor, names: Sequence[str]) -> None:
    finite = torch.isfinite(features).all(1)
    if not finite.all():
        first = names[int((~finite).nonzero()[0])]
        raise InputError(
            f"{encoder.name}: {int((~finite).sum())} of {len(names)} embeddings are not finite; "
            f"the first is that of {first!r}"
        )
