"""A model that knows colours, and sets of solid colours: what it should answer is known
by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import make
from cloob.data.batch import BadSample, RawSample
from make import PURE as COLOURS


def picture(colour, size=6):
    return make.picture(COLOURS[colour], (size, size))


class ColourModel:
    """Embeds a picture as its mean colour and a text as the colour that it names;
    ``confused`` swaps two names.
    """

    def __init__(self, name="colours", confused=()):
        self.name = name
        self.swap = {a: b for pair in confused for a, b in (pair, pair[::-1])}
        self.text_batches = []

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)

    def encode_image(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 4, 4)
        assert not torch.is_grad_enabled()
        return self._embed(images.float().mean((2, 3)))

    def encode_text(self, texts):
        assert not torch.is_grad_enabled()
        self.text_batches.append(list(texts))
        names = [
            next(word for word in text.lower().split() if word in COLOURS)
            for text in texts
        ]
        colours = torch.tensor(
            [COLOURS[self.swap.get(name, name)] for name in names], dtype=torch.float32
        )
        # Longer prompts point elsewhere a little, so that an ensemble differs from its
        # members.
        lengths = torch.tensor([[len(text.split()) * 9.0] for text in texts])
        return self._embed(colours + lengths * torch.tensor([[1.0, 0, 0]]))

    def _embed(self, colours):
        x = colours - 127.5
        return x / x.norm(dim=1, keepdim=True)


@dataclass
class Labels:
    """A labelled set; a label of ``broken`` rows keeps its class but the bytes are no
    image.
    """

    colours: Sequence[str]
    classnames: Sequence[str] = tuple(COLOURS)
    templates: Sequence[str] = ("{c}", "a picture of {c}")
    broken: Sequence[int] = ()
    name: str = "solid"
    labels: Sequence[int] = field(default_factory=list)

    def __post_init__(self):
        if not self.labels:
            self.labels = [self.classnames.index(colour) for colour in self.colours]

    def __len__(self):
        return len(self.colours)

    def read(self, index):
        return f"s{index}", b"not an image" if index in self.broken else picture(
            self.colours[index]
        )


@dataclass
class Pairs:
    """A source of pairs; ``broken`` images do not decode, ``missing`` pairs cannot be
    read at all.
    """

    colours: Sequence[str]
    captions: Sequence[str] = ()
    broken: Sequence[int] = ()
    missing: Sequence[int] = ()
    name: str = "pairs"

    def __len__(self):
        return len(self.colours)

    def read(self, index):
        if index in self.missing:
            raise BadSample("missing image", f"p{index}", "gone")
        data = b"not an image" if index in self.broken else picture(self.colours[index])
        return RawSample(f"p{index}", data, (self.captions or self.colours)[index])
