"""The model of an index: its encoder, loaded once, and what an index may name.

A model that stands in an index alone is not fetched: it may be somebody else's. What
was typed on this machine is noted apart from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import ModelSource
from cloob.search.query import Embedder, Term, TorchEmbedder, Vector, picture_of
from cloob.search.records import IndexedModel
from cloob.search.store import Store

if TYPE_CHECKING:  # torch is imported where it is needed
    import torch

    from cloob.models.encoder import DualEncoder

_MOST_ROWS = 4096  # of words and of uploads that were asked for


class IndexWithModel:
    """A store and its model, which is loaded when it is needed; for several threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.unrelated: dict[tuple[object, ...], Vector | None] = {}
        """Unrelated queries by their shape (:mod:`cloob.search.unrelated`)."""
        self._torch_embedder: TorchEmbedder | None = None
        self._embedder: Embedder | None = None
        self._loading = threading.RLock()
        self._rows: dict[str | bytes, Vector] = {}  # of words, and by digests of files

    def model(self) -> IndexedModel:
        """The model that the index has vectors of."""
        return self.store.model()

    def set_encoder(self, encoder: DualEncoder) -> None:
        """Takes the loaded model for later searches, in the place of loading it."""
        from cloob.models.load import fingerprint  # torch

        self._set_encoder(self.model(), encoder, fingerprint(encoder))

    def torch_embedder(self, device: str | torch.device = "auto") -> TorchEmbedder:
        """The model, loaded once."""
        with self._loading:  # one at a time
            if self._torch_embedder is None:
                model = self.model()
                return self._set_encoder(model, *load_named(model.spec, device))
            return self._torch_embedder

    def embedder(self, device: str = "auto") -> Embedder:
        """What embeds queries, without torch where that can be: the graphs of an ONNX
        folder, or the text graph that was written; else :meth:`torch_embedder`.
        """
        from cloob.models.onnx import PlainEncoder  # where something is embedded
        from cloob.models.text_graph import open_text_graph

        with self._loading:
            if self._embedder is None:
                model = self.model()
                plain = PlainEncoder.open(model.spec)
                if plain is not None:
                    self.store.check_weights(plain.fingerprint)
                self._embedder = plain or open_text_graph(
                    model.spec,
                    model.fingerprint,
                    lambda images: self.torch_embedder(device).pictures(images),
                )
            return self._embedder or self.torch_embedder(device)

    def is_loaded(self) -> bool:
        """Whether a query waits for no loading."""
        return self._embedder is not None

    def embed_term(self, term: Term) -> Vector:
        """The unit row (D,) of words or of a picture from elsewhere; those of words and
        of bytes are remembered.
        """
        key = term.what
        if isinstance(key, bytes):
            key = hashlib.sha256(key).digest()  # an upload may be forgotten
        with self._loading:  # one at a time: each has a team of threads
            if not isinstance(key, str | bytes):
                return self._embed(term)
            if key not in self._rows:
                if len(self._rows) >= _MOST_ROWS:
                    self._rows.clear()
                self._rows[key] = self._embed(term)
            return self._rows[key]

    def choose(
        self,
        requested: str | Path | DualEncoder | None,
        device: str | torch.device,
    ) -> tuple[IndexedModel, Callable[[], TorchEmbedder]]:
        """The model of an update, and what loads it; refused where the index has
        another one.
        """
        stored = self.store.stored_model()
        if requested is None:
            if stored is None:
                raise InputError(f"{self.store.address}: is empty; --model chooses one")
            return stored, lambda: self.torch_embedder(device)
        if not isinstance(requested, str | Path):
            from cloob.models.load import fingerprint  # torch

            name = requested.name
            return self._choose_loaded(requested, fingerprint(requested), name, name)
        spec = absolute_spec(str(requested))
        note_typed(spec)
        if stored is not None and spec == stored.spec:
            return stored, lambda: self.torch_embedder(device)
        encoder, weights = load_named(spec, device)
        name = short_name(str(requested))
        chosen = self._choose_loaded(encoder, weights, name, spec)
        if stored is not None:
            self.store.set_model_spec(spec)
        return chosen

    def _choose_loaded(
        self, encoder: DualEncoder, weights: str, name: str, spec: str
    ) -> tuple[IndexedModel, Callable[[], TorchEmbedder]]:
        """A loaded model as the one of an update."""
        _ = encoder.preprocess  # refused by a model of vectors
        inv_tau = inverse_temperature(encoder)
        model = IndexedModel(name, spec, weights, encoder.embed_dim, inv_tau)
        embedder = self._set_encoder(model, encoder, weights)
        return self.store.stored_model() or model, lambda: embedder

    def close(self) -> None:
        """Closes the database and forgets the model."""
        self.store.close()
        self._torch_embedder = self._embedder = None
        self._rows.clear()

    def _set_encoder(
        self, model: IndexedModel, encoder: DualEncoder, weights: str
    ) -> TorchEmbedder:
        """Keeps the loaded model, and writes the graph of its text tower for later
        searches; refuses other weights.
        """
        from cloob.models.text_graph import keep_text_graph

        self.store.check_weights(weights)
        embedder = TorchEmbedder(encoder)
        with contextlib.suppress(InputError):  # the model is no longer where it was
            keep_text_graph(model.spec, weights, encoder, embedder.texts)
        self._torch_embedder = self._embedder = embedder
        return embedder

    def _embed(self, term: Term) -> Vector:
        embedder = self.embedder()
        if isinstance(term.what, str):
            rows = embedder.texts([term.what])
        else:
            rows = embedder.pictures([picture_of(term)])
        return np.asarray(rows[0], np.float32)


def short_name(typed: str) -> str:
    """What an index calls a model that is typed so."""
    spec = typed
    if typed.startswith(("hf-hub:", "local-dir:")):
        spec = typed.partition(":")[2]
    return Path(spec).name if Path(split_checkpoint(spec)[0]).exists() else spec


def inverse_temperature(encoder: DualEncoder) -> float | None:
    """τ⁻¹ of the model's objective, else of its weights; None where neither has it."""
    stated = encoder.objective_config.get("inv_tau")
    if isinstance(stated, int | float):
        return float(stated)
    logarithm = getattr(encoder.model, "logit_scale", None)
    return None if logarithm is None else math.exp(float(logarithm.detach()))


def note_typed(typed: str) -> None:
    """Notes that a model was typed; where the cache cannot be written, it is typed
    again.
    """
    with contextlib.suppress(InputError):
        write_whole(_typed_note(typed), "")


def absolute_spec(typed: str) -> str:
    """What finds a typed model from any folder: its absolute path, of a run with the
    checkpoint that it stands for; other names as they are.
    """
    spec = with_checkpoint(typed)
    prefix = "local-dir:" if spec.startswith("local-dir:") else ""
    path = Path(spec.removeprefix(prefix)).expanduser()
    exists = Path(split_checkpoint(str(path))[0]).exists()
    return f"{prefix}{path.absolute()}" if exists else spec


def load_named(spec: str, device: str | torch.device) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model, and the fingerprint of its weights;
    nothing is fetched for it but what a fixed list names, or was typed here.
    """
    from cloob.models.importing import closed_hub
    from cloob.models.load import fingerprint, load_model  # torch

    advice = (
        "the index alone asks for it, so it is not fetched; if you trust it, type it"
        f" once: cloob index --out INDEX --model {spec}"
    )
    is_open = _typed_note(spec).exists() or ModelSource.parse(spec).is_public
    with contextlib.nullcontext() if is_open else closed_hub(advice):
        encoder = load_model(spec, device=device)
    return encoder, fingerprint(encoder)


def _typed_note(typed: str) -> Path:
    """The file that says that a model was typed on this machine."""
    digest = hashlib.sha256(typed.encode("utf-8", "surrogatepass")).hexdigest()
    return cache_root() / "addresses" / digest
