"""What ``Index.update`` does: which sources, which model, which rank; the work itself is in ``build``."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from cloob import distributed
from cloob.data.shards.spec import is_pattern, is_remote
from cloob.errors import InputError
from cloob.machine import decoders, in_threads, warn_of_emulated_bfloat16
from cloob.models.encoding import Encoder
from cloob.models.fingerprint import fingerprint, load_with_fingerprint
from cloob.models.runs import split_checkpoint
from cloob.search.build import Builder, Summary, Work, make_plan, remove_gone
from cloob.search.records import IndexedModel, Precision
from cloob.search.scan.collection import Collection, Gone
from cloob.search.scan.open import ScanOptions, is_gone, open_collection, open_named, source_name
from cloob.search.store import Store
from cloob.search.trust import absolute, load_named, remember


@dataclass(frozen=True)
class UpdateOptions:
    """How an index is brought up to date."""

    model: str | Path | Encoder | None = None  # what `load_model` takes, or a loaded one; None: the index's only one
    name: str | None = None  # what the index calls the model; None: its file name or tag
    replace_model: bool = False  # vectors of a model of this name may go if its weights or precision differ now
    device: str | torch.device = "auto"
    precision: Precision | None = None  # of the image tower; None: as the index has it, float32 in a new one
    scan: ScanOptions = field(default_factory=ScanOptions)  # how sources are read
    batch_size: int = 64  # pictures of a forward pass, and of a transaction
    workers: int = field(default_factory=decoders)  # threads that read and decode
    remove_all: bool = False  # all items of a source may go if nothing of it is there any more


def update(
    store: Store,
    sources: Sequence[str | Path],
    options: UpdateOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """See :meth:`cloob.search.index.Index.update`."""
    options = options or UpdateOptions()
    device = distributed.resolve_device(options.device)
    with distributed.process_group(device):
        first = distributed.rank() == 0
        collections = _open_all(store, sources, options)
        model = _Model(store, options, device, collections)
        indexed = model.indexed
        plans = [make_plan(store, each, indexed.name, remove_all=options.remove_all) for each in collections]
        _wait()  # nobody writes before all have compared
        for each in collections if first and options.scan.exclude else ():
            store.set_exclude(each.name, [glob for glob in options.scan.exclude if glob])
        start = time.monotonic()
        work = [each for plan in plans for each in plan.work if _is_mine(each)]
        if work and indexed.precision == "bf16" and device.type == "cpu":
            warn_of_emulated_bfloat16()
        size = options.batch_size
        builder = Builder(store, indexed, model.encoder, size)
        for count, prepared in enumerate(in_threads(builder.prepare, work, options.workers, 2 * size), 1):
            builder.add(prepared)
            if progress is not None:
                progress(count, len(work))
        builder.flush()
        done = builder.summary
        _wait()  # nothing goes before all have copied its vectors
        if first:
            for plan in plans:
                done.add(plan.summary)
                done.removed += remove_gone(store, plan)
            store.optimise()
        done = _together(done)
        done.seconds = time.monotonic() - start
        if first and model.is_new and not done.added + done.changed + done.completed:
            store.remove_model(indexed.name)
        return done


def _open_all(store: Store, sources: Sequence[str | Path], options: UpdateOptions) -> list[Collection]:
    """Opens sources; one that the index knows and that is gone is an empty one."""
    known = store.sources()
    given = {source_name(source): source for source in sources or known}
    if not given:
        raise InputError(f"{store.address}: is empty; name a source of pictures: cloob index SRC --model M --out IDX")
    check_apart(given, known)
    collections: list[Collection] = []
    for name, source in given.items():
        scan = options.scan if options.scan.exclude else replace(options.scan, exclude=store.exclude(name))
        if name in known and is_gone(name, typed=bool(sources)):
            collections.append(Gone(name))
        elif sources:
            collections.append(open_collection(source, scan))
            if is_remote(name) or is_pattern(name):  # a folder's too: where it is gone, it may be a pattern
                remember(name)
        else:
            collections.append(open_named(name, scan))
    return collections


def check_apart(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses a source inside another one, or one by a second name: its pictures would be in the index twice."""
    names = [*names]
    real = {name: os.path.realpath(name) if os.path.isabs(name) else name for name in (*known, *names)}  # noqa: PTH117
    for name in [name for name in names if name not in known]:
        for other in [other for other in real if other != name]:
            here, there = f"{real[name]}{os.sep}", f"{real[other]}{os.sep}"
            if here.startswith(there) or there.startswith(here):
                raise InputError(f"{name}: lies in {other} or holds it, which is a source of this index")


class _Model:
    """The model of an update: loaded at once if it was named, else when the first picture needs it."""

    def __init__(
        self, store: Store, options: UpdateOptions, device: torch.device, collections: Sequence[Collection]
    ) -> None:
        """Compares a model that was named, or is to be replaced, with those of the index, and adds it."""
        self._store, self._load, self._lock = store, partial(load_named, device=device), threading.Lock()
        self._encoder: Encoder | None = None
        self.is_new = False
        known, precision, wanted = store.models(), options.precision, options.model
        if wanted is None:
            self.indexed = self._only(known, options.name)
            if not options.replace_model and precision in (None, self.indexed.precision):
                return
            name, spec, precision = self.indexed.name, self.indexed.spec, precision or self.indexed.precision
            self._encoder, weights = self._load(spec)
        elif isinstance(wanted, str | Path):
            name, spec = options.name or default_name(str(wanted)), absolute(str(wanted))
            remember(spec)
            self._encoder, weights = load_with_fingerprint(spec, device)
        else:
            name = spec = options.name or wanted.name
            self._encoder, weights = wanted, fingerprint(wanted)
        alike = sorted((model for model in known if model.weights == weights), key=lambda model: model.name != name)
        if precision is None:
            precision = alike[0].precision if alike and not options.replace_model else "fp32"
        width = getattr(self._encoder, "embed_dim", None) or self._encoder.encode_text(["a"]).shape[1]
        new = IndexedModel(name, spec, weights + "+bf16" * (precision == "bf16"), width)
        same = next((model for model in alike if model.fingerprint == new.fingerprint), None)
        if same is not None and same.name != name:
            if options.name is not None:
                raise InputError(f"{name}: {store.address} has vectors of these weights, as {same.name!r}")
            new = replace(new, name=same.name)
        old = next((each for each in known if each.name == new.name and each.fingerprint != new.fingerprint), None)
        if old is not None and not options.replace_model:
            raise old.changed(store.address)
        for each in collections if old is not None else ():  # which have to be there to make the vectors anew
            if refused := make_plan(store, each, new.name, remove_all=options.remove_all).summary.refused:
                raise InputError(f"{each.name}: {refused[each.name]}")
        self.indexed, self.is_new = new, same is None
        _wait()  # all have compared
        if distributed.rank() == 0:
            if old is not None:
                store.remove_model(old.name)
            store.add_model(new)
        _wait()

    def _only(self, known: Sequence[IndexedModel], name: str | None) -> IndexedModel:
        named = [model for model in known if name in (None, model.name)]
        if len(named) != 1:
            names = ", ".join(model.name for model in known)
            why = f"has vectors of {names}; --name says of which" if known else "is empty; --model says by which model"
            raise InputError(f"{self._store.address}: {why}")
        return named[0]

    def encoder(self) -> Encoder:
        with self._lock:
            if self._encoder is None:
                encoder, weights = self._load(self.indexed.spec)
                if weights != self.indexed.weights:
                    raise self.indexed.changed(self._store.address)
                self._encoder = encoder
            return self._encoder


def default_name(spec: str) -> str:
    """What an index calls a model: the last part of a path, or the name as it is written."""
    if spec.startswith(("hf-hub:", "local-dir:")):
        spec = spec.partition(":")[2]
    return Path(spec).name if Path(split_checkpoint(spec)[0]).exists() else spec


def _is_mine(work: Work) -> bool:
    digest = zlib.crc32(work.found.path.encode("utf-8", "surrogateescape"))
    return digest % distributed.world_size() == distributed.rank()


def _wait() -> None:
    if distributed.is_initialized():
        dist.barrier()


def _together(own: Summary) -> Summary:
    """What all ranks did."""
    parts: list[Summary] = [own] * distributed.world_size()
    if distributed.is_initialized():
        dist.all_gather_object(parts, own)
    total = Summary()
    for part in parts:
        total.add(part)
    return total
