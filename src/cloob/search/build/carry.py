"""Does what plans say: bytes that the index knows keep their vector, others go through the model.

Each batch is a transaction: whatever ends the process, the next call goes on behind the last one.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cloob.search.build.forward import Forward
from cloob.search.build.plan import Effort, Plan, Summary
from cloob.search.build.prepare import Prepared, Preparer, Work, in_threads, iso_date
from cloob.search.records import Item
from cloob.search.store import FileState, Store, Vectors

COMMIT_SECONDS = 10.0
"""What is known is written at least this often."""


@dataclass(frozen=True)
class Part:
    """Which part of the work this process does, of how many; and where all wait for each other."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None


def carry_out(
    store: Store,
    plans: Sequence[Plan],
    model: str,
    forward: Forward,
    effort: Effort,
    part: Part | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Does what plans say.

    Args:
        store: The index.
        plans: One a source.
        model: The name of the model that the vectors are of; the store has it.
        forward: The model.
        effort: How.
        part: Which part of it; None: all.
        progress: Called with the pictures that were looked at so far, and in all.
    """
    part = part or Part()
    start = time.monotonic()
    summary = Summary()
    updater = _Updater(store, model, forward, effort, plans)
    work = [each for plan in plans for each in plan.work if _is_mine(each, updater, part)]
    try:
        for done, prepared in enumerate(updater.prepare(iter(work)), 1):
            updater.take(prepared)
            if progress is not None:
                progress(done, len(work))
        updater.flush()
    finally:
        summary.add(updater.summary)
    part.wait()
    if part.rank == 0:
        for plan in plans:
            summary.add(plan.summary)
            summary.removed += updater.remove(plan)
        store.optimise()
    part.wait()
    summary.seconds = time.monotonic() - start
    return summary


class _Updater:
    """Takes prepared pictures, and writes them batch by batch."""

    def __init__(self, store: Store, model: str, forward: Forward, effort: Effort, plans: Sequence[Plan]) -> None:
        self.summary = Summary()
        self._store, self._model, self._forward, self._effort = store, model, forward, effort
        self._preparer = Preparer(forward, self._known, effort.max_megapixels)
        self._vanished: dict[tuple[str, str], list[FileState]] = {}
        self.sizes: set[tuple[str, int]] = set()
        for plan in plans:
            for state in plan.vanished:
                if state.id is not None:
                    self._vanished.setdefault((plan.collection.name, state.content), []).append(state)
                    self.sizes.add((plan.collection.name, state.bytes))
        self._renamed = {(state.path, state.content): state for plan in plans for state in plan.renamed}
        self._moved: set[int] = set()
        self._to_embed: list[Prepared] = []
        self._to_copy: list[Prepared] = []
        self._faults: list[Prepared] = []
        self._written = time.monotonic()

    def prepare(self, work: Iterator[Work]) -> Iterator[Prepared]:
        """Looks at pictures ahead of the model."""
        return in_threads(self._preparer, work, self._effort.workers, 2 * self._effort.batch_size)

    def take(self, prepared: Prepared) -> None:
        """Keeps a picture for the next batch, and writes that when it is full or a while has passed."""
        date = None if prepared.item is None else prepared.item.columns.get("date")
        if date not in (None, "") and iso_date(date) is None:
            self.summary.left_out.add("date that cannot be read", f"{prepared.work.found.path} ({date})")
        if prepared.truncated:
            self.summary.left_out.add("truncated JPEG, taken", prepared.work.found.path)
        waiting = (
            self._faults if prepared.item is None else self._to_copy if prepared.pixels is None else self._to_embed
        )
        waiting.append(prepared)
        size = self._effort.batch_size
        full = len(self._to_embed) >= size or len(self._to_copy) + len(self._faults) >= 4 * size
        if full or time.monotonic() - self._written > COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting: moved and unchanged bytes first, as their vectors are still there."""
        copies, self._to_copy = self._to_copy, []
        self._copy(list(self._without_moved(copies)))
        embed, self._to_embed = list(self._without_moved(self._to_embed)), []
        for start in range(0, len(embed), self._effort.batch_size):
            self._embed(embed[start : start + self._effort.batch_size])
        faults, self._faults = self._faults, []
        for prepared in faults:
            assert prepared.fault is not None
            self._write_fault(prepared, prepared.fault)
        self._written = time.monotonic()

    def remove(self, plan: Plan) -> int:
        """Removes what is gone and was not found elsewhere."""
        ids = [state.id for state in plan.vanished if state.id is not None and state.id not in self._moved]
        for start in range(0, len(ids), 10_000):
            self._store.remove(ids[start : start + 10_000])
        if faulty := [state.path for state in plan.vanished if state.id is None]:
            self._store.clear_faults(plan.collection.name, faulty)
        return len(ids)

    def _known(self, content: str) -> Sequence[int]:
        return self._store.find([content]).get(content, [])

    def _without_moved(self, some: Sequence[Prepared]) -> Iterator[Prepared]:
        """Gives moved files their new path; those of them that have a vector of this model are done then."""
        for prepared in some:
            assert prepared.item is not None
            pool = self._vanished.get((prepared.item.source, prepared.item.content), [])
            state = None
            if prepared.work.state is None:
                place = (prepared.item.path, prepared.item.content)
                state = self._renamed.pop(place, None) or (pool.pop() if pool else None)
            if state is None:
                yield prepared
                continue
            assert state.id is not None
            self._moved.add(state.id)
            self._store.update_items([replace(prepared.item, id=state.id)])
            self.summary.moved += 1
            if self._model not in state.models:
                yield replace(prepared, work=replace(prepared.work, state=state))

    def _copy(self, copies: Sequence[Prepared]) -> None:
        """Pictures whose bytes the index knew: the vector of an item that still has them, else through the model.

        All vectors are read before one is written: files may have exchanged their bytes.
        """
        rows = self._rows(copies)
        described: list[Item] = []
        known: list[tuple[Prepared, Vectors]] = []
        for prepared in copies:
            item, state = prepared.item, prepared.work.state
            assert item is not None
            if state is not None and state.content == item.content and self._model in state.models:
                assert state.id is not None
                described.append(replace(item, id=state.id))
                continue
            if item.content in rows:
                known.append((prepared, rows[item.content]))
                continue
            again = self._preparer(prepared.work, decode=True)
            (self._faults if again.item is None else self._to_embed).append(again)
        if described:
            self._store.update_items(described)
            self.summary.described += len(described)
        if known:
            self._write([prepared for prepared, _ in known], np.stack([row for _, row in known]))

    def _embed(self, batch: list[Prepared]) -> None:
        rows = self._rows(batch)  # of copies in one batch, and of those that were read before the first was written
        new = {_content(each): each.pixels for each in batch if each.pixels is not None and _content(each) not in rows}
        if new:
            rows |= zip(new, self._forward.rows(list(new.values())).numpy(), strict=True)
        self.summary.embedded += len(new)
        good = [prepared for prepared in batch if np.isfinite(rows[_content(prepared)]).all()]
        if good:
            self._write(good, np.stack([rows[_content(prepared)] for prepared in good]))
        for prepared in batch:
            if not np.isfinite(rows[_content(prepared)]).all():
                self._write_fault(prepared, "embedding not finite")

    def _rows(self, some: Sequence[Prepared]) -> dict[str, Vectors]:
        """By content the vectors that the index has of it by now."""
        holders = self._store.find([_content(prepared) for prepared in some])
        ids = [id_ for each in holders.values() for id_ in each]
        vectors = dict(zip(ids, self._store.vectors(self._model, ids), strict=True))
        known = ((content, vectors[id_]) for content, each in holders.items() for id_ in each)
        return {content: row for content, row in known if np.isfinite(row).all()}

    def _write(self, batch: list[Prepared], vectors: Vectors) -> None:
        items = [prepared.item for prepared in batch if prepared.item is not None]
        if items:
            self._store.write(items, self._model, vectors)
        for prepared in batch:
            state = prepared.work.state
            if state is None or state.id is None:
                self.summary.added += 1
            elif prepared.item is not None and state.content != prepared.item.content:
                self.summary.changed += 1
            else:
                self.summary.completed += 1

    def _write_fault(self, prepared: Prepared, fault: str) -> None:
        found, known = prepared.work.found, prepared.work.state
        state = FileState(None, found.path, found.bytes or 0, found.mtime_ns, "", fault, ())
        stays = prepared.passing and known is not None and known.id is not None
        if not stays and state != known:
            self._store.write_faults(prepared.work.collection.name, [state])
        self.summary.add_fault(fault, found.path)


def _content(prepared: Prepared) -> str:
    assert prepared.item is not None
    return prepared.item.content


def _is_mine(work: Work, updater: _Updater, part: Part) -> bool:
    """Whether this rank looks at a picture: rank 0 at all that may have moved, so that no old path is given twice."""
    if part.world_size == 1:
        return True
    moved = work.state is None and (work.collection.name, work.found.bytes) in updater.sizes
    digest = zlib.crc32(work.found.path.encode("utf-8", "surrogateescape"))
    return part.rank == (0 if moved else digest % part.world_size)
