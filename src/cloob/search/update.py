"""What ``Index.update`` does: which sources, which model, which rank; the work itself is in ``build``."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
from cloob.search.build import Builder, Plan, Summary, Work, make_plan, remove_gone
from cloob.search.identity import Making, Precision, changed, weights_of
from cloob.search.identity import ModelChanged as ModelChanged
from cloob.search.records import IndexedModel
from cloob.search.scan.collection import Collection, Gone
from cloob.search.scan.open import ScanOptions, is_gone, open_collection, open_named, source_name
from cloob.search.store import Store
from cloob.search.trust import absolute, load_named, remember, remember_model


@dataclass(frozen=True)
class UpdateOptions:
    """How an index is brought up to date.

    Attributes:
        model: What ``load_model`` takes, or a loaded encoder; None: the only one that the index has.
        name: What the index calls the model; None: its file name or tag.
        replace_model: Whether vectors of a model of this name may go if its weights or settings differ now.
        device: Where the model runs.
        precision: In which its image tower computes; None: as the index has it, float32 in a new one.
        draft: Whether large JPEG files are decoded smaller; None: as the index has it, else not.
        scan: How sources are read.
        batch_size: Pictures of a forward pass, and of a transaction.
        workers: Threads that read and decode.
        max_megapixels: Larger pictures are left out; None: above the limits of ``cloob.pictures``.
        remove_all: Whether all items of a source may go if nothing of it is there any more.
    """

    model: str | Path | Encoder | None = None
    name: str | None = None
    replace_model: bool = False
    device: str | torch.device = "auto"
    precision: Precision | None = None
    draft: bool | None = None
    scan: ScanOptions = field(default_factory=ScanOptions)
    batch_size: int = 64
    workers: int = field(default_factory=decoders)
    max_megapixels: float | None = None
    remove_all: bool = False


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
        model = _Model(store, options, device)
        collections = _open_all(store, sources, options)
        model.add(collections)
        plans = [_plan(store, each, model.name, options) for each in collections]
        _wait()  # nobody writes before all have compared
        for each in collections if first and options.scan.exclude else ():
            store.set_exclude(each.name, [glob for glob in options.scan.exclude if glob])
        start = time.monotonic()
        work = [each for plan in plans for each in plan.work if _is_mine(each)]
        if work and model.making.precision == "bf16" and device.type == "cpu":
            warn_of_emulated_bfloat16()
        size = options.batch_size
        builder = Builder(store, model.name, model.encoder, model.making, size, options.max_megapixels)
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
            store.remove_model(model.name)
        return done


def _plan(store: Store, collection: Collection, model: str, options: UpdateOptions) -> Plan:
    return make_plan(store, collection, model, options.max_megapixels, remove_all=options.remove_all)


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
    real = {name: os.path.realpath(name) if os.path.isabs(name) else name for name in (*known, *names)}  # noqa: PTH117
    for name in names:
        if name in known:
            continue
        for other in real:
            if other != name and f"{real[name]}{os.sep}".startswith(f"{real[other]}{os.sep}"):
                raise InputError(f"{name}: lies in {other}, which is a source of this index; index that one alone")
        for other in known:
            if real[other].startswith(f"{real[name]}{os.sep}"):
                raise InputError(
                    f"{name}: holds {other}, which is a source of this index; index that one, or make a new index"
                )


class _Model:
    """The model of an update: loaded at once if it was named, else when the first picture needs it."""

    def __init__(self, store: Store, options: UpdateOptions, device: torch.device) -> None:
        self._store, self._options, self._device = store, options, device
        self._lock = threading.Lock()
        self._encoder: Encoder | None = None
        self.making = Making()
        self.is_new = False
        if options.model is None:
            known = self._only(store.models())
            self.name, self.spec, self.making = known.name, known.spec, Making.of(known.fingerprint)
            if self._chosen(self.making) != self.making:
                raise InputError(
                    f"{self.name}: its vectors were made in another way; --model with --replace-model makes them anew"
                )
        elif isinstance(options.model, str | Path):
            self.spec = absolute(str(options.model))
            remember_model(self.spec)
            self.name = options.name or default_name(str(options.model))
        else:
            self._encoder = options.model
            self.name = self.spec = options.name or options.model.name

    def _only(self, known: Sequence[IndexedModel]) -> IndexedModel:
        named = [model for model in known if self._options.name in (None, model.name)]
        if len(named) != 1:
            names = ", ".join(model.name for model in known)
            raise InputError(
                f"{self._store.address}: has vectors of {names}; --name says of which"
                if known
                else f"{self._store.address}: is empty; --model says which model is to embed"
            )
        return named[0]

    def _chosen(self, making: Making) -> Making:
        precision, draft = self._options.precision, self._options.draft
        return Making(precision or making.precision, making.draft if draft is None else draft)

    def add(self, collections: Sequence[Collection]) -> None:
        """Loads a model that was named or is to be replaced, compares it with those of the index, and adds it."""
        options, known = self._options, self._store.models()
        if options.model is None and not options.replace_model:
            return
        if self._encoder is None:
            self._encoder, weights = self._load()
        else:
            weights = fingerprint(self._encoder)
        of_these = [model for model in known if weights_of(model.fingerprint) == weights]
        of_these.sort(key=lambda model: model.name != self.name)
        if options.model is not None:
            goes_on = of_these and not options.replace_model
            self.making = self._chosen(Making.of(of_these[0].fingerprint) if goes_on else Making())
        width = getattr(self._encoder, "embed_dim", None) or self._encoder.encode_text(["a"]).shape[1]
        new = IndexedModel(self.name, self.spec, self.making.mark(weights), width)
        same = next((model for model in known if model.fingerprint == new.fingerprint), None)
        if same is not None and same.name != self.name:
            if options.name is not None:
                raise InputError(f"{self.name}: {self._store.address} has vectors of these weights, as {same.name!r}")
            self.name, new = same.name, replace(new, name=same.name)
        old = next((model for model in known if model.name == self.name and model.fingerprint != new.fingerprint), None)
        if old is not None and not options.replace_model:
            raise changed(old, self._store.address)
        for each in collections if old is not None else ():  # which have to be there to make the vectors anew
            if refused := _plan(self._store, each, self.name, options).summary.refused:
                raise InputError(f"{each.name}: {refused[each.name]}")
        self.is_new = same is None
        _wait()  # all have compared
        if distributed.rank() == 0:
            if old is not None:
                self._store.remove_model(self.name)
            self._store.add_model(new)
        _wait()

    def encoder(self) -> Encoder:
        """The model."""
        with self._lock:
            if self._encoder is None:
                encoder, weights = self._load()
                old = next(model for model in self._store.models() if model.name == self.name)
                if weights_of(old.fingerprint) != weights:
                    raise changed(old, self._store.address)
                self._encoder = encoder
            return self._encoder

    def _load(self) -> tuple[Encoder, str]:
        load = load_with_fingerprint if self._options.model is not None else load_named
        return load(self.spec, self._device)


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
    if not distributed.is_initialized():
        return own
    parts: list[Summary] = [own] * distributed.world_size()
    dist.all_gather_object(parts, own)
    total = Summary()
    for part in parts:
        total.add(part)
    return total
