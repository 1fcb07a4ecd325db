"""Frozen encoders: every distinct picture and text of the pairs is read, decoded and
embedded once, and the features are kept in the cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cloob.cache import Cache
from cloob.data.bad import check_fraction
from cloob.data.batch import BadSample, RawSample, Skip, caption_id
from cloob.data.loader import PairLoader
from cloob.data.source import (
    Fingerprint,
    Source,
    Subset,
    caption_of,
    content_key,
    pictures_of,
    prefetch,
)
from cloob.data.sources.arrow import reading
from cloob.data.vectors import VectorPairs
from cloob.heads.head import Head
from cloob.models.aligned.encoders import (
    open_image_encoder,
    open_text_encoder,
    row_keys,
)
from cloob.models.aligned.model import AlignedEncoder, aligned_encoder
from cloob.models.load import load_model

logger = logging.getLogger(__name__)

BATCH = 128


def open_encoders(
    image: str, text: str, image_size: int | None = None
) -> AlignedEncoder:
    """Two frozen encoders under their names, with heads that say nothing yet."""
    images = open_image_encoder(image, load_model, image_size)
    texts = open_text_encoder(text, load_model)
    heads = Head(images.features, 2), Head(texts.features, 2)
    names = {"image_encoder": image, "text_encoder": text}
    return aligned_encoder(images, texts, *heads, names)


def embedded(
    source: Source,
    encoder: AlignedEncoder,
    *,
    kind: str = "samples",
    workers: int = 0,
    max_bad_fraction: float = 1.0,
    cache: Cache | None = None,
) -> VectorPairs:
    """The pairs of a source as pairs of features, computed here unless they are cached.

    Args:
        source: Pictures and captions.
        encoder: Both frozen encoders.
        kind: What errors call the pairs.
        workers: Processes that decode.
        max_bad_fraction: The share of the pairs that may be unusable.
        cache: Where features are kept.

    Raises:
        InputError: Too many pairs cannot be used, or the features cannot be read.
    """
    # Named by what they are made from: both encoders, by which `cloob eval` finds them,
    # and the bytes of all pairs.
    key = "-".join((*encoder.encoder_keys(), content_key(source)[:20]))
    path = (cache or Cache()).get(
        "features",
        f"{key}.safetensors",
        partial(compute, source, encoder, workers),
    )
    with reading(path, SafetensorError), safe_open(path, framework="pt") as file:
        facts = file.metadata()
        keys, skips = json.loads(facts["keys"]), json.loads(facts["skipped"])
        names = ("images", "texts", "pairs", "ids")
        images, texts, rows, ids = (file.get_tensor(name).numpy() for name in names)
    skipped = tuple(Skip(*skip) for skip in skips)
    total = len(rows) + len(skipped)
    check_fraction(source.name, kind, skipped, total, max_bad_fraction)
    return VectorPairs(source.name, images, texts, rows, ids, keys, skipped)


def first_captions(pairs: VectorPairs) -> VectorPairs:
    """The pairs with one caption a picture, its first."""
    _, first = np.unique(pairs.rows[:, 0], return_index=True)
    return pairs.only(np.sort(first))


def compute(
    source: Source, encoder: AlignedEncoder, workers: int, target: Path
) -> None:
    """Writes the features of all distinct pictures and texts, which of them are pairs,
    and (n, 16) uint8 keys of both, by which `cloob eval` finds them.
    """
    work = Embedding(source, encoder, target)
    same = pictures_of(source)
    first = np.arange(len(source)) if same is None else same
    todo = np.unique(first)
    while len(todo):
        work.pictures(todo, first, workers)
        todo = work.next_captions(todo, first)
    work.captions(first)
    work.write()


class Embedding:
    """What is known of the pairs of a source so far."""

    def __init__(self, source: Source, encoder: AlignedEncoder, target: Path) -> None:
        self.source, self.encoder, self.target = source, encoder, target
        self.images = Distinct(partial(encoder.features_of, "image"))
        self.texts = Distinct(partial(encoder.features_of, "text"))
        # by row of the source: place of the picture, of the text, id of the text, key
        self.pairs: dict[int, tuple[int, int, int, str]] = {}
        self.skipped: dict[int, Skip] = {}
        self.picture_of: dict[int, int] = {}  # by the first row of a picture
        self._shown = -1

    def pictures(self, rows: np.ndarray, first: np.ndarray, workers: int) -> None:
        """Reads, decodes and embeds rows, each with a picture of its own."""
        loader = PairLoader(
            Numbered(Subset(self.source, rows, "distinct pictures")),
            self.encoder.preprocess,
            self.encoder.tokenizer,
            BATCH,
            shuffle=False,
            drop_last=False,
            workers=workers,
        )
        with contextlib.closing(loader):
            for batch in loader.epoch(0):
                for skip in batch.skipped:
                    row, key = number_of(skip.key)
                    self.skipped[row] = Skip(key, skip.reason, skip.detail)
                if len(batch):
                    images = self.images.places(batch.images)
                    texts = self.texts.places(batch.tokens)
                    numbered = map(number_of, batch.keys)
                    columns = zip(
                        numbered, images, texts, batch.ids.tolist(), strict=True
                    )
                    for (row, key), image, text, id_ in columns:
                        self.picture_of[int(first[row])] = image
                        self.pairs[row] = image, text, id_, key
                self.progress()

    def next_captions(self, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
        """For pictures that were lost by a bad caption: their next rows."""
        following = []
        for row in rows.tolist():
            skip = self.skipped.get(row)
            if skip is not None and "caption" in skip.reason:
                others = np.flatnonzero(first == first[row])
                following += others[others > row][:1].tolist()
        return np.array(sorted(following), np.int64)

    def captions(self, first: np.ndarray) -> None:
        """Embeds the captions of all other rows, whose pictures are known."""
        rows = [row for row in range(len(first)) if self.is_open(row)]
        for start in range(0, len(rows), BATCH):
            found: dict[int, tuple[str, str]] = {}
            for row in rows[start : start + BATCH]:
                if int(first[row]) not in self.picture_of:
                    self.skipped[row] = self.skipped[int(first[row])]
                    continue
                try:
                    found[row] = caption_of(self.source, row)
                except BadSample as bad:
                    self.skipped[row] = bad.skip
            if found:
                tokens = self.encoder.tokenizer([text for _, text in found.values()])
                places = self.texts.places(tokens)
                for (row, (key, text)), place in zip(
                    found.items(), places, strict=True
                ):
                    image = self.picture_of[int(first[row])]
                    self.pairs[row] = image, place, caption_id(text), key
            self.progress()

    def is_open(self, row: int) -> bool:
        """Whether a row is neither a pair nor skipped yet."""
        return row not in self.pairs and row not in self.skipped

    def progress(self) -> None:
        """Logs every tenth of the pairs."""
        self.target.touch()  # still running
        done, total = len(self.pairs) + len(self.skipped), len(self.source)
        if done * 10 // total > self._shown:
            self._shown = done * 10 // total
            logger.info("%s: features of %d of %d pairs", self.source.name, done, total)

    def write(self) -> None:
        """Writes the file, its pairs in the order of the source."""
        rows = sorted(self.pairs)
        facts = [self.pairs[row] for row in rows]
        places = [(image, text) for image, text, *_ in facts]
        images, images_rows = self.images.columns()
        texts, texts_rows = self.texts.columns()
        columns = {
            "images": images,
            "texts": texts,
            "images_rows": images_rows,
            "texts_rows": texts_rows,
            "pairs": torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
            "ids": torch.tensor([id_ for _, _, id_, _ in facts], dtype=torch.int64),
        }
        keys = [""] * len(images)  # a picture is called as its first pair
        for image, _, _, key in reversed(facts):
            keys[image] = key
        skips = [self.skipped[row] for row in sorted(self.skipped)]
        reasons = [(skip.key, skip.reason, skip.detail) for skip in skips]
        metadata = {"keys": json.dumps(keys), "skipped": json.dumps(reasons)}
        self.target.write_bytes(save(columns, metadata=metadata))


class Distinct:
    """The features of distinct pictures or texts, each computed once."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self._compute = compute
        self._place: dict[bytes, int] = {}
        self._features: list[Tensor] = []

    def places(self, batch: Tensor) -> list[int]:
        """Where the features of every row stand; those of new ones are computed."""
        keys = [row.numpy().tobytes() for row in row_keys(batch)]
        new: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._place:
                new.setdefault(key, row)
        if new:
            with torch.no_grad():
                features = self._compute(batch[list(new.values())])
            self._features.append(features.float().cpu())
            for key in new:
                self._place[key] = len(self._place)
        return [self._place[key] for key in keys]

    def columns(self) -> tuple[Tensor, Tensor]:
        """(n, F) features and the (n, 16) uint8 keys of their rows."""
        if not self._features:
            return torch.empty(0, 1), torch.empty(0, 16, dtype=torch.uint8)
        content = bytearray(b"".join(self._place))
        keys = torch.frombuffer(content, dtype=torch.uint8).view(len(self._place), -1)
        return torch.cat(self._features), keys


class Numbered(Source):
    """A part of a source whose keys begin with the numbers of rows."""

    def __init__(self, part: Subset) -> None:
        self.part, self.name = part, part.name
        self.shard_sizes, self.streamed = part.shard_sizes, part.streamed

    def fingerprint(self) -> Fingerprint:
        return self.part.fingerprint()

    def prefetch(self, indices: np.ndarray) -> None:
        """Has the files of rows prepared that are read soon."""
        prefetch(self.part, indices)

    def read(self, index: int) -> RawSample:
        row = int(self.part.rows[index])
        try:
            sample = self.part.read(index)
        except BadSample as bad:
            raise replace(bad, key=f"{row}\0{bad.key}") from None
        return RawSample(f"{row}\0{sample.key}", sample.image, sample.caption)


def number_of(key: str) -> tuple[int, str]:
    """The row, and the key as the source has it."""
    row, _, own = key.partition("\0")
    return int(row), own
