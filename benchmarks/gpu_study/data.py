"""The pictures of a pack, decoded once onto the device, with their tokens; and batches of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_study.augment import augment
from benchmarks.gpu_study.pack import PAIRS, Pictures
from torch import Tensor

from cloob.data.batch import caption_id
from cloob.data.decode import decode

SIDE = 64


@dataclass(frozen=True)
class Pairs:
    """n pairs on the device: ``images`` (n, 3, 64, 64) uint8, ``tokens`` (n, L) int64, ``ids`` (n,) int64."""

    images: Tensor
    tokens: Tensor
    ids: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Labelled:
    """n pictures on the device (n, 3, 64, 64) uint8, and what they show."""

    images: Tensor
    labels: Tensor
    classnames: Sequence[str]
    templates: Sequence[str]


def decoded(files: Sequence[bytes], device: torch.device) -> Tensor:
    """(n, 3, 64, 64) uint8 on the device; decoded by as many threads as there are cores."""

    def pixels(file: bytes) -> np.ndarray:
        picture = decode(file)
        if picture.size != (SIDE, SIDE):
            raise ValueError(
                f"a picture of {picture.width} × {picture.height} pixels, where {SIDE} × {SIDE} are expected"
            )
        return np.asarray(picture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(pixels, files)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)


def pairs(pictures: Pictures, tokenizer: Any, device: torch.device) -> Pairs:
    """Pairs of a pack on the device."""
    captions = pictures.facts["captions"]
    ids = torch.tensor([caption_id(caption) for caption in captions], dtype=torch.int64)
    return Pairs(decoded(pictures.files, device), tokenizer(captions).to(device), ids.to(device), tuple(captions))


def test_sets(sets: Mapping[str, Pictures], device: torch.device) -> dict[str, Labelled]:
    """The test sets of a pack on the device."""
    return {
        name: Labelled(
            decoded(found.files, device),
            torch.tensor(found.facts["labels"]),
            found.facts["classnames"],
            found.facts["templates"],
        )
        for name, found in sets.items()
        if name not in PAIRS
    }


def epoch(data: Pairs, batch: int, seed: int, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Augmented batches of one epoch, a function of seed and number alone: images, tokens, ids; all whole batches."""
    generator = torch.Generator(data.images.device).manual_seed(seed * 1_000_003 + number)
    order = torch.randperm(len(data), generator=generator, device=data.images.device)
    for place in range(len(data) // batch):
        some = order[place * batch : (place + 1) * batch]
        yield augment(data.images[some], generator), data.tokens[some], data.ids[some]
