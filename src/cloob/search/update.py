"""What ``Index.update`` does: which sources, and which model. torch is imported where
something has to be embedded.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloob.errors import InputError
from cloob.machine import decoders
from cloob.models.runs import split_checkpoint
from cloob.search.models import Models, absolute, load_named
from cloob.search.plan import Plan, Summary, make_plan
from cloob.search.records import IndexedModel, Progress
from cloob.search.scan.collection import Collection, ScanOptions
from cloob.search.scan.open import open_collection, source_name
from cloob.search.store import Store

if TYPE_CHECKING:
    import torch

    from cloob.models.encoder import DualEncoder


@dataclass(frozen=True)
class UpdateOptions:
    # as `load_model` takes it, or loaded; None: the index's only one
    model: str | Path | DualEncoder | None = None
    # what the index calls the model; None: its file name or tag
    name: str | None = None
    # vectors of a model of this name may go if its weights differ now
    replace_model: bool = False
    device: str | torch.device = "auto"
    scan: ScanOptions = field(default_factory=ScanOptions)  # how sources are read
    batch_size: int = 64  # pictures of a forward pass, and of a transaction
    workers: int = field(default_factory=decoders)  # threads that read and decode
    # all items of a source may go if nothing of it is there any more
    remove_all: bool = False


def update(
    store: Store,
    models: Models,
    sources: Sequence[str | Path],
    options: UpdateOptions,
    progress: Progress,
) -> Summary:
    """Brings the index up to date with its sources: reads what is new or changed,
    removes what is gone.
    """
    collections = open_all(store, sources, options.scan)
    model, is_new = choose_model(store, models, options)
    done = Summary()
    plans = [
        make_plan(store, item, model.number, done, remove_all=options.remove_all)
        for item in collections
    ]
    start = time.monotonic()
    read(store, models, model, plans, done, options, progress)
    for item, plan in zip(collections, plans, strict=True):
        store.remove(item.name, [state.path for state in plan.gone])
        done.removed += sum(state.id is not None for state in plan.gone)
    if is_new and not done.added + done.changed + done.completed:
        store.remove_model(model)
    store.note_unnamed()
    done.seconds = time.monotonic() - start
    return done


def read(
    store: Store,
    models: Models,
    model: IndexedModel,
    plans: Sequence[Plan],
    done: Summary,
    options: UpdateOptions,
    progress: Progress,
) -> None:
    """Reads what the plans name; the model is loaded where a picture needs it."""
    tasks = [task for plan in plans for task in plan.tasks]
    if not tasks:
        return
    from cloob.search.build import Builder  # torch

    encoder = cache(lambda: models.encoder(model, options.device))
    builder = Builder(store, model, encoder, done, options.batch_size)
    builder.run(tasks, options.workers, progress)


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
    store: Store, models: Models, options: UpdateOptions
) -> tuple[IndexedModel, bool]:
    """The model of an update, loaded unless it goes on as it is; and whether the index
    did not have it.
    """
    requested, name = options.model, options.name
    if requested is None:
        old = existing_model(store, options.name)
        if not options.replace_model:
            return old, False
        requested, name = old.spec, old.name
    if isinstance(requested, str | Path):
        spec = absolute(str(requested))
        encoder, weights = load_named(
            spec, options.device, is_typed=options.model is not None
        )
    else:
        from cloob.models.load import fingerprint  # torch

        spec, encoder = requested.name, requested
        weights = fingerprint(encoder)
    _ = encoder.preprocess  # refused by a model of vectors
    same = [model.name for model in store.models() if model.fingerprint == weights]
    name = name or short_name(str(getattr(requested, "name", requested)))
    if same and name not in same:
        name = same[0]
    width = getattr(encoder, "embed_dim", None) or encoder.encode_text(["a"]).shape[1]
    new = IndexedModel(name, spec, weights, width, inv_tau=inverse_temperature(encoder))
    model = store.add_model(new, replace=options.replace_model)
    models.use(model, encoder, weights)
    return model, not same


def existing_model(store: Store, name: str | None) -> IndexedModel:
    """The only model of an index, or the one of a name."""
    existing = store.models()
    named = [model for model in existing if name in (None, model.name)]
    if len(named) == 1:
        return named[0]
    if not existing:
        raise InputError(f"{store.address}: is empty; --model chooses one")
    names = ", ".join(model.name for model in existing)
    raise InputError(f"{store.address}: has vectors of {names}; --name chooses one")


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
