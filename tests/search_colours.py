"""A model that knows colours, and an index of pictures of one colour each: what is
found is known by hand.
"""

import hashlib
import re

import numpy as np
import torch

import make
from cloob.search.index import Index
from cloob.search.update import UpdateOptions

COLOURS = make.PURE | {"white": (255, 255, 255), "black": (0, 0, 0)}
DIM = 24


class ColourModel:
    """A picture is the row of the colour nearest to its mean, a text that of the colour
    it names.

    Another ``name`` gives other rows. ``batches`` counts what goes through it at once.
    """

    embed_dim = DIM
    weights_file = tokenizer = model = None
    device = torch.device("cpu")

    def __init__(self, name="colours", **config):
        self.name = name
        self.objective_config = config
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()[:32]
        self.texts = []
        self.batches = []

    def preprocess(self, image):
        small = image.convert("RGB").resize((4, 4))
        return torch.from_numpy(np.array(small)).permute(2, 0, 1)

    def encode_image(self, images):
        self.batches.append(len(images))
        means = images.float().mean((2, 3))
        palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        nearest = torch.cdist(means, palette).argmin(1).tolist()
        # The exact shade turns a row a little, so that no two pictures are the same.
        names = list(COLOURS)
        rows = []
        for number, mean in zip(nearest, means, strict=True):
            rows.append(self._row(names[number], float(mean.sum())))
        return torch.stack(rows)

    def encode_text(self, texts):
        self.texts += texts
        self.batches.append(len(texts))
        rows = []
        for text in texts:
            named = [word for word in re.findall("[a-z]+", text) if word in COLOURS]
            first, *_ = [*named, text]
            rows.append(self._row(first))
        return torch.stack(rows)

    def _row(self, name, shade=None):
        salted = self.name.removeprefix("colours") + name
        seed = int.from_bytes(hashlib.sha256(salted.encode()).digest()[:4], "big")
        row = torch.randn(DIM, generator=torch.Generator().manual_seed(seed))
        if shade is not None:
            row = row + 0.1 * torch.randn(
                DIM, generator=torch.Generator().manual_seed(int(shade))
            )
        return row / row.norm()


def loads(patch, load=lambda *_, **__: ColourModel()):
    """Whatever model a command is given is what ``load`` makes of it; each name is one
    of a model.
    """
    patch.setattr("cloob.commands.index.check_source", lambda _: None)
    patch.setattr("cloob.models.load.load_model", load)


def write_pictures(folder, n=4):
    """``n`` shades of each colour, ``red-0.png`` … with a caption beside."""
    folder.mkdir(parents=True)
    for name, colour in COLOURS.items():
        for i in range(n):
            darker = 5 * i
            shade = tuple(c - darker if c else darker for c in colour)
            (folder / f"{name}-{i}.png").write_bytes(make.picture(shade, (20 + i, 20)))
            (folder / f"{name}-{i}.txt").write_text(f"{name} number {i}")
    return folder


def make_index(place, pictures, model=None):
    """An index of a folder by the model that knows colours."""
    with Index.create(place) as index:
        index.update([pictures], UpdateOptions(model=model or ColourModel()))
    return place


def open_index(place, model=None):
    index = Index.open(place)
    index.set_encoder(model or ColourModel())
    return index
