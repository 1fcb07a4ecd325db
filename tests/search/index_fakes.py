"""A model that costs nothing, and folders of pictures for the tests of indices."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from cloob.search.records import Item
from cloob.search.update import UpdateOptions
from make import noise_image

SIDE = 8


class FakeEncoder(nn.Module):
    """Pixels through one random matrix; the same seed gives the same weights."""

    weights_file = tokenizer = model = None
    device = torch.device("cpu")

    def __init__(self, name="fake", seed=0, dim=16):
        super().__init__()
        self.name = name
        self.objective_config = {}
        self.embed_dim = dim
        weight = torch.randn(
            dim, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(seed)
        )
        self.register_buffer("weight", weight)
        self.seed = seed
        self.seen = 0

    def copy(self):
        return FakeEncoder(self.name, self.seed, self.embed_dim)

    def rows(self, images):
        return self.encode_image(
            torch.stack([self.preprocess(image) for image in images])
        ).numpy()

    def preprocess(self, image, /):
        return torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1)

    def encode_image(self, images, /):
        self.seen += len(images)
        return normalize((images.flatten(1).float() / 255 - 0.4) @ self.weight.T, dim=1)

    def encode_text(self, texts, /):
        rows = [
            torch.randn(
                self.embed_dim, generator=torch.Generator().manual_seed(len(text))
            )
            for text in texts
        ]
        return normalize(torch.stack(rows), dim=1)


class Stopping(FakeEncoder):
    """Calls ``stop`` after so many pictures, or raises it."""

    def __init__(self, pictures, stop, **how):
        super().__init__(**how)
        self.pictures = pictures
        self.stop = stop

    def encode_image(self, images, /):
        if self.seen >= self.pictures:
            if isinstance(self.stop, BaseException):
                raise self.stop
            self.stop()
        return super().encode_image(images)


def units(n, dim=8, seed=0):
    """Random unit rows."""
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def item(path, content=None, **more):
    content = f"of {path}" if content is None else content
    return replace(Item(0, "/src", f"/src/{path}", content, 3, 5, 7, 9), **more)


def write(store, items, model, rows):
    """Writes items of different contents, each with a row."""
    contents = [each.content for each in items]
    store.write(items, model, dict(zip(contents, rows, strict=True)))


def options(encoder, **how):
    return UpdateOptions(**{"model": encoder, "workers": 0, "batch_size": 4} | how)


def write_noise(path, seed, **saving):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(seed).save(path, **saving)
    return path


def content(index):
    """What an index says by path, vectors rounded: a batch of another size rounds
    differently.
    """
    items = index.items(index.store.ids())
    if not items:
        return {}
    rows = np.round(index.store.vectors([item.id for item in items]), 4)
    return {
        item.path: (item.content, item.mtime_ns, item.width, item.caption, row.tolist())
        for item, row in zip(items, rows, strict=True)
    }


def faults(index):
    known = (
        state
        for source in index.store.sources()
        for state in index.store.states(source)
    )
    return {state.path: state.fault for state in known if state.fault is not None}
