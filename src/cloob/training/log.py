"""The JSON lines of a run folder, and the count of samples that could not be used."""

from __future__ import annotations

import contextlib
import json
import math
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader
from cloob.distributed import gather_objects
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models.runs import EPOCHS_FILE, METRICS_FILE, SKIPPED_FILE
from cloob.training.progress import Progress

MIN_BAD = 20  # fewer bad samples say nothing yet about the fraction
MAX_BAD_IN_A_ROW = 1000
"""So many without a usable one in between: a mount that has died, not one of many files that is bad."""
MAX_NAMED = 1000
"""Bad samples that are named in an epoch: in a set of millions a fraction that is allowed would be a large file."""
Read = tuple[int, Skip]  # a sample that could not be used, with the rank that read it


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The JSON lines of a run folder, written through at once; those after ``keep_to_step`` are dropped (None: all)."""

    def __init__(self, run: Path, keep_to_step: int | None, *, writes: bool) -> None:
        self._files: dict[str, TextIO] = {}
        for path in (run / name for name in (METRICS_FILE, EPOCHS_FILE, SKIPPED_FILE) if writes):
            kept: list[str] = []
            if keep_to_step is not None and path.is_file():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # up to a line that was cut short
                    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                        if json.loads(line)["step"] > keep_to_step:
                            break
                        kept.append(line + "\n")
            write_whole(path, "".join(kept))
            self._files[path.stem] = path.open("a", encoding="utf-8")

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one object to ``metrics``, ``epochs`` or ``skipped``; InputError where the disk refuses it."""
        if not self._files:
            return
        file = self._files[name]
        try:
            file.write(json.dumps(values, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is still in its buffer would be refused again, without a name
                file.close()
            raise InputError(f"{file.name}: cannot be written ({error.strerror})") from error

    def write_skipped(self, place: Mapping[str, Any], skipped: Sequence[Read]) -> None:
        """Names samples that could not be used, and where in the run that was."""
        for reader, skip in skipped[:MAX_NAMED]:
            reason = {"rank": reader, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
            self.write("skipped", {**place, **reason})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends a run of more than the share ``limit``."""

    def __init__(self, progress: Progress, loader: Loader, limit: float, log: RunLog) -> None:
        self.progress, self.loader, self.limit, self.log = progress, loader, limit, log
        self._in_a_row = 0
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, good: int, bad: int) -> None:
        """Adds a batch with so many usable and bad samples over all ranks."""
        progress = self.progress
        for skip in batch.skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, _example(skip))
        if bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            self.log.write_skipped(place, with_readers(batch.skipped))
        progress.epoch_good += good
        progress.epoch_bad += bad
        self._in_a_row = 0 if good else self._in_a_row + bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit; every rank comes to the same answer.

        They are a fraction of the epoch; once it has ``ended``, or very many in a row were bad, of the epoch so far. At
        its end one sample at least must have been usable, whatever the limit.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        so_far = ended or self._in_a_row >= MAX_BAD_IN_A_ROW
        total = good + bad if so_far else max(good + bad, self.loader.pairs_per_epoch)
        nothing = ended and bad > 0 and good == 0
        if bad > self.limit * total or nothing:
            examples = ChainMap(*gather_objects(self._examples))
            message = f"{self.loader.name}: {bad} of {good + bad} samples"
            raise _too_many(message, nothing, self.limit, self.reasons(), examples)

    def reasons(self) -> dict[str, int]:
        return dict(sum(map(Counter, gather_objects(self.progress.reasons)), Counter[str]()).most_common())


def with_readers(skipped: Sequence[Skip]) -> list[Read]:
    return [(reader, skip) for reader, part in enumerate(gather_objects(skipped)) for skip in part]


def by_reason(skipped: Iterable[Skip]) -> dict[str, int]:
    return dict(Counter(skip.reason for skip in skipped).most_common())


def check_fraction(source: str, kind: str, skips: Sequence[Skip], total: int, limit: float) -> None:
    """Raises InputError where more than a share of a whole set cannot be used, or all of it; with an example each."""
    nothing = len(skips) == total > 0
    if len(skips) > limit * total or nothing:
        examples: dict[str, str] = {skip.reason: _example(skip) for skip in reversed(skips)}
        raise _too_many(f"{source}: {len(skips)} of {total} {kind}", nothing, limit, by_reason(skips), examples)


def _example(skip: Skip) -> str:
    return f"{skip.key}: {skip.detail}" if skip.detail else skip.key


def _too_many(
    message: str, nothing: bool, limit: float, reasons: Mapping[str, int], examples: Mapping[str, str]
) -> InputError:
    why = "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"
    listed = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
    return InputError(f"{message} cannot be used, {why}: {listed}")
