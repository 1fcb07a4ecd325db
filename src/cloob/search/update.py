"""What ``Index.update`` does: which sources, and which model; the work itself is in
``build``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from cloob.data.shards.spec import is_pattern, is_remote
from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.machine import decoders, warn_of_emulated_bfloat16
from cloob.models.encoder import DualEncoder
from cloob.models.load import fingerprint, load_with_fingerprint
from cloob.models.runs import split_checkpoint
from cloob.search.build import Builder, Summary, make_plan
from cloob.search.models import Models, absolute, load_named, remember
from cloob.search.records import IndexedModel, Precision, Progress
from cloob.search.scan.collection import Collection
from cloob.search.scan.open import (
    ScanOptions,
    is_gone,
    open_collection,
    open_named,
    source_name,
)
from cloob.search.store import SourceSettings, Store


@dataclass(frozen=True)
class UpdateOptions:
    model: str | Path | DualEncoder | None = (
        None  # as `load_model` takes it, or loaded; None: the index's only one
    )
    name: str | None = (
        None  # what the index calls the model; None: its file name or tag
    )
    # vectors of a model of this name may go if its weights or precision differ now
    replace_model: bool = False
    device: str | torch.device = "auto"
    precision: Precision | None = (
        None  # of the image tower; None: as the index has it, float32 in a new one
    )
    scan: ScanOptions = field(default_factory=ScanOptions)  # how sources are read
    batch_size: int = 64  # pictures of a forward pass, and of a transaction
    workers: int = field(default_factory=decoders)  # threads that read and decode
    max_megapixels: float | None = (
        None  # larger pictures are left out; None: above the limits of `cloob.pictures`
    )
    remove_all: bool = (
        False  # all items of a source may go if nothing of it is there any more
    )


def update(
    store: Store,
    models: Models,
    sources: Sequence[str | Path],
    options: UpdateOptions,
    progress: Progress,
) -> Summary:
    device = resolve_device(options.device)
    collections = _open_all(store, sources, options)
    model, is_new = _model(store, models, options, device, collections)
    if model.replaces is not None:  # which is finished when it has vectors of all
        others = {*store.sources()} - {item.name for item in collections}
        collections += _open_all(store, sorted(others), options) if others else []
    done = Summary()
    plans = [
        make_plan(store, item, model.number, done, remove_all=options.remove_all)
        for item in collections
    ]
    for name, why in done.refused.items() if model.replaces is not None else ():
        raise InputError(f"{name}: {why}")
    for item in collections if options.scan.exclude else ():
        store.set(item.name, SourceSettings(tuple(filter(None, options.scan.exclude))))
    start = time.monotonic()
    work = [item for some, _ in plans for item in some]
    if work and model.precision == "bf16" and device.type == "cpu":
        warn_of_emulated_bfloat16()
    most = (
        None
        if options.max_megapixels is None
        else max(1, int(options.max_megapixels * 1e6))
    )
    builder = Builder(
        store,
        model,
        cache(lambda: models.encoder(model, device)),
        done,
        options.batch_size,
        most,
    )
    builder.run(work, options.workers, progress)
    for item, (_, gone) in zip(
        collections, plans, strict=True
    ):  # nothing goes before its vectors were copied
        store.remove(item.name, [state.path for state in gone])
        done.removed += sum(state.id is not None for state in gone)
    if is_new and not done.added + done.changed + done.completed:
        store.remove_model(model)
    else:
        store.finish(model)
    store.table.optimise()
    done.seconds = time.monotonic() - start
    return done


def _open_all(
    store: Store, sources: Sequence[str | Path], options: UpdateOptions
) -> list[Collection]:
    """Opens sources; one that the index knows and that is gone is an empty one."""
    known, settings = store.sources(), store.settings()
    real = {os.path.realpath(name): name for name in known if os.path.isabs(name)}  # noqa: PTH117
    names = ((source_name(source), source) for source in sources or known)
    given = {
        name if name in known else real.get(os.path.realpath(name), name): source
        for name, source in names
    }
    _check_apart(given, known)
    collections: list[Collection] = []
    for name, source in given.items():
        before, gone = (
            settings.get(name, SourceSettings()),
            is_gone(name, typed=bool(sources)),
        )
        scan = replace(options.scan, exclude=options.scan.exclude or before.exclude)
        if name in known and gone:
            collections.append(
                Collection(name)
            )  # what is not there any more has no pictures
        elif sources:
            collections.append(open_collection(name if name in known else source, scan))
            if is_remote(name) or is_pattern(
                name
            ):  # a folder's too: where it is gone, it may be a pattern
                remember(name)
        else:
            collections.append(open_named(name, scan))
    return collections


def _check_apart(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses a source inside another one, or one by a second name: its pictures would
    be in the index twice.
    """
    names = [*names]
    real = {
        name: os.path.realpath(name) if os.path.isabs(name) else name  # noqa: PTH117
        for name in (*known, *names)
    }
    for name in [name for name in names if name not in known]:
        for other in [other for other in real if other != name]:
            here, there = f"{real[name]}{os.sep}", f"{real[other]}{os.sep}"
            if here.startswith(there) or there.startswith(here):
                raise InputError(
                    f"{name}: lies in {other} or holds it, which is a source of this"
                    " index"
                )


def _model(
    store: Store,
    models: Models,
    options: UpdateOptions,
    device: torch.device,
    collections: Sequence[Collection],
) -> tuple[IndexedModel, bool]:
    """The model of an update, which the index has then, and whether it is new; loaded
    unless it goes on as it is.
    """
    precision, requested = options.precision, options.model
    if requested is None:
        existing = store.models()
        named = [model for model in existing if options.name in (None, model.name)]
        if len(named) != 1:
            names = ", ".join(model.name for model in existing)
            why = (
                f"has vectors of {names}; --name chooses one"
                if names
                else "is empty; --model chooses one"
            )
            raise InputError(f"{store.address}: {why}")
        (old,) = named
        if not options.replace_model and precision in (None, old.precision):
            return old, False
        name, spec, precision = old.name, old.spec, precision or old.precision
        encoder, weights = load_named(spec, device)
    elif isinstance(requested, str | Path):
        typed = str(requested)
        spec = (
            typed.partition(":")[2]
            if typed.startswith(("hf-hub:", "local-dir:"))
            else typed
        )
        stem = Path(spec).name if Path(split_checkpoint(spec)[0]).exists() else spec
        name, spec = options.name or stem, absolute(typed)
        remember(spec)
        encoder, weights = load_with_fingerprint(spec, device)
    else:
        name = spec = options.name or requested.name
        encoder, weights = requested, fingerprint(requested)
    _ = encoder.preprocess  # refused by a model of vectors
    alike = [
        model for model in store.models(unfinished=True) if model.weights == weights
    ]
    alike.sort(key=lambda model: model.name != name)
    if precision is None:
        precision = (
            alike[0].precision if alike and not options.replace_model else "fp32"
        )
    width = getattr(encoder, "embed_dim", None) or encoder.encode_text(["a"]).shape[1]
    new = IndexedModel(name, spec, weights + "+bf16" * (precision == "bf16"), width)
    same = next(
        (model for model in alike if model.fingerprint == new.fingerprint), None
    )
    if same is not None and same.replaces is None:
        new = replace(new, name=same.name)
    for old in store.models() if not options.replace_model else ():
        if old.name == new.name and old.fingerprint != new.fingerprint:
            old.check("", store.address)  # it is another one, at least in precision
    model = store.add_model(new, replace=options.replace_model)
    models.use(model, encoder, weights)
    return model, same is None
