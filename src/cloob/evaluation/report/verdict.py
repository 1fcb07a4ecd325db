"""The headline of the report: which model is ahead, by how much, and whether that is
clear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from cloob.evaluation.report.tables import METRICS, percent, points
from cloob.evaluation.results import Results, Row, Section

# section of a row -> the metric of the headline, and how many answers there are to
# guess from
_HEADLINES: dict[Section, tuple[str, str]] = {
    "zeroshot": ("acc1", "n_classes"),
    "retrieval": ("text_to_image@1", "n_images"),
    "vectors": ("a_to_b@1", "n_ids"),
}


class Estimate(NamedTuple):
    """A fraction, or a difference of two, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Headline:
    """The metric that models are compared by."""

    metric: str
    values: Mapping[str, Mapping[str, Estimate]]  # model -> set -> estimate
    guessing: Mapping[str, float]  # set -> what guessing gives
    sets: Sequence[str]  # that every model was measured on

    @property
    def words(self) -> str:
        """What the metric is called."""
        return METRICS[self.metric]

    @property
    def where(self) -> str:
        """The sets, in a sentence."""
        if len(self.sets) == 1:
            return f"on {self.sets[0]}"
        return f"on average over {len(self.sets)} sets"

    def mean(self, model: str) -> float:
        """The mean over the sets that all models share."""
        return mean(self.values[model][name].value for name in self.sets)

    def is_guess(self, model: str) -> bool:
        """Whether the interval of the mean includes guessing; distances of independent
        sets add squared.
        """
        estimates = [self.values[model][name] for name in self.sets]
        below = math.hypot(*(each.value - each.low for each in estimates))
        guessed = sum(self.guessing[name] for name in self.sets)
        return sum(each.value for each in estimates) - below <= guessed

    @property
    def top(self) -> float:
        """The end of a scale that starts at 0 and holds all intervals."""
        ends = [each.high for sets in self.values.values() for each in sets.values()]
        return max(*ends, *self.guessing.values())


def find_headline(rows: Sequence[Row]) -> Headline | None:
    """Zero-shot top-1 if it was measured, else text → image recall@1 or that of a → b,
    else None.
    """
    for section, (metric, n_choices) in _HEADLINES.items():
        values: dict[str, dict[str, Estimate]] = {}
        guessing: dict[str, float] = {}
        for row in rows:
            for name, numbers in row.get(section, {}).items():
                estimate = Estimate(numbers[metric], *numbers[f"{metric}_interval"])
                values.setdefault(row["model"], {})[name] = estimate
                guessing[name] = 1 / numbers[n_choices]
        shared = [
            name for name in guessing if all(name in sets for sets in values.values())
        ]
        if shared:
            return Headline(metric, values, guessing, shared)
    return None


def find_leads(
    results: Results, metric: str, model: str, other: str
) -> dict[str | None, Estimate]:
    """Set (None: their mean) -> by how much a model is ahead of another."""
    leads = {}
    for entry in results["differences"]:
        value, low, high = entry["difference"], entry["low"], entry["high"]
        pair = entry["metric"], entry["model"], entry["baseline"]
        if pair == (metric, model, other):
            leads[entry["set"]] = Estimate(value, low, high)
        elif pair == (metric, other, model):
            leads[entry["set"]] = Estimate(-value, -high, -low)
    return leads


@dataclass(frozen=True)
class Verdict:
    """One sentence, what supports it, and the two best models with the lead of the
    first by set.
    """

    title: str
    detail: str
    leader: str | None = None
    runner_up: str | None = None
    leads: Mapping[str | None, Estimate] | None = None


def find_verdict(results: Results, headline: Headline | None) -> Verdict:
    """Which model is ahead, and by how much.

    Two models do not differ clearly if the interval of their difference includes zero.
    No model leads if the best one's interval includes guessing.
    """
    if headline is None:
        return Verdict("Nothing to compare yet", "No set was measured by all models.")
    order = sorted(headline.values, key=headline.mean, reverse=True)
    best = order[0]
    if len(order) == 1:
        title = f"{best}: {percent(headline.mean(best))}\u00a0% {headline.words}"
        if headline.is_guess(best):
            title += ", no clear difference from guessing"
        return Verdict(title, f"Measured {headline.where}.")

    second = order[1]
    leads = find_leads(results, headline.metric, best, second)
    lead = leads[headline.sets[0] if len(headline.sets) == 1 else None]
    if headline.is_guess(best):
        title = "No clear difference from guessing"
    elif lead.low > 0:
        title = f"{best} is ahead of {second}"
    else:
        title = f"No clear difference between {best} and {second}"
    means = [f"{percent(headline.mean(model))}\u00a0%" for model in (best, second)]
    detail = (
        f"{' against '.join(means)} {headline.words} {headline.where}:"
        f" {points(lead.value)} points, {100 * results['level']:g}\u00a0% interval"
        f" {points(lead.low)} to {points(lead.high)},"
        f" {'clear of zero' if lead.low > 0 else 'which includes zero'}."
    )
    return Verdict(title, detail, best, second, leads)
