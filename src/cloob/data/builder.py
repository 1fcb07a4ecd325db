"""From the numbers of some pairs to a batch: read, decode, augment, tokenise. It lives in each worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cloob.data.batch import BadSample, Batch, Skip, caption_id, decoding
from cloob.data.order import sample_generator
from cloob.data.source import Source
from cloob.data.transforms import TrainTransform
from cloob.pictures import Encoded

Transform = Callable[..., Tensor]
Tokenizer = Callable[[list[str]], Tensor]


class Request(NamedTuple):
    """One local batch."""

    epoch: int
    indices: np.ndarray


class BatchBuilder(Dataset[Batch]):
    def __init__(self, source: Source, transform: Transform, tokenizer: Tokenizer, seed: int) -> None:
        self._source = source
        self._transform = transform
        self._tokenizer = tokenizer
        self._seed = seed
        self._random = _takes_generator(transform)
        # What an empty batch looks like has to be known before the first good sample.
        blank = self._transformed(Image.new("RGB", (32, 32)), 0, 0)
        self._image_shape, self._image_dtype = blank.shape, blank.dtype
        self._token_length = self._tokens(["a"]).shape[1]

    def __getitems__(self, request: Request) -> Batch:
        images = torch.empty((len(request.indices), *self._image_shape), dtype=self._image_dtype)
        keys: list[str] = []
        captions: list[str] = []
        skipped: list[Skip] = []
        for index in request.indices.tolist():
            try:
                sample = self._source.read(index)
                with decoding(sample.key):
                    pixels = self._pixels(Encoded(sample.image), request.epoch, index)
            except BadSample as bad:
                skipped.append(bad.skip)
                continue
            except MemoryError:  # after decoding; a worker's memory is bounded (see pool)
                skipped.append(Skip(sample.key, "image too large", "takes more memory than a data worker may"))
                continue
            if pixels.shape != self._image_shape:  # assignment would broadcast
                raise ValueError(
                    f"{sample.key}: the transform gave {tuple(pixels.shape)}, {tuple(self._image_shape)} before; "
                    "it must give one shape for all images"
                )
            images[len(keys)] = pixels
            keys.append(sample.key)
            captions.append(sample.caption)
        tokens = self._tokens(captions) if captions else torch.empty((0, self._token_length), dtype=torch.int64)
        ids = torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64)
        return Batch(images[: len(keys)], tokens, ids, tuple(keys), tuple(skipped))

    def _pixels(self, encoded: Encoded, epoch: int, index: int) -> Tensor:
        if not isinstance(self._transform, TrainTransform):
            return self._transformed(encoded.rgb(), epoch, index)
        # The crop comes first: then a JPEG need not be decoded in more detail than it takes.
        generator = sample_generator(self._seed, epoch, index)
        crop = self._transform.draw(*encoded.size, generator, encoded.orientation)
        return self._transform.take(encoded.rgb(crop.reduction, upright=False), crop)

    def _transformed(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        random = [sample_generator(self._seed, epoch, index)] if self._random else []
        return self._transform(image, *random)

    def _tokens(self, captions: list[str]) -> Tensor:
        return self._tokenizer(captions).to(torch.int64)


def _takes_generator(transform: Transform) -> bool:
    """Whether a transform asks for a second argument."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    return sum(p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters) >= 2
