"""Samples that cannot be used: counted, named, and too many of them end the run."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader
from cloob.distributed import Tally, gather_objects
from cloob.errors import InputError
from cloob.training.log import RunLog
from cloob.training.progress import Progress

MIN_BAD = 20  # fewer bad samples say nothing yet about the fraction
MAX_BAD_IN_A_ROW = 1000
"""So many without a usable one in between: a mount that has died, not one of many files that is bad."""
MAX_NAMED = 1000
"""Bad samples that are named in an epoch: in a set of millions a fraction that is allowed would be a large file."""
Read = tuple[int, Skip]  # a sample that could not be used, with the rank that read it


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends a run of more than the share ``limit``."""

    def __init__(self, progress: Progress, loader: Loader, limit: float, log: RunLog) -> None:
        self.progress, self.loader, self.limit, self.log = progress, loader, limit, log
        self._in_a_row = 0
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, counts: Tally) -> None:
        progress = self.progress
        for skip in batch.skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, _example(skip))
        if counts.bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            name_skips(self.log, place, with_readers(batch.skipped))
        progress.epoch_good += counts.samples
        progress.epoch_bad += counts.bad
        self._in_a_row = 0 if counts.samples else self._in_a_row + counts.bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit; every rank comes to the same answer.

        They are a fraction of the whole epoch, since the rest of it may be good; once it has ``ended``, or very many in
        a row were bad, of the epoch so far. At its end one sample at least must have been usable, whatever the limit.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        so_far = ended or self._in_a_row >= MAX_BAD_IN_A_ROW
        total = good + bad if so_far else max(good + bad, self.loader.pairs_per_epoch)
        nothing = ended and bad > 0 and good == 0
        if bad > self.limit * total or nothing:
            what = f"{self.loader.name}: {bad} of {good + bad} samples"
            _refuse(what, nothing, self.limit, self.reasons(), ChainMap(*gather_objects(self._examples)))

    def reasons(self) -> dict[str, int]:
        return dict(sum(map(Counter, gather_objects(self.progress.reasons)), Counter[str]()).most_common())


def with_readers(skipped: Sequence[Skip]) -> list[Read]:
    return [(reader, skip) for reader, part in enumerate(gather_objects(skipped)) for skip in part]


def by_reason(skipped: Iterable[Read]) -> dict[str, int]:
    return dict(Counter(skip.reason for _, skip in skipped).most_common())


def name_skips(log: RunLog, place: Mapping[str, Any], skipped: Sequence[Read]) -> None:
    for reader, skip in skipped[:MAX_NAMED]:
        log.write("skipped", {**place, "rank": reader, "key": skip.key, "reason": skip.reason, "detail": skip.detail})


def check_fraction(source: str, kind: str, skips: Sequence[Skip], total: int, limit: float) -> None:
    """Raises InputError where more than a share of a whole set cannot be used, or all of it; with an example each."""
    bad = len(skips)
    nothing = bad > 0 and bad == total
    if bad > limit * total or nothing:
        examples: dict[str, str] = {skip.reason: _example(skip) for skip in reversed(skips)}
        reasons = by_reason((0, skip) for skip in skips)
        _refuse(f"{source}: {bad} of {total} {kind}", nothing, limit, reasons, examples)


def _example(skip: Skip) -> str:
    return f"{skip.key}: {skip.detail}" if skip.detail else skip.key


def _refuse(
    what: str, nothing: bool, limit: float, reasons: Mapping[str, int], examples: Mapping[str, str]
) -> NoReturn:
    why = "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"
    listed = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
    raise InputError(f"{what} cannot be used, {why}: {listed}")
