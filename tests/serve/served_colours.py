"""An index of small pictures in six colours, by an encoder that anyone can follow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cloob.search.index import Index
from cloob.search.update import UpdateOptions

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 20),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}


class ColourEncoder:
    """Pictures by their mean colour, texts by the colours that they name; counts what goes through it at once."""

    def __init__(self, name: str = "colours", dim: int = 8) -> None:
        self.name = name
        self.fingerprint = hashlib.sha256(f"{name} {dim}".encode()).hexdigest()[:32]
        self.batches: list[int] = []
        directions = np.linalg.qr(np.random.default_rng(dim).normal(size=(dim, 4)))[0]
        self._directions = torch.from_numpy(directions.astype(np.float32))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB").resize((8, 8))).copy()).permute(2, 0, 1)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return self._rows(images.float().mean((2, 3)))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.batches.append(len(texts))
        colours = []
        for text in texts:
            named = [COLOURS[word] for word in text.lower().split() if word in COLOURS]
            digest = hashlib.sha256(text.encode()).digest()
            colours.append(np.mean(named or [[channel % 20 + 115 for channel in digest[:3]]], axis=0))
        return self._rows(torch.tensor(np.array(colours), dtype=torch.float32))

    def _rows(self, colours: torch.Tensor) -> torch.Tensor:
        values = torch.cat([colours / 127.5 - 1, torch.full((len(colours), 1), 0.3)], 1)
        return torch.nn.functional.normalize(values @ self._directions.T, dim=1)


def draw(folder: Path, numbers: Sequence[int]) -> Path:
    """Pictures NUMBER.png, each a little different, with captions beside them, some of which look like HTML."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name = list(COLOURS)[number % len(COLOURS)]
        shade = tuple(min(255, channel + number % 7) for channel in COLOURS[name])
        image = Image.new("RGB", (24 + number % 5, 24), shade)
        image.putpixel((0, 0), (number % 256, number // 256 % 256, 7))  # no two files are equal
        image.save(folder / f"{number}.png")
        markup = "" if name == "red" else " <i>here</i>"
        (folder / f"{number}.txt").write_text(f"a {name} square{markup}", encoding="utf-8")
    return folder


def build(place: Path, folder: Path, *encoders: ColourEncoder) -> Index:
    """An index of a folder by some encoders, open for reading, with the encoders handed in."""
    with Index.create(place) as made:
        for encoder in encoders:
            made.update([folder], UpdateOptions(model=encoder, name=encoder.name))
    index = Index.open(place)
    for encoder in encoders:
        index.use(encoder.name, encoder)
    return index
