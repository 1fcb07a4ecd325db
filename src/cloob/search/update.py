"""What ``Index.update`` does: which sources, and which model. torch is imported where
something has to be embedded.
"""

from __future__ import annotations

import dataclasses
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
from cloob.search.models import Models, absolute, load_named, remember
from cloob.search.plan import Plan, Summary, make_plan
from cloob.search.records import IndexedModel, Progress
from cloob.search.scan.collection import Collection, Gone, ScanOptions
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
    # larger pictures are left out; None: above the limits of `cloob.pictures`
    max_megapixels: float | None = None
    # all items of a source may go if nothing of it is there any more
    remove_all: bool = False


@dataclass(frozen=True)
class ChosenModel:
    model: IndexedModel  # as the index has it
    is_new: bool


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
    collections = open_all(store, sources, options)
    chosen = choose_model(store, models, options)
    model = chosen.model
    done = Summary()
    plans = make_plans(store, collections, model, done, options)
    start = time.monotonic()
    build(store, models, model, plans, done, options, progress)
    for collection, plan in zip(collections, plans, strict=True):
        store.remove(collection.name, [state.path for state in plan.gone])
        done.removed += sum(state.id is not None for state in plan.gone)
    if chosen.is_new and not done.added + done.changed + done.completed:
        store.remove_model(model)
    store.note_unnamed()
    done.seconds = time.monotonic() - start
    return done


def make_plans(
    store: Store,
    collections: Sequence[Collection],
    model: IndexedModel,
    done: Summary,
    options: UpdateOptions,
) -> list[Plan]:
    """What is to be done for every source."""
    plans = [
        make_plan(store, item, model.number, done, remove_all=options.remove_all)
        for item in collections
    ]
    if options.scan.exclude:
        for item in collections:
            store.set_exclude(item.name, list(filter(None, options.scan.exclude)))
    return plans


def build(
    store: Store,
    models: Models,
    model: IndexedModel,
    plans: Sequence[Plan],
    done: Summary,
    options: UpdateOptions,
    progress: Progress,
) -> None:
    """Reads what the plans name; the model is loaded where one needs it."""
    tasks = [task for plan in plans for task in plan.tasks]
    if not tasks:
        return
    from cloob.search.build import Builder  # torch

    max_pixels = None
    if options.max_megapixels is not None:
        max_pixels = max(1, int(options.max_megapixels * 1e6))
    encoder = cache(lambda: models.encoder(model, options.device))
    builder = Builder(store, model, encoder, done, options.batch_size, max_pixels)
    builder.run(tasks, options.workers, progress)


def open_all(
    store: Store, sources: Sequence[str | Path], options: UpdateOptions
) -> list[Collection]:
    """Opens sources; one that the index knows and that is gone is an empty one."""
    indexed_sources = store.sources()
    excludes = store.excludes()
    names = named_sources(sources or indexed_sources, indexed_sources)
    check_apart(names, indexed_sources)
    collections: list[Collection] = []
    for name in names:
        exclude = options.scan.exclude or excludes.get(name, ())
        scan = dataclasses.replace(options.scan, exclude=exclude)
        if name in indexed_sources and not os.path.lexists(name):
            collections.append(Gone(name))
        else:
            collections.append(open_collection(name, scan))
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
    real = {
        name: f"{os.path.realpath(name)}{os.sep}" for name in (*indexed_sources, *names)
    }
    for name in set(names).difference(indexed_sources):
        for other in real.keys() - {name}:
            if real[name].startswith(real[other]) or real[other].startswith(real[name]):
                raise InputError(
                    f"{name}: lies in {other} or holds it, which is a source of this"
                    " index"
                )


def choose_model(store: Store, models: Models, options: UpdateOptions) -> ChosenModel:
    """The model of an update, which the index has then; loaded unless it goes on as it
    is.
    """
    requested = options.model
    if requested is None:
        old = existing_model(store, options.name)
        if not options.replace_model:
            return ChosenModel(old, is_new=False)
        name, spec = old.name, old.spec
        encoder, weights = load_named(spec, options.device)
    elif isinstance(requested, str | Path):
        from cloob.models.load import load_with_fingerprint  # torch

        name = options.name or short_name(str(requested))
        spec = absolute(str(requested))
        remember(spec)
        encoder, weights = load_with_fingerprint(spec, options.device)
    else:
        from cloob.models.load import fingerprint  # torch

        name = spec = options.name or requested.name
        encoder, weights = requested, fingerprint(requested)
    _ = encoder.preprocess  # refused by a model of vectors
    width = getattr(encoder, "embed_dim", None) or encoder.encode_text(["a"]).shape[1]
    inv_tau = inverse_temperature(encoder)
    new = IndexedModel(name, spec, weights, width, inv_tau=inv_tau)
    chosen = add_model(store, new, replace=options.replace_model)
    models.use(chosen.model, encoder, weights)
    return chosen


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


def add_model(store: Store, new: IndexedModel, *, replace: bool) -> ChosenModel:
    """Adds a model, or finds the one of the same weights, that of this name first."""
    same = [model for model in store.models() if model.fingerprint == new.fingerprint]
    same.sort(key=lambda model: model.name != new.name)
    if same:
        new = dataclasses.replace(new, name=same[0].name)
    return ChosenModel(store.add_model(new, replace=replace), is_new=not same)


def inverse_temperature(encoder: Any) -> float | None:
    """τ⁻¹ of the model's objective, else of its weights; None where neither has it."""
    stated = getattr(encoder, "objective_config", {}).get("inv_tau")
    if stated:
        return float(stated)
    logarithm = getattr(getattr(encoder, "model", None), "logit_scale", None)
    return None if logarithm is None else math.exp(float(logarithm.detach()))
