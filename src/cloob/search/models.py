"""The models of an index: which one a name means, its encoder, loaded once, and what an
index may name.

A model that stands in an index alone is not fetched: it may be somebody else's. What
was typed on this machine is noted apart from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import ModelSource
from cloob.search.query import Embedder, Term, TorchEmbedder, Vector, picture_of
from cloob.search.records import IndexedModel, Name
from cloob.search.store import Store

if TYPE_CHECKING:  # torch is imported where it is needed
    import torch

    from cloob.models.encoder import DualEncoder
    from cloob.models.onnx import PlainEncoder
    from cloob.models.text_graph import TextGraph


_MOST_ROWS = 4096  # of words and of pictures that were asked for


class Models:
    """The models of a store, for several threads; ``None`` is the default one."""

    def __init__(self, store: Store, default: str | None = None) -> None:
        self.store = store
        self._default = None if default is None else self._named(default)
        # by fingerprint, as a name may come to stand for other weights
        self._encoders: dict[str, DualEncoder] = {}
        self._embedders: dict[str, Embedder] = {}
        self._loading = threading.RLock()
        self._cached_row = lru_cache(_MOST_ROWS)(self._embed)

    def _named(self, typed: str) -> str:
        """The name of the model that is typed by it, by what it is loaded from, or by
        another checkpoint of its run.
        """
        spec = absolute(typed)
        run = spec if split_checkpoint(typed)[1] else split_checkpoint(spec)[0]
        models = self.store.models()[::-1]  # of several, the first is meant
        by_spec = {model.spec: model.name for model in models}
        by_run = {split_checkpoint(model.spec)[0]: model.name for model in models}
        if typed in (model.name for model in models):
            return typed
        if spec in by_spec:
            remember(spec)
        return by_spec.get(spec) or by_run.get(run) or self.store.model(typed).name

    def model(self, name: Name = None) -> IndexedModel:
        """A model by its name; the default one for None."""
        return self.store.model(name or self._default)

    def use(self, name: Name, encoder: DualEncoder, weights: str | None = None) -> None:
        """Hands in a loaded model for :meth:`encoder`, and the fingerprint of its
        weights if that is known.
        """
        from cloob.models.load import fingerprint  # torch

        model = self.model(name)
        model.check(weights or fingerprint(encoder), self.store.address)
        keep_graph(model, encoder)
        self._encoders[model.fingerprint] = encoder
        self._embedders[model.fingerprint] = TorchEmbedder(encoder)

    def encoder(
        self, name: Name = None, device: str | torch.device = "auto"
    ) -> DualEncoder:
        """A model, loaded once, and again if its name stands for other weights by
        now.
        """
        model = self.model(name)
        with self._loading:  # one at a time
            if model.fingerprint not in self._encoders:
                self.use(model, *load_named(model.spec, device))
            return self._encoders[model.fingerprint]

    def embedder(self, name: Name = None, device: str = "auto") -> Embedder:
        """What embeds queries: :meth:`encoder`, or the graphs of an ONNX folder without
        torch.
        """
        model = self.model(name)
        with self._loading:
            if model.fingerprint not in self._embedders:
                plain = self._without_torch(model, device)
                embedder = plain or TorchEmbedder(self.encoder(model, device))
                self._embedders[model.fingerprint] = embedder
            return self._embedders[model.fingerprint]

    def _without_torch(
        self, model: IndexedModel, device: str
    ) -> PlainEncoder | TextGraph | None:
        """What embeds queries of a model without torch: its graphs, or the text graph
        that was written; None where neither is there.
        """
        from cloob.models.onnx import PlainEncoder  # where something is embedded
        from cloob.models.text_graph import open_text_graph

        plain = PlainEncoder.open(model.spec)
        if plain is not None:
            model.check(plain.fingerprint, self.store.address)
            return plain
        return open_text_graph(
            model.spec,
            model.fingerprint,
            lambda images: TorchEmbedder(self.encoder(model, device)).pictures(images),
        )

    def row(self, model: IndexedModel, term: Term) -> Vector:
        """The unit row (D,) of a term that is embedded; the last are remembered."""
        with self._loading:  # one at a time: each has a team of threads
            if isinstance(term.what, str | bytes):
                return self._cached_row(model, dataclasses.replace(term, weight=1.0))
            return self._embed(model, term)

    def _embed(self, model: IndexedModel, term: Term) -> Vector:
        embedder = self.embedder(model)
        if term.kind == "words":
            rows = embedder.texts([str(term.what)])
        else:
            rows = embedder.pictures([picture_of(term)])
        return np.asarray(rows[0], np.float32)

    def close(self) -> None:
        """Closes the database and forgets the models."""
        self.store.close()
        self._encoders.clear()
        self._embedders.clear()
        self._cached_row.cache_clear()


def keep_graph(model: IndexedModel, encoder: DualEncoder) -> None:
    """Writes the graph of a loaded model's text tower, for later searches."""
    from cloob.models.text_graph import keep_text_graph

    with contextlib.suppress(InputError):  # the model is no longer where it was
        texts = TorchEmbedder(encoder).texts
        keep_text_graph(model.spec, model.fingerprint, encoder, texts)


def remember(typed: str) -> None:
    """Notes that a model was typed; where the cache cannot be written, it is typed
    again.
    """
    with contextlib.suppress(InputError):
        write_whole(_note(typed), "")


def was_typed(named: str) -> bool:
    return _note(named).exists()


def absolute(spec: str) -> str:
    """A path that is found from anywhere, of a run with the checkpoint that it stands
    for; other names as they are.
    """
    spec = with_checkpoint(spec)
    local = spec.removeprefix("local-dir:")
    path = Path(local).expanduser()
    exists = Path(split_checkpoint(str(path))[0]).exists()
    return f"{spec[: len(spec) - len(local)]}{path.absolute()}" if exists else spec


def load_named(
    spec: str, device: str | torch.device, *, is_typed: bool = False
) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model; nothing is fetched for it but what a
    fixed list names, or is typed now or was before.
    """
    from cloob.models.importing import closed_hub
    from cloob.models.load import fingerprint, load_model  # torch

    advice = (
        "the index alone asks for it, so it is not fetched; if you trust it, type it"
        f" once: --model {spec}"
    )
    if is_typed:
        remember(spec)
    is_open = is_typed or was_typed(spec) or ModelSource.parse(spec).is_public
    with contextlib.nullcontext() if is_open else closed_hub(advice):
        encoder = load_model(spec, device=device)
    return encoder, fingerprint(encoder)


def _note(typed: str) -> Path:
    return (
        cache_root()
        / "addresses"
        / hashlib.sha256(typed.encode("utf-8", "surrogatepass")).hexdigest()
    )
