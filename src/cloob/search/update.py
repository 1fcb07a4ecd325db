"""What ``Index.update`` does: which model, which sources, which ranks; the work itself is in ``build``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cloob import distributed
from cloob.data.shards.paths import is_pattern
from cloob.data.shards.spec import is_remote
from cloob.errors import InputError
from cloob.models.encoding import Encoder, evaluating
from cloob.models.fingerprint import fingerprint, load_with_fingerprint
from cloob.models.runs import split_checkpoint
from cloob.search.build.carry import Part, carry_out
from cloob.search.build.forward import Forward
from cloob.search.build.plan import Effort, Plan, Summary, make_plan
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
        replace_model: Whether vectors of a model of this name may go, where its weights or the way are others now.
        device: Where the model runs.
        precision: In which its image tower computes; None: as the index has it, float32 in a new one.
        draft: Whether large JPEG files are decoded smaller; None: as the index has it, else not.
        scan: How sources are read.
        effort: How pictures become vectors.
    """

    model: str | Path | Encoder | None = None
    name: str | None = None
    replace_model: bool = False
    device: str | torch.device = "auto"
    precision: Precision | None = None
    draft: bool | None = None
    scan: ScanOptions = field(default_factory=ScanOptions)
    effort: Effort = field(default_factory=Effort)


def update(
    store: Store,
    sources: Sequence[str | Path],
    options: UpdateOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Brings an index up to date with sources; see :meth:`cloob.search.index.Index.update`."""
    options = options or UpdateOptions()
    device = distributed.resolve_device(options.device)
    with distributed.process_group(device):
        part = Part(distributed.rank(), distributed.world_size(), _wait)
        model = _Model(store, options, device)
        collections = _open_all(store, sources, options)
        model.ready(part, collections)
        plans = [make_plan(store, each, model.name, options.effort) for each in collections]
        _find_renamed(store, plans)
        part.wait()  # nobody writes before all have compared
        for each in collections if part.rank == 0 and options.scan.exclude else ():
            store.set_exclude(each.name, [glob for glob in options.scan.exclude if glob])
        own = carry_out(store, plans, model.name, Forward(model.encoder, model.making), options.effort, part, progress)
        done = _together(own)
        if part.rank == 0 and model.is_new and not done.added + done.changed + done.completed:
            store.remove_model(model.name)
        return done


def _open_all(store: Store, sources: Sequence[str | Path], options: UpdateOptions) -> list[Collection]:
    """Sources by name; what is gone of one that the index knows is an empty one.

    Raises:
        InputError: No source, one that is not there and never was, or one inside another.
    """
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


def _find_renamed(store: Store, plans: Sequence[Plan]) -> None:
    """Gives the plans of new sources what is known of sources that are gone: a folder may have got another name."""
    known = store.sources()
    new = [plan for plan in plans if plan.collection.name not in known]
    for name in known if new else ():
        if is_gone(name):
            gone = [state for state in store.states(name) if state.id is not None and state.path.startswith(name)]
            for plan in new:
                plan.renamed += [replace(s, path=f"{plan.collection.name}{s.path[len(name) :]}") for s in gone]


class _Model:
    """The model of an update: loaded at once where it was named, else when the first picture needs it."""

    def __init__(self, store: Store, options: UpdateOptions, device: torch.device) -> None:
        self._store, self._options, self._device = store, options, device
        self._lock = threading.Lock()
        self._encoder: Encoder | None = None
        self.making = Making()
        self.is_new = False
        known = store.models()
        given = options.model
        if given is None:
            named = [model for model in known if options.name in (None, model.name)]
            if len(named) != 1:
                names = ", ".join(model.name for model in known)
                raise InputError(
                    f"{store.address}: has vectors of {names}; --name says of which"
                    if known
                    else f"{store.address}: is empty; --model says which model is to embed"
                )
            self.name, self.spec = named[0].name, named[0].spec
            self.making = Making.of(named[0].fingerprint)
            if self._chosen(self.making) != self.making:
                raise InputError(
                    f"{self.name}: its vectors were made in another way; --model with --replace-model makes them anew"
                )
        elif isinstance(given, str | Path):
            self.spec = absolute(str(given))
            remember_model(self.spec)
            self.name = options.name or default_name(str(given))
        else:
            self.name = self.spec = options.name or given.name
            self._encoder = given

    def ready(self, part: Part, collections: Sequence[Collection]) -> None:
        """Loads and compares a model that was named or is to be replaced, and adds it where it is new.

        Raises:
            InputError: It cannot be loaded, or vectors would go of a source that is not there to make them anew.
            ModelChanged: The index has vectors of another one of this name, which may not go.
        """
        if self._options.model is None and not self._options.replace_model:
            return
        if self._encoder is None:
            self._encoder, weights = self._load()
        else:
            weights = fingerprint(self._encoder)
        known = self._store.models()
        own = [model for model in known if weights_of(model.fingerprint) == weights]
        own.sort(key=lambda model: model.name != self.name)
        goes_on = own and not self._options.replace_model
        if self._options.model is not None:
            self.making = self._chosen(Making.of(own[0].fingerprint) if goes_on else Making())
        new = IndexedModel(self.name, self.spec, self.making.mark(weights), _width(self._encoder))
        same = next((model for model in known if model.fingerprint == new.fingerprint), None)
        if same is not None and same.name != self.name:
            if self._options.name is not None:
                raise InputError(f"{self.name}: {self._store.address} has vectors of these weights, as {same.name!r}")
            self.name, new = same.name, replace(new, name=same.name)
        others = (model for model in known if model.name == self.name and model.fingerprint != new.fingerprint)
        old = next(others, None)
        if old is not None and not self._options.replace_model:
            raise changed(old, self._store.address)
        for each in collections if old is not None else ():
            refused = make_plan(self._store, each, self.name, self._options.effort).summary.refused
            if refused:
                raise InputError(f"{each.name}: {refused[each.name]}")
        self.is_new = same is None
        part.wait()  # all have compared
        if part.rank == 0:
            if old is not None:
                self._store.remove_model(self.name)
            self._store.add_model(new)
        part.wait()

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
        """The model and its weights' fingerprint, as it was typed now or as the index names it."""
        if self._options.model is not None:
            return load_with_fingerprint(self.spec, self._device)
        return load_named(self.spec, self._device)

    def _chosen(self, making: Making) -> Making:
        """A way of making vectors, but for what was asked for."""
        precision, draft = self._options.precision, self._options.draft
        return Making(precision or making.precision, making.draft if draft is None else draft)


def default_name(spec: str) -> str:
    """What an index calls a model: the last part of a path, or the name as it is written."""
    if spec.startswith(("hf-hub:", "local-dir:")):
        spec = spec.partition(":")[2]
    return Path(spec).name if Path(split_checkpoint(spec)[0]).exists() else spec


def _width(encoder: Encoder) -> int:
    """D."""
    width = getattr(encoder, "embed_dim", None)
    if not isinstance(width, int):
        with evaluating(encoder):
            width = encoder.encode_text(["a"]).shape[1]
    return width


def _wait() -> None:
    if distributed.is_initialized():
        dist.barrier()


def _together(own: Summary) -> Summary:
    """What all ranks did."""
    if not distributed.is_initialized():
        return own
    parts: list[Summary] = [own] * distributed.world_size()
    dist.all_gather_object(parts, own)
    total = Summary(seconds=max(part.seconds for part in parts))
    for part in parts:
        total.add(part)
    return total
