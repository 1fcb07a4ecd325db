"""The JSON lines of a run folder, and the samples of an epoch that cannot be used."""

from __future__ import annotations

import contextlib
import json
import math
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from cloob.data.bad import too_many
from cloob.data.batch import Skip
from cloob.data.loader import Loader
from cloob.distributed import gather_objects
from cloob.errors import InputError
from cloob.files import write_whole
from cloob.models import runs
from cloob.training.faults import Fetched
from cloob.training.progress import Progress

MIN_BAD = 20  # fewer bad samples say nothing yet about the fraction
MAX_BAD_IN_A_ROW = 1000  # as of a mount that has died
MAX_NAMED = 1000  # bad samples of an epoch in the file
Read = tuple[int, Skip]  # a sample that could not be used, with the rank that read it


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


class RunLog:
    """The JSON lines of a run folder, written through at once; of those there a run
    that goes on keeps what it will not write again, another (``resumed`` None) none.
    """

    def __init__(self, run: Path, resumed: Progress | None, *, writes: bool) -> None:
        self._files: dict[str, TextIO] = {}
        names = (runs.METRICS_FILE, runs.EPOCHS_FILE, runs.SKIPPED_FILE)
        for name in names if writes else ():
            path = run / name
            lines: list[str] = []
            if resumed is not None:
                lines = [
                    json.dumps(line) + "\n"
                    for line in runs.read_lines(path)
                    if _stays(line, resumed)
                ]
            write_whole(path, "".join(lines))
            self._files[path.stem] = path.open("a", encoding="utf-8")

    def write(self, name: str, line: Mapping[str, object]) -> None:
        """Appends one object to ``metrics``, ``epochs`` or ``skipped``; InputError
        where the disk refuses it.
        """
        if not self._files:
            return
        file = self._files[name]
        try:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            # what is still in its buffer would be refused again, without a name
            with contextlib.suppress(OSError):
                file.close()
            raise InputError(
                f"{file.name}: cannot be written ({error.strerror})"
            ) from error

    def write_skipped(
        self, place: Mapping[str, object], skipped: Sequence[Read]
    ) -> None:
        """Names samples; ``place`` is the step and epoch where they were left out."""
        for reader, skip in skipped[:MAX_NAMED]:
            line = {"rank": reader, "key": skip.key, "reason": skip.reason}
            self.write("skipped", {**place, **line, "detail": skip.detail})

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _stays(line: Mapping[str, object], resumed: Progress) -> bool:
    """Whether a run that goes on from here does not write a line again. The first
    validation names held-out pairs, and may have been refused.
    """
    if line.get("held_out") and resumed.epoch == 0:
        return False
    step = line.get("step")
    return isinstance(step, int) and step <= resumed.step


class BadSamples:
    """Counts the samples of an epoch that could not be used, by reason; ends a run of
    more than the share ``limit``.
    """

    def __init__(
        self, progress: Progress, loader: Loader, limit: float, log: RunLog
    ) -> None:
        self.progress, self.loader, self.limit, self.log = progress, loader, limit, log
        self._in_a_row = 0
        self._examples: dict[str, str] = {}

    def count(self, fetched: Fetched) -> None:
        """Adds the samples of a step's batch."""
        progress, skipped = self.progress, fetched.batch.skipped
        good, bad = fetched.layout.total, fetched.bad
        for skip in skipped:
            progress.reasons[skip.reason] = progress.reasons.get(skip.reason, 0) + 1
            example = f"{skip.key}: {skip.detail}" if skip.detail else skip.key
            self._examples.setdefault(skip.reason, example)
        if bad and progress.epoch_bad < MAX_NAMED:
            place = {"step": progress.step + 1, "epoch": progress.epoch + 1}
            self.log.write_skipped(place, skips_of_all_ranks(skipped))
        progress.epoch_good += good
        progress.epoch_bad += bad
        self._in_a_row = 0 if good else self._in_a_row + bad
        if progress.epoch_bad >= MIN_BAD:
            self.check()

    def check(self, *, ended: bool = False) -> None:
        """Ends the run where more than its share of the epoch is bad, or of what was
        read so far: at the epoch's end, or after very many in a row.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        n_read = good + bad
        pairs = n_read
        if not ended and self._in_a_row < MAX_BAD_IN_A_ROW:
            pairs = max(n_read, self.loader.pairs_per_epoch)
        leaves_none = ended and bad > 0 and good == 0
        if bad > self.limit * pairs or leaves_none:
            examples = ChainMap(*gather_objects(self._examples))
            message = f"{self.loader.pairs.name}: {bad} of {n_read} samples"
            raise too_many(message, leaves_none, self.limit, self.reasons(), examples)

    def reasons(self) -> dict[str, int]:
        """The bad samples of all ranks by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for of_rank in gather_objects(self.progress.reasons):
            total.update(of_rank)
        return dict(total.most_common())


def skips_of_all_ranks(skipped: Sequence[Skip]) -> list[Read]:
    """The samples of all ranks, with their readers."""
    of_ranks = enumerate(gather_objects(skipped))
    return [(reader, skip) for reader, part in of_ranks for skip in part]
