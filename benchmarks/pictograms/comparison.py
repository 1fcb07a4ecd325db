"""One method − another on the test sets, paired by seed and by picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.pictograms import records
from benchmarks.pictograms.cells import ZEROSHOT
from benchmarks.pictograms.markdown import points, span
from benchmarks.pictograms.stats import picture_interval, sign_test, t_interval

LEVEL = 0.01
"""Of the test whether a method is above chance."""
_TIE = 1e-9
"""Below it a difference is zero: a mean over seeds or towers need not cancel to the last bit."""
Record = Mapping[str, Any]
Sets = Mapping[str, tuple[np.ndarray, int]]
"""Test set -> its labels and the number of its classes."""


@dataclass(frozen=True)
class Difference:
    """Of the top-1 on a set, or of its mean over several.

    Attributes:
        seeds: The difference with each seed.
        pictures: For each set the difference of each picture's hits, averaged over the seeds; and the labels beside it.
        told: Whether one of the two methods is above chance.
    """

    seeds: list[float]
    pictures: list[tuple[np.ndarray, np.ndarray]]
    told: bool = True

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.seeds))

    @property
    def over_seeds(self) -> tuple[float, float]:
        """95 % interval: what other seeds would give."""
        return t_interval(self.seeds)

    @property
    def over_classes(self) -> tuple[float, float]:
        """95 % interval: what other classes and pictures would give."""
        return picture_interval(self.pictures)

    def shown(self) -> list[str]:
        """The mean and both intervals, in points."""
        return [points(self.mean), span(self.over_seeds), span(self.over_classes)]


def compared(ours: Mapping[int, Record], theirs: Mapping[int, Record], sets: Sets) -> dict[str, Difference]:
    """The difference on each set, over the seeds that both have; nothing without any.

    Args:
        ours: Seed -> the record of a method, one tower.
        theirs: Those of the other method.
        sets: The test sets' labels.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return {name: _on_set(name, [[of[s] for s in seeds] for of in (ours, theirs)], sets) for name in ZEROSHOT if seeds}


def _on_set(name: str, pairs: Sequence[Sequence[Record]], sets: Sets) -> Difference:
    labels, _ = sets[name]
    ours, theirs = ([records.unpack_bits(r["zeroshot"][name]["hits"], len(labels)) for r in of] for of in pairs)
    rows = [a.astype(float) - b for a, b in zip(ours, theirs, strict=True)]
    told = any(of[-1]["zeroshot"][name]["p"] <= LEVEL for of in pairs)  # the last one's is over all of these seeds
    return Difference([row.sum() / len(labels) for row in rows], [(np.mean(rows, axis=0), labels)], told)


def together(differences: Iterable[Difference], everything: bool = False) -> Difference | None:
    """The mean of those that are told from chance (or of ``everything``), if there are any."""
    kept = [d for d in differences if d.told or everything]
    if not kept:
        return None
    seeds = np.mean([d.seeds for d in kept], axis=0)
    return Difference(list(seeds), [pictures for d in kept for pictures in d.pictures])


def won_and_lost(differences: Sequence[float]) -> tuple[int, int]:
    """How many are above zero and how many below; what is level is neither."""
    return sum(d > _TIE for d in differences), sum(d < -_TIE for d in differences)


def counted(differences: Sequence[float]) -> str:
    """How many are positive, as text, with the sign test's p."""
    if not differences:
        return "0 of 0"
    n, (wins, losses) = len(differences), won_and_lost(differences)
    level = f", {n - wins - losses} level" if wins + losses < n else ""
    return f"{wins} of {n} ({100 * wins / n:.0f} %{level}, p = {sign_test(wins, losses):.3g})"
