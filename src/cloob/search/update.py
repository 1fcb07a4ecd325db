"""What ``Index.update`` does: which sources, and which model. torch is imported where
something has to be embedded.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.errors import InputError
from cloob.machine import decoders
from cloob.models.runs import split_checkpoint
from cloob.search.models import LoadedModel, absolute, load_named, remember
from cloob.search.plan import Summary, make_plan
from cloob.search.records import IndexedModel, Progress
from cloob.search.scan.collection import Collection, ScanOptions
from cloob.search.scan.open import open_collection, source_name
from cloob.search.store import Store

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder


@dataclass(frozen=True)
class UpdateOptions:
    # as `load_model` takes it, or loaded; None: that of the index
    model: str | Path | DualEncoder | None = None
    device: str | torch.device = "auto"
    scan: ScanOptions = field(default_factory=ScanOptions)  # how sources are read
    batch_size: int = 64  # pictures of a forward pass, and of a transaction
    workers: int = field(default_factory=decoders)  # threads that read and decode
    # all items of a source may go if nothing of it is there any more
    remove_all: bool = False


def update(
    loaded: LoadedModel,
    sources: Sequence[str | Path],
    options: UpdateOptions,
    progress: Progress,
) -> Summary:
    """Brings the index up to date with its sources: reads what is new or changed,
    removes what is gone.
    """
    store = loaded.store
    collections = open_all(store, sources, options.scan)
    done = Summary()
    plans = [
        make_plan(store, item, done, remove_all=options.remove_all)
        for item in collections
    ]
    tasks = [task for plan in plans for task in plan.tasks]
    start = time.monotonic()
    if tasks or store.stored_model() is not None:
        model, encoder = choose_model(loaded, options)
    if tasks:
        from cloob.search.build import Builder  # torch

        builder = Builder(store, model, encoder, done, options.batch_size)
        builder.run(tasks, options.workers, progress)
    for item, plan in zip(collections, plans, strict=True):
        store.remove(item.name, [state.path for state in plan.gone])
        done.removed += sum(state.id is not None for state in plan.gone)
    store.note_unnamed()
    done.seconds = time.monotonic() - start
    return done


def open_all(
    store: Store, sources: Sequence[str | Path], options: ScanOptions
) -> list[Collection]:
    """Opens sources; one that the index knows and that is gone is an empty one."""
    indexed_sources = store.sources()
    names = named_sources(sources or indexed_sources, indexed_sources)
    check_apart(names, indexed_sources)
    collections: list[Collection] = []
    for name in names:
        if name in indexed_sources and not os.path.lexists(name):
            collections.append(Collection(name))
        else:
            collections.append(open_collection(name, options))
    return collections


def named_sources(
    sources: Iterable[str | Path], indexed_sources: Sequence[str]
) -> list[str]:
    """What the index calls sources: a known one by the name that it has there, whatever
    link leads to it.
    """
    real = {os.path.realpath(name): name for name in indexed_sources}
    names: dict[str, None] = {}
    for source in sources:
        name = source_name(source)
        if name not in indexed_sources:
            name = real.get(os.path.realpath(name), name)
        names[name] = None
    return list(names)


def check_apart(names: Sequence[str], indexed_sources: Sequence[str]) -> None:
    """Refuses a new source inside another one, or around it: its pictures would be in
    the index twice.
    """
    places = {name: Path(name).resolve() for name in (*indexed_sources, *names)}
    for name in set(names).difference(indexed_sources):
        for other in places.keys() - {name}:
            inner, outer = sorted((places[name], places[other]), key=str)[::-1]
            if inner.is_relative_to(outer):
                raise InputError(
                    f"{name}: lies in {other} or holds it, which is a source of this"
                    " index"
                )


def choose_model(
    loaded: LoadedModel, options: UpdateOptions
) -> tuple[IndexedModel, Callable[[], DualEncoder]]:
    """The model of an update, and what loads it; refused where the index has another
    one.
    """
    store, requested = loaded.store, options.model
    stored = store.stored_model()
    spec = None
    if isinstance(requested, str | Path):
        spec = absolute(str(requested))
        remember(spec)
    if stored and (requested is None or spec == stored.spec):
        return stored, lambda: loaded.encoder(options.device)
    if requested is None:
        raise InputError(f"{store.address}: is empty; --model chooses one")
    model, encoder = load_new(loaded, requested, spec, options.device)
    if stored and spec:
        store.move_model(spec)
    return stored or model, lambda: encoder


def load_new(
    loaded: LoadedModel,
    requested: str | Path | DualEncoder,
    spec: str | None,
    device: str | torch.device,
) -> tuple[IndexedModel, DualEncoder]:
    """Loads a model that the index does not have, or has by another place."""
    if isinstance(requested, str | Path):
        encoder, weights = load_named(str(spec), device)
        name = short_name(str(requested))
    else:
        from cloob.models.load import fingerprint  # torch

        encoder, weights = requested, fingerprint(requested)
        name = short_name(encoder.name)
    _ = encoder.preprocess  # refused by a model of vectors
    width = getattr(encoder, "embed_dim", None) or encoder.encode_text(["a"]).shape[1]
    inv_tau = inverse_temperature(encoder)
    model = IndexedModel(name, spec or encoder.name, weights, width, inv_tau)
    loaded.keep(model, encoder, weights)
    return model, encoder


def short_name(typed: str) -> str:
    """What an index calls a model that is typed so."""
    spec = typed
    if typed.startswith(("hf-hub:", "local-dir:")):
        spec = typed.partition(":")[2]
    return Path(spec).name if Path(split_checkpoint(spec)[0]).exists() else spec


def inverse_temperature(encoder: Any) -> float | None:
    """τ⁻¹ of the model's objective, else of its weights; None where neither has it."""
    stated = getattr(encoder, "objective_config", {}).get("inv_tau")
    if stated:
        return float(stated)
    logarithm = getattr(getattr(encoder, "model", None), "logit_scale", None)
    return None if logarithm is None else math.exp(float(logarithm.detach()))
