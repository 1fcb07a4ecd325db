"""Every picture decoded once, every caption tokenised once, kept as numpy files under a
cache folder.

The pixels are those of the encoder's own evaluation transform; the training
augmentation is the library's, applied to these pixels (the training pictures are stored
at the size they are trained at, so nothing is resized twice).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.frozen.captions import wrong_rows
from benchmarks.studies.comparison import ZEROSHOT
from PIL import Image
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.data.open import open_source
from cloob.data.order import sample_generator
from cloob.data.transforms import TrainTransform
from cloob.evaluation.sets.pictures import open_labelled
from cloob.files import write_whole
from cloob.models.encoder import DualEncoder
from cloob.pictures import decode

IMAGE_SIZE = 64
PAIRS = {
    "train": "pictograms/train",
    "val": "pictograms/val",
    "tuxpaint-captions": "retrieval/tuxpaint-captions/0.tar",
}


@dataclass(frozen=True)
class Pairs:
    """n pairs: ``images`` (n, H, W, 3) uint8, ``tokens`` (n, L) int32, ``ids`` (n,)
    int64, n ``captions``.
    """

    images: np.ndarray
    tokens: np.ndarray
    ids: np.ndarray
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Labelled:
    """n pictures (n, H, W, 3) uint8 with their ``labels`` (n,) int64, and the words for
    the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    classnames: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """All of the study's pictures."""

    pairs: dict[str, Pairs]
    test: dict[str, Labelled]


def load(data: Path, cache: Path, encoder: DualEncoder) -> Data:
    """Reads everything from the cache, and fills it first where it is empty.

    Args:
        data: Folder of the benchmark (see its README).
        cache: Folder of the numpy files.
        encoder: Gives the evaluation transform and the tokeniser; all towers of the
            study share them.
    """
    pairs = {
        name: _pairs(data / path, cache, name, encoder) for name, path in PAIRS.items()
    }
    sets = {
        name: _labelled(data / "zeroshot" / name, cache, encoder) for name in ZEROSHOT
    }
    return Data(pairs, sets)


def with_wrong_captions(data: Data, share: float, seed: int) -> Data:
    """The same pictures, with so much of the training and of the held-out captions
    going round among their pairs.
    """
    pairs = dict(data.pairs)
    for place, name in enumerate(("train", "val")):
        right = data.pairs[name]
        rows = np.arange(len(data.pairs[name]))
        rows = wrong_rows(
            "swap", share, rows, rows, rows, np.random.default_rng([seed, place])
        )
        captions = tuple(right.captions[row] for row in rows)
        pairs[name] = Pairs(right.images, right.tokens[rows], right.ids[rows], captions)
    return Data(pairs, data.test)


class Augmented:
    """Training batches from the cache: the library's order, its random crop, its seeds,
    without a loader.
    """

    def __init__(self, pairs: Pairs, seed: int) -> None:
        self._pairs = pairs
        self._seed = seed
        self._transform = TrainTransform(IMAGE_SIZE)

    def batch(self, epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, 3, H, W) uint8, tokens (n, L) int64 and ids (n,) int64 of these
        pairs in this epoch.
        """
        images = torch.empty(
            (len(indices), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8
        )
        for row, index in enumerate(indices.tolist()):
            picture = Image.fromarray(self._pairs.images[index])
            images[row] = self._transform(
                picture, sample_generator(self._seed, epoch, index)
            )
        tokens = torch.from_numpy(self._pairs.tokens[indices].astype(np.int64))
        return images, tokens, torch.from_numpy(self._pairs.ids[indices])


def pixels(images: np.ndarray) -> Tensor:
    """(n, H, W, 3) as (n, 3, H, W), without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _pairs(path: Path, cache: Path, name: str, encoder: DualEncoder) -> Pairs:
    def build() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        source = open_source(path)
        samples = [source.read(i) for i in range(len(source))]
        captions = [sample.caption for sample in samples]
        arrays = {
            "images": _decoded(
                [(sample.key, sample.image) for sample in samples], encoder
            ),
            "tokens": encoder.tokenizer(captions).numpy().astype(np.int32),
            "ids": np.array([caption_id(caption) for caption in captions], np.int64),
        }
        return arrays, {"captions": captions}

    arrays, texts = _cached(
        cache, f"{name}-{IMAGE_SIZE}", ("images", "tokens", "ids"), build
    )
    return Pairs(
        arrays["images"], arrays["tokens"], arrays["ids"], tuple(texts["captions"])
    )


def _labelled(path: Path, cache: Path, encoder: DualEncoder) -> Labelled:
    def build() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        found = open_labelled(path, "test")
        images = _decoded([found.read(i) for i in range(len(found))], encoder)
        texts = {"classnames": found.classnames, "templates": found.templates}
        return {"images": images, "labels": found.labels}, texts

    arrays, texts = _cached(
        cache, f"{path.name}-test-{IMAGE_SIZE}", ("images", "labels"), build
    )
    return Labelled(
        arrays["images"],
        arrays["labels"],
        tuple(texts["classnames"]),
        tuple(texts["templates"]),
    )


def _decoded(pictures: Sequence[tuple[str, bytes]], encoder: DualEncoder) -> np.ndarray:
    images = np.empty((len(pictures), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for row, (_, data) in enumerate(pictures):
        images[row] = encoder.preprocess(decode(data)).permute(1, 2, 0).numpy()
    return images


def _cached(
    cache: Path,
    name: str,
    kinds: Sequence[str],
    build: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    folder = cache / name
    if not (folder / "texts.json").is_file():
        arrays, texts = build()
        for kind, array in arrays.items():
            whole = io.BytesIO()
            np.save(whole, array)
            write_whole(folder / f"{kind}.npy", whole.getvalue())
        # Written last: its presence says that the rest is there. Two builders at once
        # only replace each other's files.
        write_whole(folder / "texts.json", json.dumps(texts))
    arrays = {kind: np.load(folder / f"{kind}.npy", mmap_mode="c") for kind in kinds}
    return arrays, json.loads((folder / "texts.json").read_text(encoding="utf-8"))
