"""The headline: which model is ahead, by how much, whether the intervals allow saying so, and its chart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cloob.evaluation.report.numbers import METRICS, Row, count, part, percent, points
from cloob.evaluation.report.plots import nice_ticks, tick_text

_KINDS = (("zeroshot", "acc1", "n_classes"), ("retrieval", "text_to_image@1", "n_images"))


class Estimate(NamedTuple):
    """A fraction, or a difference of two, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measure:
    """The number that the headline compares: model -> set -> estimate, and what guessing gives on each set."""

    key: str
    values: Mapping[str, Mapping[str, Estimate]]
    guessing: Mapping[str, float]

    @property
    def name(self) -> str:
        """What the page calls it."""
        return METRICS[self.key]

    @property
    def sets(self) -> list[str]:
        """The sets that every model was measured on."""
        first, *others = self.values.values()
        return [name for name in first if all(name in other for other in others)]

    def mean(self, model: str) -> float:
        """Mean over ``sets``."""
        return sum(self.values[model][name].value for name in self.sets) / len(self.sets)

    def is_guessing(self, model: str) -> bool:
        """Whether the interval of the mean holds what guessing gives; distances of independent sets add squared."""
        estimates = [self.values[model][name] for name in self.sets]
        below = math.hypot(*(each.value - each.low for each in estimates))
        return sum(each.value for each in estimates) - below <= sum(self.guessing[name] for name in self.sets)


def measure(rows: Sequence[Row]) -> Measure | None:
    """Zero-shot top-1 if it was measured, else text → image recall@1, else None."""
    for kind, key, choices in _KINDS:
        values: dict[str, dict[str, Estimate]] = {}
        guessing: dict[str, float] = {}
        for row in rows:
            for name, numbers in part(row, kind).items():
                values.setdefault(row["model"], {})[name] = Estimate(numbers[key], *numbers[f"{key}_interval"])
                guessing[name] = 1 / numbers[choices]
        if values and (found := Measure(key, values, guessing)).sets:
            return found
    return None


def difference(results: Mapping[str, Any], key: str, model: str, baseline: str, name: str | None) -> Estimate | None:
    """``model − baseline`` on a set, or on the mean of the sets, from ``results["differences"]``."""
    for entry in results["differences"]:
        sign = {(model, baseline): 1, (baseline, model): -1}.get((entry["model"], entry["baseline"]))
        if entry["metric"] == key and entry["set"] == name and sign:
            return Estimate(sign * entry["difference"], *sorted((sign * entry["low"], sign * entry["high"])))
    return None


class Verdict(NamedTuple):
    """One sentence, the facts behind it, and the two best models."""

    title: str
    detail: str
    leader: str | None = None
    runner_up: str | None = None


def verdict(results: Mapping[str, Any], what: Measure | None) -> Verdict:
    """Which model is ahead, and by how much.

    Two models do not differ clearly if the interval of their difference holds zero. No model leads if the best one's
    interval holds what guessing gives.
    """
    if what is None:
        return _geometry_verdict(results["rows"])
    sets = what.sets
    where = f"on {sets[0]}" if len(sets) == 1 else f"on average over {len(sets)} sets"
    order = sorted(what.values, key=what.mean, reverse=True)
    guessing = [model for model in order if what.is_guessing(model)]
    if len(order) == 1:
        title = f"{order[0]}: {percent(what.mean(order[0]))}\u00a0% {what.name}"
        return Verdict(title + (", no clear difference from guessing" if guessing else ""), f"Measured {where}.")
    a, b = order[:2]
    on = sets[0] if len(sets) == 1 else None
    gaps = {other: gap for other in order[1:] if (gap := difference(results, what.key, a, other, on))}
    sentences = [
        f"{percent(what.mean(a))}\u00a0% against {percent(what.mean(b))}\u00a0% {what.name} {where}: "
        f"{points(gaps[b].value)} points, {100 * results['level']:g}\u00a0% interval {points(gaps[b].low)} to "
        f"{points(gaps[b].high)}, {'clear of zero' if gaps[b].low > 0 else 'which includes zero'}"
    ]
    if len(sets) > 1:
        wins = sum(what.values[a][name].value > what.values[b][name].value for name in sets)
        sentences.append(f"Ahead of {b} on {wins} of {len(sets)} sets")
    if guessing and a not in guessing:
        sentences.append(f"Not clearly above guessing: {_listed(guessing)}")
    sentences += _elsewhere(results, what.key, a)
    return Verdict(_title(what, order, gaps, a in guessing), f"{'. '.join(sentences)}.", a, b)


def _elsewhere(results: Mapping[str, Any], key: str, leader: str, most: int = 3) -> list[str]:
    """Other measures by which the leader differs clearly from another model."""
    sentences = []
    for entry in results["differences"]:
        models = [entry["model"], entry["baseline"]]
        clear = entry["low"] > 0 or entry["high"] < 0
        if not clear or entry["metric"] == key or entry["set"] is None or leader not in models:
            continue
        other = models[1 - models.index(leader)]
        ahead = (entry["difference"] > 0) == (leader == entry["model"])
        by = points(abs(entry["difference"])).removeprefix("+")
        side = "ahead of" if ahead else "behind"
        sentences.append(f"{leader} is {side} {other} by {by} points in {METRICS[entry['metric']]} on {entry['set']}")
    return sentences[:most]


def _title(what: Measure, order: Sequence[str], gaps: Mapping[str, Estimate], guessing: bool) -> str:
    """The headline of several models, best first."""
    a, b, *_ = order
    level = [other for other, gap in gaps.items() if gap.low <= 0]
    if guessing:
        return "No clear difference from guessing"
    if what.mean(a) == what.mean(b):
        return f"{a} and {b} are level"
    if level == list(order[1:]):
        return f"No clear difference between {_listed(order)}"
    if b in level:
        behind = [other for other in order[1:] if other not in level]
        are = "is" if len(behind) == 1 else "are"
        return f"No clear difference between {_listed([a, *level])}; {_listed(behind)} {are} behind"
    return f"{a} is ahead of {b}" if len(order) == 2 else f"{a} leads, {b} follows"


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _geometry_verdict(rows: Sequence[Row]) -> Verdict:
    """Whose image embeddings use most directions, if only the geometry was measured."""
    found: dict[str, tuple[str, float]] = {}
    for row in rows:
        for name, values in part(row, "geometry").items():
            found.setdefault(row["model"], (name, values["effective_eigenvalues_image"]))
    if not found:
        return Verdict("Nothing to compare yet", "The results hold neither zero-shot nor retrieval numbers.")
    first, *others = sorted(found, key=lambda model: -found[model][1])
    title = f"{first}: {count(found[first][1])} effective eigenvalues"
    if others:
        equal = found[first][1] == found[others[0]][1]
        title = f"{first}’s image embeddings use the most directions"
        title = f"{first} and {others[0]} use equally many directions" if equal else title
    counts = ", ".join(f"{model} {count(found[model][1])}" for model in (first, *others))
    return Verdict(title, f"Effective eigenvalues of the image embeddings on {found[first][0]}: {counts}.")


class Span(NamedTuple):
    """A dot with its interval on a horizontal track; positions are percentages of the track's width."""

    model: str
    colour: int
    text: str
    interval: str
    at: float
    low: float
    width: float


class ForestRow(NamedTuple):
    """One set: a span per model, where guessing lies, and the difference of the two best models."""

    name: str
    spans: list[Span]
    chance: float | None
    difference: Span | None


class Forest(NamedTuple):
    """Every set on one scale; ticks are (position in %, text)."""

    rows: list[ForestRow]
    ticks: list[tuple[float, str]]
    difference_ticks: list[tuple[float, str]]


def forest(results: Mapping[str, Any], what: Measure, colours: Mapping[str, int], verdict: Verdict) -> Forest:
    """Lays out the headline's number for every set and model, and the difference of the two best."""
    a, b = verdict.leader, verdict.runner_up
    names = list(dict.fromkeys(name for of_set in what.values.values() for name in of_set))
    top = _ceiling(max(max(each) for of_set in what.values.values() for each in of_set.values()))
    gaps = {name: gap for name in names if a and b and (gap := difference(results, what.key, a, b, name))}
    reach = _ceiling(max((abs(end) for gap in gaps.values() for end in gap), default=0.0))
    rows = []
    for name in names:
        spans = [
            _span(model, colours[model], of_set[name], (0.0, top), percent)
            for model, of_set in what.values.items()
            if name in of_set
        ]
        gap_span = None
        if (gap := gaps.get(name)) and a and b:
            ahead = a if gap.value >= 0 else b
            gap_span = _span(ahead, colours[ahead], gap, (-reach, reach), points)
        guess = what.guessing[name]
        rows.append(ForestRow(name, spans, round(100 * guess / top, 2) if guess <= top else None, gap_span))
    ticks = [(100 * t / top, tick_text(round(100 * t, 6))) for t in nice_ticks(0.0, top, 4)]
    gap_ticks = [(50 + 50 * t / reach, tick_text(round(100 * t, 6))) for t in nice_ticks(-reach, reach, 4)]
    return Forest(rows, ticks, gap_ticks)


def _ceiling(value: float) -> float:
    """A round number a little above ``value``, as the end of an axis of fractions."""
    value = max(value, 0.001) * 1.04
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(m * power for m in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value))


def _span(
    model: str, colour: int, found: Estimate, axis: tuple[float, float], form: Callable[[float | None], str]
) -> Span:
    at, low, high = (round(min(max(100 * (x - axis[0]) / (axis[1] - axis[0]), 0.0), 100.0), 2) for x in found)
    interval = f"{form(found.low)} to {form(found.high)}"
    return Span(model, colour, form(found.value), interval, at, low, round(high - low, 2))
