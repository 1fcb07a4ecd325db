"""Samples per second of the training data path, beside open_clip_train's, on the same
shards and workers.

``python benchmarks/data.py --data FOLDER ``, FOLDER being WebDataset shards of
image-caption pairs (the pictograms: 64-pixel WebP). Three forms of data: those shards
at 64 pixels, and two sets of JPEG made on the spot with the captions of the shards, at
224 pixels: 500×400 (about 60 kB each, quality 87: what CC3M and LAION look like) and
1024×768. Their pictures are noise with the spectrum of photographs (amplitude ~
1/f^1.3), as no photographs come with the project; the cost of decoding goes by the
bytes and the pixels, and both are photographs'.

Two contenders, one after the other in each repeat, so that what slows the machine slows
both:

- ``open_clip_train``: its ``get_wds_dataset`` with open_clip's training transform
  (random crop of the same scale, bicubic, to float, normalised) and
  ``SimpleTokenizer``;
- ``cloob``: ``Loader`` with ``TrainTransform`` and the tokeniser that
  ``DualEncoder`` has; uint8, as the encoder normalises on its device.

A run counts from the making of the loader to the end of its last process; each has two
workers. Ours lists the members of all shards before, once for all epochs. Samples per
CPU-second (user and system, of this process and its workers) are samples per second and
core; torch has one thread. Prints the rows, and writes results.json to ``--out``. The
record has more workers, two more contenders and a comparison of tokens, from this
script at commit fc415074.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import multiprocessing
import resource
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.figures import data as table
from benchmarks.machine import machine

from cloob.data.loader import Loader, PicturePairs
from cloob.data.open import open_source
from cloob.data.source import Source
from cloob.data.transforms import TrainTransform
from cloob.models.tokenizer import ClipTokenizer

SCALE = (0.9, 1.0)
SPECTRUM = 1.3
QUALITY = 87
THEIRS = "open_clip_train"
OURS = "cloob"
WORKERS = 2


@dataclass(frozen=True)
class Form:
    """Shards of one kind: two tars at least, so that two workers of open_clip_train
    have one each.
    """

    name: str
    shards: tuple[Path, ...]
    image_size: int
    batch_size: int
    batches: int

    def open(self) -> Source:
        names = ",".join(path.name for path in self.shards)
        return open_source(f"{self.shards[0].parent}/{{{names}}}")


def photograph(random: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise with the spectrum of photographs, its colours less varied than
    its brightness.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    shape = (3, *frequency.shape)
    waves = (
        random.standard_normal(shape) + 1j * random.standard_normal(shape)
    ) / frequency**SPECTRUM
    planes = np.fft.irfft2(waves, (height, width))
    light, warm, cold = planes / planes.std(axis=(1, 2), keepdims=True)
    rgb = (
        np.stack(
            [light + 0.35 * warm, light - 0.2 * warm - 0.1 * cold, light + 0.4 * cold],
            axis=-1,
        )
        * 50
        + 125
    )
    file = io.BytesIO()
    Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=QUALITY
    )
    return file.getvalue()


def write_jpegs(
    folder: Path, size: tuple[int, int], captions: list[str], pictures: int
) -> tuple[Path, ...]:
    """Two shards with a JPEG for each caption, of which ``pictures`` are different."""
    random = np.random.default_rng(0)
    images = [photograph(random, *size) for _ in range(pictures)]
    folder.mkdir(parents=True)
    paths = (folder / "00000.tar", folder / "00001.tar")
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(number, len(captions), 2):
                for suffix, data in (
                    ("jpg", images[i % pictures]),
                    ("txt", captions[i].encode()),
                ):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def forms(data: Path, folder: Path, captions: list[str]) -> list[Form]:
    """The three forms of data."""
    shards = tuple(sorted(data.glob("*.tar")))[:2]

    def jpegs(width: int, height: int, batches: int, pictures: int) -> Form:
        chosen = [captions[i % len(captions)] for i in range(64 * batches)]
        paths = write_jpegs(folder / f"{width}", (width, height), chosen, pictures)
        return Form(f"JPEG {width}×{height} to 224", paths, 224, 64, batches)

    batch = min(256, len(open_source(shards[0])) // 2)
    pictograms = Form("WebP 64×64 to 64", shards, 64, batch, 32)
    return [pictograms, jpegs(500, 400, 16, 200), jpegs(1024, 768, 6, 60)]


@contextlib.contextmanager
def ours(form: Form, source: Source) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    transform = TrainTransform(form.image_size, scale=SCALE)
    tokenizer = ClipTokenizer.of(TOKENIZER)
    pairs = Loader(
        PicturePairs(source, transform, tokenizer), form.batch_size, workers=WORKERS
    )
    first = max(0, pairs.steps_per_epoch - form.batches)
    batches = pairs.epoch(0, first * form.batch_size)
    yield ((batch.images, batch.tokens) for batch in batches)
    pairs.close()


def their_transform(form: Form) -> Callable[[Image.Image], Tensor]:
    transform: Callable[[Image.Image], Tensor] = image_transform(
        form.image_size,
        is_train=True,
        mean=OPENAI_DATASET_MEAN,
        std=OPENAI_DATASET_STD,
        aug_cfg={"scale": SCALE},
    )
    return transform


@contextlib.contextmanager
def theirs(form: Form, _: Source) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    options = SimpleNamespace(
        train_data="::".join(map(str, form.shards)),
        train_num_samples=form.batches * form.batch_size,
        train_data_upsampling_factors=None,
        batch_size=form.batch_size,
        workers=WORKERS,
        world_size=1,
        seed=0,
    )
    loader = get_wds_dataset(
        options, their_transform(form), is_train=True, tokenizer=TOKENIZER
    ).dataloader
    yield iter(loader)
    inner = getattr(loader.pipeline[0], "_iterator", None)
    if inner is not None:
        inner._shutdown_workers()


TOKENIZER = SimpleTokenizer()
MAKERS: dict[str, Callable[[Form, Source], Any]] = {THEIRS: theirs, OURS: ours}


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def run(name: str, form: Form, source: Source) -> dict[str, Any]:
    gc.collect()
    wall = time.perf_counter()
    cpu = cpu_seconds()
    samples = 0
    with MAKERS[name](form, source) as batches:
        for images, tokens in batches:
            assert len(images) == len(tokens)
            assert images.shape[1:] == (
                3,
                form.image_size,
                form.image_size,
            )
            samples += len(images)
        wall = time.perf_counter() - wall
    for child in multiprocessing.active_children():
        child.join()
    cpu = cpu_seconds() - cpu
    assert samples >= form.batches * form.batch_size, (name, form, samples)
    return {
        "samples": samples,
        "per_second": samples / wall,
        "per_cpu_second": samples / cpu,
    }


def measure(form: Form, repeats: int) -> list[dict[str, Any]]:
    """A row for each contender; ratios are medians of the repeats' own."""
    source = form.open()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in MAKERS}
    for _ in range(repeats):
        for name in MAKERS:
            runs[name].append(run(name, form, source))
    rows = []
    for name, found in runs.items():
        row: dict[str, Any] = {"data": form.name, "workers": WORKERS, "name": name}
        for key in ("per_second", "per_cpu_second"):
            row[key] = statistics.median(one[key] for one in found)
            pairs = zip(found, runs[THEIRS], strict=True)
            ratios = [one[key] / other[key] for one, other in pairs]
            row[f"{key}_ratio"] = statistics.median(ratios)
        rows.append(row | {"repeats": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "data"
    )
    args = parser.parse_args()
    warnings.filterwarnings(
        "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
    )
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    source = open_source(args.data)
    captions = [source.read(i).caption for i in range(min(10_000, len(source)))]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for form in forms(args.data, Path(folder), captions):
            print(f"{form.name} …", file=sys.stderr, flush=True)
            rows += measure(form, args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine("pillow"), "rows": rows}
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
