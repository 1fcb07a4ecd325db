"""An index in memory, with answers by plain loops: what the server is tested against, and its oracle."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from cloob.errors import InputError
from cloob.search.records import Hit, IndexedModel, Item, Results
from cloob.search.store import Ids, Vectors

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 20),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}


class ColourEncoder:
    """Pictures by their mean colour, texts by the colours that they name; counts its forward passes."""

    def __init__(self, dim: int = 6) -> None:
        self.dim = dim
        self.calls: list[int] = []
        mixer = np.random.default_rng(0).normal(size=(4, dim))
        self._mixer = np.linalg.qr(mixer.T)[0].T.astype(np.float32)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(images))
        return self._embed(images.float().mean((2, 3)))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        self.calls.append(len(texts))
        rows = []
        for text in texts:
            named = [COLOURS[word] for word in text.lower().split() if word in COLOURS]
            grey = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 + 80
            rows.append(np.mean(named or [(grey, grey, grey)], axis=0))
        return self._embed(torch.tensor(np.array(rows), dtype=torch.float32))

    def _embed(self, colours: torch.Tensor) -> torch.Tensor:
        row = torch.cat([colours / 127.5 - 1, torch.full((len(colours), 1), 0.3)], 1) @ torch.from_numpy(self._mixer)
        return torch.nn.functional.normalize(row, dim=1)


@dataclass
class FakeIndex:
    """The methods of ``cloob.Index`` that the server calls."""

    files: dict[int, tuple[Item, bytes]]
    encoders: dict[str, Any]
    now: int = 1

    def __post_init__(self) -> None:
        self.rows: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.encoders}
        for id_ in self.files:
            self._embed(id_)
        self.store = SimpleNamespace(vectors=self._vectors)

    def _embed(self, id_: int) -> None:
        for name, encoder in self.encoders.items():
            image = Image.open(io.BytesIO(self.files[id_][1])).convert("RGB")
            self.rows[name][id_] = encoder.encode_image(encoder.preprocess(image)[None])[0].numpy()

    def add(self, id_: int, item: Item, data: bytes) -> None:
        self.files[id_] = (item, data)
        self._embed(id_)
        self.now += 1

    def __len__(self) -> int:
        return len(self.files)

    def close(self) -> None:
        pass

    def revision(self) -> int:
        return self.now

    @property
    def models(self) -> tuple[IndexedModel, ...]:
        return tuple(IndexedModel(name, name, name, encoder.dim) for name, encoder in self.encoders.items())

    def model(self, name: str | None = None) -> IndexedModel:
        for model in self.models:
            if name in (None, model.name):
                return model
        raise InputError(f"no model {name!r}")

    def encoder(self, name: str | None = None) -> Any:
        return self.encoders[self.model(name).name]

    def columns(self) -> dict[str, str]:
        return {"id": "number", "name": "text", "caption": "text", "date": "date", "width": "number"}

    def items(self, ids: Sequence[int]) -> list[Item]:
        return [self.files[id_][0] for id_ in ids if id_ in self.files]

    def picture(self, id_: int) -> bytes:
        return self.files[id_][1]

    def thumbnail(self, id_: int, size: int = 256) -> bytes:
        image = Image.open(io.BytesIO(self.files[id_][1])).convert("RGB")
        image.thumbnail((size, size))
        stream = io.BytesIO()
        image.save(stream, "JPEG")
        return stream.getvalue()

    def _where(self, where: str | None) -> Callable[[Item], bool]:
        """The one filter of the fake: ``caption like '%WORD%'``."""
        if where is None:
            return lambda item: True
        if not where.startswith("caption like '%"):
            raise InputError(f"filter: {where[:40]!r} is not understood")
        word = where.split("%")[1]
        return lambda item: word in (item.caption or "")

    def ids(self, where: str | None = None) -> Ids:
        fits = self._where(where)
        return np.array([id_ for id_, (item, _) in sorted(self.files.items()) if fits(item)], dtype=np.int64)

    def _vectors(self, model: str, ids: Sequence[int]) -> Vectors:
        lost = np.full(self.encoders[model].dim, np.nan, dtype=np.float32)
        return np.stack([self.rows[model].get(id_, lost) for id_ in ids])

    def search(
        self, query: Any, *, top: int = 20, where: str | None = None, model: str | None = None, cutoff: Any = 0.0
    ) -> Results:
        name = self.model(model).name
        scores = sorted((-float(self.rows[name][id_] @ query), id_) for id_ in self.ids(where).tolist())
        best = [(-score, id_) for score, id_ in scores[:top]]
        kept = [(score, id_) for score, id_ in best if cutoff is None or score > 0.5]
        hits = tuple(Hit(self.files[id_][0], score, score - 0.5) for score, id_ in kept)
        return Results(hits, len(scores), len(best) - len(kept), name)

    def similar(self, id_: int, *, top: int = 20, where: str | None = None, model: str | None = None) -> Results:
        found = self.search(self.rows[self.model(model).name][id_], top=top + 1, where=where, model=model, cutoff=None)
        hits = tuple(hit for hit in found.hits if hit.item.id != id_)[:top]
        return Results(hits, found.searched - 1, 0, found.model)

    def classify(
        self, labels: Any, *, templates: Any = None, multi: bool = False, none: bool = False, where: Any, model: Any
    ) -> Any:
        name = self.model(model).name
        ids = self.ids(where)
        texts = self.encoders[name].encode_text(list(labels)).numpy()
        logits = 30 * np.array([[row @ text for text in texts] for row in (self.rows[name][i] for i in ids.tolist())])
        logits = logits.reshape(len(ids), len(texts))
        weights = np.exp(logits - logits.max(1, keepdims=True, initial=-np.inf))
        probabilities = weights / weights.sum(1, keepdims=True)
        chosen = np.arange(len(labels)) == probabilities.argmax(1)[:, None]
        return SimpleNamespace(ids=ids, labels=tuple(labels), probabilities=probabilities, chosen=chosen)

    def explain(self, query: Any, *, beta: float | None = None, top: int = 12, model: str | None = None) -> Any:
        name = self.model(model).name
        beta = 8.0 if beta is None else beta
        ids = self.ids().tolist()
        raw = np.array([np.exp(beta * float(self.rows[name][id_] @ query)) for id_ in ids])
        weights = raw / raw.sum()
        order = np.argsort(-weights, kind="stable")[:top]
        memories = [SimpleNamespace(item=self.files[ids[i]][0], weight=float(weights[i])) for i in order]
        effective = float(np.exp(-(weights * np.log(weights)).sum()))
        return SimpleNamespace(beta=beta, memories=memories, effective=effective)

    def map(
        self, sample: int = 5000, method: str = "pca", where: str | None = None, model: str | None = None
    ) -> tuple[Ids, np.ndarray]:
        name = self.model(model).name
        ids = self.ids(where)[:sample]
        rows = np.stack([self.rows[name][id_] for id_ in ids.tolist()])
        centred = rows - rows.mean(0)
        points = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        low = points.min(0)
        return ids, (points - low) / np.maximum(points.max(0) - low, 1e-9)


def make_item(id_: int, data: bytes, caption: str, width: int, height: int) -> Item:
    return Item(
        id=id_,
        source="/photos",
        path=f"/photos/{caption.replace(' ', '-')}-{id_}.png",
        content=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        mtime_ns=1,
        width=width,
        height=height,
        date=f"20{10 + id_ % 15}-05-01T12:00:00",
        caption=caption,
    )


def colour_index(n: int = 60, models: Sequence[str] = ("one",)) -> FakeIndex:
    """n small pictures in six colours, each a little different."""
    files = {}
    for id_ in range(1, n + 1):
        name = list(COLOURS)[id_ % len(COLOURS)]
        shade = tuple(min(255, channel + id_ % 7) for channel in COLOURS[name])
        stream = io.BytesIO()
        Image.new("RGB", (24 + id_ % 5, 24), shade).save(stream, "PNG")
        data = stream.getvalue()
        files[id_] = (make_item(id_, data, f"a {name} square", 24 + id_ % 5, 24), data)
    return FakeIndex(files, {name: ColourEncoder(6 + i) for i, name in enumerate(models)})
