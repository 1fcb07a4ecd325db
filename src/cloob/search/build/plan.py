"""What is to be done so that an index has what its sources have: a file is as it was when size and time are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloob.machine import decoders
from cloob.search.build.prepare import Work, limit
from cloob.search.scan.collection import EXAMPLES, NO_PICTURE, SEPARATOR, Collection, Found, LeftOut
from cloob.search.store import FileState, Store

_UNREAD = ("folder cannot be listed", "shard cannot be read", "truncated shard")


@dataclass(frozen=True)
class Effort:
    """How pictures become vectors; no vector depends on it but for rounding.

    Attributes:
        batch_size: Pictures a forward pass, and a transaction.
        workers: Threads that read and decode.
        max_megapixels: Larger pictures are left out; None: no limit but that of ``cloob.pictures``.
        remove_all: Whether all items of a source may go when nothing of it is there any more.
    """

    batch_size: int = 64
    workers: int = field(default_factory=decoders)
    max_megapixels: float | None = None
    remove_all: bool = False


@dataclass
class Summary:
    """What an update did.

    Attributes:
        added: New pictures.
        changed: Pictures whose file holds something else now.
        moved: Files of the same bytes at a new path, while the old one is gone.
        described: Files of the same bytes of which something else is said now: time, caption or columns.
        completed: Pictures that were known, and got a vector of this model now.
        removed: Pictures that are gone.
        unchanged: Files that were not opened.
        embedded: Pictures that went through the model.
        faults: Files that cannot be read, by reason; those known from before included.
        fault_examples: The first few paths of each reason.
        left_out: What sources hold and an index does not.
        refused: By source, why nothing of it was done or removed.
        seconds: Altogether.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    described: int = 0
    completed: int = 0
    removed: int = 0
    unchanged: int = 0
    embedded: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    fault_examples: dict[str, list[str]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def unread(self) -> int:
        """Folders and shards that could not be read, or not whole."""
        return sum(self.left_out.counts.get(reason, 0) for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, by what is before the details; those of a decoder say what to install."""
        reason = fault if fault.startswith("no decoder") else fault.partition(" (")[0].partition(":")[0]
        self.faults[reason] += 1
        examples = self.fault_examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(path)

    def add(self, other: Summary) -> None:
        """Adds what another source or rank did."""
        for name in ("added", "changed", "moved", "described", "completed", "removed", "unchanged", "embedded"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        for reason, examples in other.fault_examples.items():
            shown = self.fault_examples.setdefault(reason, [])
            shown += examples[: EXAMPLES - len(shown)]
        for reason, count in other.left_out.counts.items():
            first, *rest = other.left_out.examples[reason]
            self.left_out.add(reason, first, count)
            for example in rest:
                self.left_out.add(reason, example, 0)
        self.refused.update(other.refused)


@dataclass
class Plan:
    """What one source needs.

    Attributes:
        collection: The source.
        work: Pictures to look at.
        vanished: Known files that the source does not name any more.
        summary: What the plan alone says.
        renamed: Files of sources that are gone, under the paths that they have if this is such a source by a new name.
    """

    collection: Collection
    work: list[Work]
    vanished: list[FileState]
    summary: Summary
    renamed: list[FileState] = field(default_factory=list)


def make_plan(store: Store, collection: Collection, model: str, effort: Effort) -> Plan:
    """Compares a source with what the index knows of it; no file is opened."""
    known = {state.path: state for state in store.states(collection.name)}
    there = sum(state.id is not None for state in known.values())
    plan = Plan(collection, [], [], Summary())
    were = {SEPARATOR in state.path for state in known.values() if state.id is not None}
    are: set[bool] = set()
    seen: set[str] = set()
    for found in collection.scan(known.keys()):
        if not found.missing:
            are.add(SEPARATOR in found.path)
        if found.path in seen:
            continue
        seen.add(found.path)
        state = known.pop(found.path, None)
        if state is None or not _as_it_was(state, found):
            plan.work.append(Work(found, state, collection))
        elif state.fault is not None and (found.missing or not _worth_another_try(state.fault, effort)):
            plan.summary.add_fault(state.fault, state.path)
        elif state.fault is None and model in state.models:
            plan.summary.unchanged += 1
        else:
            plan.work.append(Work(found, state, collection))
    plan.vanished = [state for path, state in known.items() if not _below(path, collection.unlisted)]
    plan.summary.left_out = collection.left_out
    if not seen and not there and not collection.unlisted:
        plan.summary.refused[collection.name] = "no pictures in it"
    if effort.remove_all:
        return plan
    if were and are and not were & are:
        plan.vanished, plan.work = [], []
        before, now = ("in tars or Arrow files", "files") if True in were else ("files", "in tars or Arrow files")
        plan.summary.refused[collection.name] = (
            f"its {there:,} pictures were {before} and now are {now}, so nothing was done; "
            "--remove-all takes these for those"
        )
    elif there and not are and not collection.unlisted:
        plan.vanished = []
        plan.work = [work for work in plan.work if work.state is None or work.state.id is None]
        plan.summary.refused[collection.name] = (
            f"none of its {there:,} pictures is there any more (not mounted?), so nothing was removed; "
            "--remove-all removes them"
        )
    return plan


def _as_it_was(state: FileState, found: Found) -> bool:
    return state.mtime_ns == found.mtime_ns and found.bytes in (None, state.bytes)


def _worth_another_try(fault: str, effort: Effort) -> bool:
    """Whether a file that could not be read may be readable by now though it has not changed."""
    if fault.startswith(("no decoder", "missing image", "no permission")):
        return NO_PICTURE not in fault
    above = fault.startswith("image too large: ")
    return above and (effort.max_megapixels is None or not fault.endswith(limit(effort.max_megapixels)))


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith((f"{folder}/", f"{folder}{SEPARATOR}")) for folder in folders)
