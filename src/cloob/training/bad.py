"""Samples that cannot be used: counted by reason, named, and the end of the run once they are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from cloob.data.batch import Batch, Skip
from cloob.distributed import rank as own_rank
from cloob.errors import InputError
from cloob.training.ranks import Tally, gather_objects
from cloob.training.state.checkpoint import Progress
from cloob.training.validate import Validation
from cloob.training.watch.log import RunLog

logger = logging.getLogger(__name__)
# A handful of bad samples says nothing yet about the fraction.
_ENOUGH_BAD = 20
# So many without a usable one in between: a mount that has died, not one of many files that is bad.
_DEAD = 1000
# So many are named in each epoch: in a set of millions a fraction that is allowed would be a large file.
_NAMED = 1000


class BadSamples:
    """Counts the samples of an epoch that could not be used, and ends the run once there are too many.

    Args:
        progress: Keeps the counts, so that they survive a resumption.
        source: The source's name, for the error.
        limit: Largest fraction of bad samples.
        pairs: Samples of a whole epoch.
        log: Where they are named, the first thousand of each epoch.
    """

    def __init__(self, progress: Progress, source: str, limit: float, pairs: int, log: RunLog) -> None:
        self.progress = progress
        self.source = source
        self.limit = limit
        self.pairs = pairs
        self.log = log
        self._in_a_row = 0
        self._warned = -1  # the epoch
        self._examples: dict[str, str] = {}

    def count(self, batch: Batch, counts: Tally) -> None:
        """Takes note of a batch; once 20 samples were bad, errors as of ``check``."""
        reasons = self.progress.reasons
        for skip in batch.skipped:
            reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
            self._examples.setdefault(skip.reason, _example(skip))
        if counts.bad and self.progress.epoch_bad < _NAMED:
            self._name(batch)
        self.progress.epoch_good += counts.samples
        self.progress.epoch_bad += counts.bad
        self._in_a_row = 0 if counts.samples else self._in_a_row + counts.bad
        if self.progress.epoch_bad >= _ENOUGH_BAD:
            self.check()
            self._warn()

    def _name(self, batch: Batch) -> None:
        """Writes down which samples of all ranks were left out of the step that is about to be taken."""
        place = {"step": self.progress.step + 1, "epoch": self.progress.epoch + 1}
        for rank, skips in enumerate(gather_objects(batch.skipped)):
            for skip in skips[:_NAMED]:
                named = {"rank": rank, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
                self.log.write("skipped", place | named)

    def _warn(self) -> None:
        """Says once an epoch that more are bad so far than may be of the whole."""
        good, bad, epoch = self.progress.epoch_good, self.progress.epoch_bad, self.progress.epoch
        if bad > self.limit * (good + bad) and self._warned != epoch:
            self._warned = epoch
            if own_rank() == 0:
                most = int(self.limit * self.pairs)
                logger.warning(
                    "%s: %d of %d samples so far cannot be used; the run ends when more than %d of an epoch cannot",
                    *(self.source, bad, good + bad, most),
                )

    def check(self, *, ended: bool = False) -> None:
        """Compares the bad samples with the limit; every rank comes to the same answer.

        They are a fraction of the whole epoch, since the rest of it may be good. Once the epoch is over, or a thousand
        in a row were bad, they are one of the epoch so far.

        Args:
            ended: Whether the epoch is over: then one sample at least must have been usable, whatever the limit.

        Raises:
            InputError: It is above; the message gives each reason, how often, and an example.
        """
        good, bad = self.progress.epoch_good, self.progress.epoch_bad
        total = good + bad if ended or self._in_a_row >= _DEAD else max(good + bad, self.pairs)
        nothing = ended and bad > 0 and good == 0
        if bad <= self.limit * total and not nothing:
            return
        reasons = self.reasons()
        examples: dict[str, str] = {}
        for part in gather_objects(self._examples):
            examples = part | examples
        raise _too_many(f"{self.source}: {bad} of {good + bad} samples", nothing, self.limit, reasons, examples)

    def reasons(self) -> dict[str, int]:
        """The epoch's bad samples by reason, over all ranks, the most frequent first."""
        total: Counter[str] = Counter()
        for part in gather_objects(self.progress.reasons):
            total.update(part)
        return dict(total.most_common())


class BadHeldOut:
    """Names the held-out pairs that cannot be used, once in a run, and ends the run if there are too many.

    Args:
        source: Their name, for the error.
        limit: Largest fraction of bad ones.
        log: Where they are named, the first thousand.
        named: Whether they are named there already.
    """

    def __init__(self, source: str, limit: float, log: RunLog, named: bool) -> None:
        self.source = source
        self.limit = limit
        self.log = log
        self.named = named

    def check(self, validation: Validation, progress: Progress) -> None:
        """Looks at a validation; every rank comes to the same answer.

        Raises:
            InputError: The fraction is above the limit, or none can be used; the message gives each reason, how
                often, and an example.
        """
        if not self.named:
            place = {"step": progress.step, "epoch": progress.epoch + 1, "held_out": True}
            for rank, skip in validation.skipped[:_NAMED]:
                named = {"rank": rank, "key": skip.key, "reason": skip.reason, "detail": skip.detail}
                self.log.write("skipped", place | named)
                self.named = True
        skips = [skip for _, skip in validation.skipped]
        check_fraction(self.source, "held-out pairs", skips, validation.pairs, self.limit)


def check_fraction(source: str, kind: str, skips: Sequence[Skip], total: int, limit: float) -> None:
    """Compares the fraction of a whole set that cannot be used with the limit.

    Args:
        source: The set's name, for the error.
        kind: What its members are called in it.
        skips: Those that cannot be used.
        total: How many there are, usable or not.
        limit: Largest fraction of bad ones.

    Raises:
        InputError: It is above, or none can be used; the message gives each reason, how often, and an example.
    """
    bad = len(skips)
    nothing = bad > 0 and bad == total
    if bad <= limit * total and not nothing:
        return
    reasons: dict[str, int] = dict(Counter(skip.reason for skip in skips).most_common())
    examples: dict[str, str] = {skip.reason: _example(skip) for skip in reversed(skips)}
    raise _too_many(f"{source}: {bad} of {total} {kind}", nothing, limit, reasons, examples)


def _example(skip: Skip) -> str:
    return f"{skip.key}: {skip.detail}" if skip.detail else skip.key


def _too_many(
    what: str, nothing: bool, limit: float, reasons: Mapping[str, int], examples: Mapping[str, str]
) -> InputError:
    why = "which leaves none" if nothing and limit == 1 else f"more than max_bad_fraction = {limit:g} allows"
    listed = "; ".join(f"{n} {reason} (e.g. {examples.get(reason, '?')})" for reason, n in reasons.items())
    return InputError(f"{what} cannot be used, {why}: {listed}")
