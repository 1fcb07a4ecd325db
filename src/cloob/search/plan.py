"""What an index needs to hold what its sources hold: a file is unchanged if its size and time are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloob.search.scan.collection import EXAMPLES, NO_PICTURE, SEPARATOR, Collection, Found, LeftOut
from cloob.search.store import FileState, Store

_UNREAD = ("folder cannot be listed", "shard cannot be read", "truncated shard")
_COUNTS = ("added", "changed", "described", "completed", "removed", "unchanged", "embedded")


@dataclass
class Summary:
    """What an update did.

    Attributes:
        added: New pictures, a renamed one included.
        changed: Pictures whose file holds something else now.
        described: Files of the same bytes with another time, caption or columns.
        completed: Known pictures that got a vector of this model.
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
        """Folders and shards that could not be read completely."""
        return sum(self.left_out.counts.get(reason, 0) for reason in _UNREAD)

    def add_fault(self, fault: str, path: str) -> None:
        """Counts a file that cannot be read, without the details; those of a decoder say what to install."""
        reason = fault if fault.startswith("no decoder") else fault.partition(" (")[0].partition(":")[0]
        self.faults[reason] += 1
        examples = self.fault_examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(path)

    def add(self, other: Summary) -> None:
        """Adds what another source or rank did."""
        for name in _COUNTS:
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


@dataclass(frozen=True)
class Work:
    """A picture that has to be opened."""

    found: Found
    state: FileState | None  # what the index knows of the file
    collection: Collection


@dataclass
class Plan:
    """What one source needs, and what is known without opening a file."""

    collection: Collection
    work: list[Work]
    gone: list[FileState]  # known files that the source does not have any more
    summary: Summary


def make_plan(
    store: Store, collection: Collection, model: str, max_megapixels: float | None = None, *, remove_all: bool = False
) -> Plan:
    """Compares a source with what the index knows of it; opens no file."""
    known = {state.path: state for state in store.states(collection.name)}
    pictures = [state for state in known.values() if state.id is not None]
    plan = Plan(collection, [], [], Summary())
    seen: set[str] = set()
    in_containers: set[bool] = set()  # of the pictures that are there
    for found in collection.scan(known.keys()):
        if not found.missing:
            in_containers.add(SEPARATOR in found.path)
        if found.path in seen:
            continue
        seen.add(found.path)
        state = known.pop(found.path, None)
        if state is None or state.mtime_ns != found.mtime_ns or found.bytes not in (None, state.bytes):
            plan.work.append(Work(found, state, collection))
        elif state.fault is not None and (found.missing or not _worth_another_try(state.fault, max_megapixels)):
            plan.summary.add_fault(state.fault, state.path)
        elif state.fault is None and model in state.models:
            plan.summary.unchanged += 1
        else:
            plan.work.append(Work(found, state, collection))
    plan.gone = [state for path, state in known.items() if not _below(path, collection.unlisted)]
    plan.summary.left_out = collection.left_out
    if not seen and not pictures and not collection.unlisted:
        plan.summary.refused[collection.name] = "no pictures in it"
    elif pictures and not remove_all:
        _refuse_losses(plan, pictures, in_containers)
    return plan


def _refuse_losses(plan: Plan, pictures: Sequence[FileState], in_containers: set[bool]) -> None:
    """Keeps the pictures of a source that looks unmounted, or was replaced by one of another kind."""
    were, name = {SEPARATOR in state.path for state in pictures}, plan.collection.name
    if in_containers and not were & in_containers:
        plan.gone, plan.work = [], []
        before, now = ("in tars or Arrow files", "files") if True in were else ("files", "in tars or Arrow files")
        plan.summary.refused[name] = (
            f"its {len(pictures):,} pictures were {before} and now are {now}, so nothing was done; "
            "--remove-all takes these for those"
        )
    elif not in_containers and not plan.collection.unlisted:
        plan.gone = []
        plan.work = [work for work in plan.work if work.state is None or work.state.id is None]
        plan.summary.refused[name] = (
            f"none of its {len(pictures):,} pictures is there any more (not mounted?), so nothing was removed; "
            "--remove-all removes them"
        )


def megapixel_limit(limit: float) -> str:
    """The end of the fault of a picture that is too large; another limit is worth another try."""
    return f"the limit is {limit:g}"


def _worth_another_try(fault: str, max_megapixels: float | None) -> bool:
    """Whether a file that could not be read may be readable by now though it has not changed."""
    if fault.startswith(("no decoder", "missing image", "no permission")):
        return NO_PICTURE not in fault
    too_large = fault.startswith("image too large: ")
    return too_large and (max_megapixels is None or not fault.endswith(megapixel_limit(max_megapixels)))


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(path.startswith((f"{folder}/", f"{folder}{SEPARATOR}")) for folder in folders)
