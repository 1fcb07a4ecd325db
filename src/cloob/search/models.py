"""The models of an index: which one a name means, its encoder, loaded once, and what an
index may name.

What stands in an index alone (an address, a command, a model) is not fetched: it may be
somebody else's. What was typed on this machine is noted apart from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from cloob.cache import cache_root
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import split_checkpoint, with_checkpoint
from cloob.models.source import ModelSource
from cloob.search.query import Embedder, TorchEmbedder
from cloob.search.records import IndexedModel, Name
from cloob.search.store import Store

if TYPE_CHECKING:  # torch is imported where it is needed
    import torch

    from cloob.models.encoder import DualEncoder
    from cloob.models.onnx import PlainEncoder
    from cloob.models.text_graph import TextGraph


class Models:
    """The models of a store, for several threads; ``None`` is the default one."""

    def __init__(self, store: Store, default: str | None = None) -> None:
        self.store, self._default = store, default
        self._encoders: dict[
            str, DualEncoder
        ] = {}  # by fingerprint, as a name may come to stand for other weights
        self._plain: dict[str, PlainEncoder | TextGraph | None] = {}  # likewise
        self._loading = threading.RLock()
        # typed by its name, by what it is loaded from, or by another checkpoint of its
        # run
        if default is not None:
            spec = absolute(default)
            run = spec if split_checkpoint(default)[1] else split_checkpoint(spec)[0]
            ranked = sorted(
                store.models(),
                key=lambda model: (model.name != default, model.spec != spec),
            )
            named = [
                m
                for m in ranked
                if default == m.name
                or spec == m.spec
                or split_checkpoint(m.spec)[0] == run
            ]
            self._default = store.model(named[0] if named else default).name
            if named and named[0].spec == spec:
                remember(spec)

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
        self._encoders[model.fingerprint], self._plain[model.fingerprint] = (
            encoder,
            None,
        )

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
        from cloob.models.onnx import PlainEncoder  # where something is embedded
        from cloob.models.text_graph import open_text_graph

        model = self.model(name)

        def loaded() -> TorchEmbedder:
            return TorchEmbedder(self.encoder(model, device))

        with self._loading:
            if model.fingerprint not in (*self._encoders, *self._plain):
                plain: PlainEncoder | TextGraph | None
                plain = PlainEncoder.open(model.spec)
                if plain is not None:
                    model.check(plain.fingerprint, self.store.address)
                elif model.precision == "fp32":
                    plain = open_text_graph(
                        model.spec,
                        model.fingerprint,
                        lambda images: loaded().pictures(images),
                    )
                self._plain[model.fingerprint] = plain
            return self._plain.get(model.fingerprint) or loaded()

    def close(self) -> None:
        """Closes the database and forgets the models."""
        self.store.close()
        self._encoders.clear()
        self._plain.clear()


def keep_graph(model: IndexedModel, encoder: DualEncoder) -> None:
    """Writes the graph of a loaded model's text tower, for later searches."""
    from cloob.models.text_graph import keep_text_graph

    if model.precision != "fp32":
        return
    with contextlib.suppress(InputError):  # the model is no longer where it was
        texts = TorchEmbedder(encoder).texts
        keep_text_graph(model.spec, model.fingerprint, encoder, texts)


def remember(typed: str) -> None:
    """Notes that an address, a pattern or a model was typed; where the cache cannot be
    written, it is typed again.
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
    there = Path(split_checkpoint(str(path))[0]).exists()
    return f"{spec[: len(spec) - len(local)]}{path.absolute()}" if there else spec


def load_named(spec: str, device: str | torch.device) -> tuple[DualEncoder, str]:
    """Loads what an index names as its model; nothing is fetched for it but what a
    fixed list names or was typed.
    """
    from cloob.models.importing import closed_hub
    from cloob.models.load import load_with_fingerprint  # torch

    advice = (
        "the index alone asks for it, so it is not fetched; if you trust it, type it"
        f" once: --model {spec}"
    )
    is_open = was_typed(spec) or ModelSource.parse(spec).is_public
    with contextlib.nullcontext() if is_open else closed_hub(advice):
        return load_with_fingerprint(spec, device)


def _note(typed: str) -> Path:
    return (
        cache_root()
        / "addresses"
        / hashlib.sha256(typed.encode("utf-8", "surrogatepass")).hexdigest()
    )
