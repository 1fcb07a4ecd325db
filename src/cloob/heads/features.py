"""Frozen encoders: every distinct picture and text of the pairs is read, decoded and
embedded once, and the features are kept in the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cloob.cache import Cache
from cloob.data.batch import BadSample, Batch, RawSample, Skip, caption_id
from cloob.data.loader import Loader, PicturePairs
from cloob.data.source import Source, Subset, content_key
from cloob.data.sources.files import reading
from cloob.data.vectors import VectorPairs
from cloob.heads.head import Head
from cloob.models.aligned.encoders import (
    FeatureMemory,
    open_image_encoder,
    open_text_encoder,
)
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.load import load_model

logger = logging.getLogger(__name__)

BATCH = 128
REPORTED = 16  # batches
COLUMNS = ("rows", "pairs", "ids", "images", "texts")


def open_encoders(
    image: str, text: str, image_size: int | None = None
) -> AlignedEncoder:
    """Two frozen encoders under their names, with heads that say nothing yet."""
    images = open_image_encoder(image, load_model, image_size)
    texts = open_text_encoder(text, load_model)
    heads = Head(images.features, 2), Head(texts.features, 2)
    names = {"image_encoder": image, "text_encoder": text}
    return AlignedEncoder(images, texts, heads, names)


class Embedded(NamedTuple):
    """Pairs of features, and where they come from."""

    pairs: VectorPairs
    rows: np.ndarray  # (N,) row of the source of every pair


def embedded(source: Source, encoder: AlignedEncoder, workers: int = 0) -> Embedded:
    """The pairs of a source as pairs of features, computed here unless they are
    cached.
    """
    # Named by what they are made from: both encoders, by which `cloob eval` finds them,
    # and the bytes of all pairs.
    key = "-".join((*encoder.encoder_keys(), content_key(source)[:20]))
    make = partial(compute, source, encoder, workers)
    path = Cache().get("features", f"{key}.safetensors", make)
    with reading(path, SafetensorError), safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        columns = {name: file.get_tensor(name).numpy() for name in COLUMNS}
    keys = json.loads(metadata["keys"])
    skipped = tuple(Skip(*skip) for skip in json.loads(metadata["skipped"]))
    pairs = VectorPairs(
        source.name,
        a=columns["images"],
        b=columns["texts"],
        rows=columns["pairs"],
        ids=columns["ids"],
        labels=keys,
        skipped=skipped,
    )
    return Embedded(pairs, columns["rows"])


def first_captions(pairs: VectorPairs) -> VectorPairs:
    """The pairs with one caption a picture, its first."""
    _, first = np.unique(pairs.rows[:, 0], return_index=True)
    return pairs.only(np.sort(first))


class Caption(NamedTuple):
    """The key and the caption of a row."""

    key: str
    text: str


def compute(
    source: Source, encoder: AlignedEncoder, workers: int, target: Path
) -> None:
    """Writes the features of all distinct pictures and texts, which of them are pairs,
    and (n, 16) uint8 keys of both, by which `cloob eval` finds them.
    """
    captions, skipped = read_captions(source)
    picture_of = source.first_rows()  # of every row
    if picture_of is None:
        picture_of = np.arange(len(source))
    rows = np.array(list(captions), np.int64)
    _, places = np.unique(picture_of[rows], return_index=True)

    images = FeatureMemory()
    pictures: dict[int, bytes | Skip] = {}  # the digest of each, or why it is lost
    for asked, batch in read_pictures(source, np.sort(rows[places]), encoder, workers):
        target.touch()  # still running
        usable = batch.tokens[:, 0].numpy()
        bad = np.setdiff1d(asked, usable)
        digests = images.add(batch.images, encoder.image_features)
        pictures |= zip(picture_of[usable].tolist(), digests, strict=True)
        pictures |= zip(picture_of[bad].tolist(), batch.skipped, strict=True)

    usable_captions: dict[int, Caption] = {}
    image_digests: list[bytes] = []
    for row, caption in captions.items():
        picture = pictures[int(picture_of[row])]
        if isinstance(picture, Skip):
            skipped[row] = picture
        else:
            usable_captions[row] = caption
            image_digests.append(picture)
    texts = FeatureMemory()
    words = [caption.text for caption in usable_captions.values()]
    text_digests: list[bytes] = []
    for start in range(0, len(words), BATCH):
        tokens = encoder.tokenizer(words[start : start + BATCH])
        text_digests += texts.add(tokens, encoder.text_features)
    places_of_images = places_in(images, image_digests)
    pairs = [*zip(places_of_images, places_in(texts, text_digests), strict=True)]
    write(target, images, texts, pairs, usable_captions, skipped)


def places_in(memory: FeatureMemory, digests: list[bytes]) -> list[int]:
    """Where the features of these pictures or texts stand in a file."""
    place = {digest: i for i, digest in enumerate(memory.by_digest)}
    return [place[digest] for digest in digests]


def write(
    target: Path,
    images: FeatureMemory,
    texts: FeatureMemory,
    pairs: list[tuple[int, int]],
    captions: dict[int, Caption],
    skipped: dict[int, Skip],
) -> None:
    """Writes the file of the features and their pairs, of which each has a row."""
    names: dict[int, str] = {}  # a picture is called as its first pair
    for (picture, _), caption in zip(pairs, captions.values(), strict=True):
        names.setdefault(picture, caption.key)
    keys = [names[place] for place in range(len(names))]
    skips = [dataclasses.astuple(skipped[row]) for row in sorted(skipped)]
    ids = [caption_id(caption.text) for caption in captions.values()]
    columns = {
        "rows": torch.tensor(list(captions), dtype=torch.int64),
        "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        "ids": torch.tensor(ids, dtype=torch.int64),
        **images.columns("images"),
        **texts.columns("texts"),
    }
    metadata = {"keys": json.dumps(keys), "skipped": json.dumps(skips)}
    target.write_bytes(save(columns, metadata=metadata))


def read_captions(source: Source) -> tuple[dict[int, Caption], dict[int, Skip]]:
    """The captions of all rows, and the rows without one that can be used."""
    captions, skipped = {}, {}
    for row in range(len(source)):
        try:
            captions[row] = Caption(*source.caption(row))
        except BadSample as bad:
            skipped[row] = bad.skip
    return captions, skipped


class Numbered(Subset):
    """Some rows of a source; a caption is the number of its row."""

    def read(self, index: int) -> RawSample:
        return dataclasses.replace(super().read(index), caption=f"{self.rows[index]:x}")


def numbers_of(captions: list[str]) -> Tensor:
    """(n, 1) rows of a ``Numbered``."""
    return torch.tensor([[int(caption, 16)] for caption in captions])


def read_pictures(
    source: Source, rows: np.ndarray, encoder: AlignedEncoder, workers: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Reads and decodes the pictures of ascending rows: which rows were asked for, and
    a batch of those that can be used, whose tokens are their rows.
    """
    if not len(rows):
        return
    pairs = PicturePairs(
        Numbered(source, rows, "distinct pictures"), encoder.preprocess, numbers_of
    )
    loader = Loader(pairs, BATCH, shuffle=False, drop_last=False, workers=workers)
    with contextlib.closing(loader):
        for start, batch in enumerate(loader.epoch(0)):
            asked = rows[start * BATCH : (start + 1) * BATCH]
            yield asked, batch
            n_done = start * BATCH + len(asked)
            if start % REPORTED == 0 or n_done == len(rows):
                logger.info(
                    "%s: features of %d of %d pictures", source.name, n_done, len(rows)
                )
