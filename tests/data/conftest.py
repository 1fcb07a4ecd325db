"""Tiny pictures and archives made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


class FakeTokenizer:
    """Four tokens a caption: its length, and the first three code points. Picklable."""

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([[len(c), *(ord(x) for x in c.ljust(3)[:3])] for c in captions])


@pytest.fixture(scope="session")
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture(scope="session")
def image() -> Callable[..., bytes]:
    """``image(i)``: a PNG of noise that differs for each i; the top left pixel is (i % 256, i // 256, 7)."""

    def make(i: int = 0, width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[0, 0] = (i % 256, i // 256, 7)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """``write_tar(path, {name: bytes})``: a tar, compressed as the path's ending says."""

    def write(path: Path, files: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix[1:]
        with tarfile.open(path, f"w:{suffix if suffix in ('gz', 'xz', 'bz2') else ''}") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path, image: Callable[..., bytes], write_tar: Callable[..., Path]) -> Path:
    """A folder with three shards of 5, 4 and 3 pairs; pair i has the caption ``"pair i"``."""
    i = 0
    for number, size in enumerate((5, 4, 3)):
        files = {}
        for _ in range(size):
            files[f"p{i:03d}.png"], files[f"p{i:03d}.txt"] = image(i), f"pair {i}".encode()
            i += 1
        write_tar(tmp_path / "shards" / f"{number:05d}.tar", files)
    return tmp_path / "shards"
