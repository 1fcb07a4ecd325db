"""The headline: who is ahead, by how much, whether one may say so, and the picture of it. No HTML here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluation.report.numbers import METRICS, Row, count, number, part, percent, points
from cloob.evaluation.report.plots import nice_ticks, tick_text


@dataclass(frozen=True)
class Measure:
    """The number that the headline compares, as model -> set -> (value, interval)."""

    key: str
    name: str
    values: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]]

    @property
    def sets(self) -> list[str]:
        """Sets on which every compared model has a number."""
        every = list(self.values.values())
        return [name for name in every[0] if all(name in other for other in every)] if every else []

    def mean(self, model: str) -> float:
        """Mean over ``sets``."""
        return sum(self.values[model][name][0] for name in self.sets) / len(self.sets)


def measure(rows: Sequence[Row]) -> Measure | None:
    """Zero-shot top-1 where it was measured, else text → image recall@1; None when there is neither."""
    options = (
        ("zeroshot", "acc1", "zero-shot top-1"),
        ("retrieval", "text_to_image@1", "text → image recall@1"),
    )
    for kind, key, name in options:
        values: dict[str, dict[str, tuple[float, tuple[float, float]]]] = {}
        for row in rows:
            for set_name, numbers in part(row, kind).items():
                low, high = numbers[f"{key}_interval"]
                values.setdefault(row["model"], {})[set_name] = (numbers[key], (low, high))
        result = Measure(key, name, values)
        if result.sets:
            return result
    return None


@dataclass(frozen=True)
class Difference:
    """``model − baseline`` on a set or on the mean of the sets, as a fraction, with its interval."""

    value: float
    interval: tuple[float, float]


def difference(
    results: Mapping[str, Any], what: Measure, model: str, baseline: str, set_name: str | None
) -> Difference | None:
    """Looks a paired difference up in ``results["differences"]``, either way round; None where one has no number."""
    for entry in results["differences"]:
        sign = {(model, baseline): 1, (baseline, model): -1}.get((entry["model"], entry["baseline"]))
        if entry["metric"] == what.key and entry["set"] == set_name and sign:
            low, high = sorted((sign * entry["low"], sign * entry["high"]))
            return Difference(sign * entry["difference"], (low, high))
    return None


@dataclass(frozen=True)
class Verdict:
    """The headline: one sentence, and the facts that carry it."""

    title: str
    detail: str
    leader: str | None
    runner_up: str | None


def verdict(results: Mapping[str, Any], what: Measure | None) -> Verdict:
    """Who is ahead, by how much, and whether the intervals allow to say so.

    There is no clear difference where the interval of the difference holds zero, and none from guessing where that of
    the best model holds what guessing would give.
    """
    if what is None:
        return _geometry_verdict(results["rows"])
    sets = what.sets
    where = f"on {sets[0]}" if len(sets) == 1 else f"on average over {len(sets)} sets"
    order = sorted(what.values, key=what.mean, reverse=True)
    guessing = [model for model in order if _holds_guessing(results["rows"], what, model)]
    if len(order) == 1:
        title = f"{order[0]}: {percent(what.mean(order[0]))}\u00a0% {what.name}"
        title += ", no clear difference from guessing" if guessing else ""
        return Verdict(title, f"Measured {where}.", None, None)
    a, b = order[:2]
    found = {other: difference(results, what, a, other, sets[0] if len(sets) == 1 else None) for other in order[1:]}
    gaps = {other: gap for other, gap in found.items() if gap}  # all: every model has a number on each of these sets
    scores = f"{percent(what.mean(a))}\u00a0% against {percent(what.mean(b))}\u00a0% {what.name} {where}"
    low, high = gaps[b].interval
    detail = f"{scores}: {points(gaps[b].value)} points"
    detail += f", {100 * results['level']:g}\u00a0% interval {points(low)} to {points(high)}"
    detail += ", clear of zero" if low > 0 else ", which includes zero"
    if len(sets) > 1:
        wins = sum(what.values[a][s][0] > what.values[b][s][0] for s in sets)
        detail += f". Ahead of {b} on {wins} of {len(sets)} sets"
    if guessing and a not in guessing:
        detail += f". Not clearly above guessing: {_listed(guessing)}"
    detail += "".join(f". {sentence}" for sentence in _elsewhere(results, what, a))
    return Verdict(_title(what, order, gaps, a in guessing), f"{detail}.", a, b)


def _elsewhere(results: Mapping[str, Any], what: Measure, leader: str, most: int = 3) -> list[str]:
    """Where else the leader differs clearly from another model: by other measures, as a sentence each."""
    found = []
    for entry in results["differences"]:
        pair = entry["model"], entry["baseline"]
        if entry["low"] <= 0 <= entry["high"] or entry["metric"] == what.key:
            continue
        if leader not in pair or entry["set"] is None:
            continue
        value = entry["difference"] if pair[0] == leader else -entry["difference"]
        other = pair[1] if pair[0] == leader else pair[0]
        side, by = "ahead of" if value > 0 else "behind", points(abs(value)).removeprefix("+")
        found.append(f"{leader} is {side} {other} by {by} points in {METRICS[entry['metric']]} on {entry['set']}")
    return found[:most]


def _title(what: Measure, order: Sequence[str], gaps: Mapping[str, Difference], at_guessing: bool) -> str:
    """The headline of two models or more, best first."""
    a, b, *_ = order
    level = [other for other, gap in gaps.items() if gap.interval[0] <= 0]
    if at_guessing:
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


def _holds_guessing(rows: Sequence[Row], what: Measure, model: str) -> bool:
    """Whether a model's interval on the only set holds what guessing would give."""
    if len(what.sets) != 1:
        return False
    return what.values[model][what.sets[0]][1][0] <= guessing_level(rows, what.sets[0])


def _geometry_verdict(rows: Sequence[Row]) -> Verdict:
    """Whose image embeddings use most directions, where nothing but the geometry was measured."""
    eigenvalues: dict[str, tuple[str, float]] = {}
    for row in rows:
        for name, values in part(row, "geometry").items():
            value = number(values.get("effective_eigenvalues_image"))
            if value is not None:
                eigenvalues.setdefault(row["model"], (name, value))
    if not eigenvalues:
        detail = "The results hold neither zero-shot nor retrieval numbers."
        return Verdict("Nothing to compare yet", detail, None, None)
    order = sorted(eigenvalues, key=lambda model: -eigenvalues[model][1])
    first = order[0]
    title = f"{first}: {count(eigenvalues[first][1])} effective eigenvalues"
    if len(order) > 1:
        title = f"{first}’s image embeddings use the most directions"
        if eigenvalues[first][1] == eigenvalues[order[1]][1]:
            title = f"{first} and {order[1]} use equally many directions"
    counts = ", ".join(f"{model} {count(eigenvalues[model][1])}" for model in order)
    detail = f"Effective eigenvalues of the image embeddings on {eigenvalues[first][0]}: {counts}."
    return Verdict(title, detail, None, None)


@dataclass(frozen=True)
class Span:
    """A dot with its interval on a horizontal track; positions are percentages of the track's width."""

    model: str
    colour: int
    text: str
    interval: str
    at: float
    low: float
    width: float


@dataclass(frozen=True)
class ForestRow:
    """One set: a span per model, the difference of the two best models, and the level of guessing."""

    name: str
    spans: tuple[Span, ...]
    chance: float | None
    difference: Span | None


@dataclass(frozen=True)
class Forest:
    """Every set on one scale; ``ticks`` and ``difference_ticks`` are (position in %, text)."""

    rows: tuple[ForestRow, ...]
    ticks: tuple[tuple[float, str], ...]
    difference_ticks: tuple[tuple[float, str], ...]


def forest(results: Mapping[str, Any], what: Measure, colours: Mapping[str, int], verdict: Verdict) -> Forest:
    """Lays out the headline's number for every set and model, and the difference between the two best."""
    leader, runner_up = verdict.leader, verdict.runner_up
    names = list(dict.fromkeys(name for by_set in what.values.values() for name in by_set))
    entries = [entry for by_set in what.values.values() for entry in by_set.values()]
    ends = [end for value, pair in entries for end in (value, *pair)]
    top = _ceiling(max(ends))
    gaps = {name: difference(results, what, leader, runner_up, name) for name in names if leader and runner_up}
    gap_ends = [end for gap in gaps.values() if gap for end in (gap.value, *gap.interval)]
    reach = _ceiling(max(map(abs, gap_ends), default=0.0))
    rows = []
    for name in names:
        spans = tuple(
            _span(model, colours[model], *by_set[name], (0.0, top), percent)
            for model, by_set in what.values.items()
            if name in by_set
        )
        gap = gaps.get(name)
        gap_span = None
        if gap and leader and runner_up:
            ahead = leader if gap.value >= 0 else runner_up
            gap_span = _span(ahead, colours[ahead], gap.value, gap.interval, (-reach, reach), points)
        rows.append(ForestRow(name, spans, _chance(results["rows"], name, top), gap_span))
    ticks = tuple((100 * t / top, tick_text(round(100 * t, 6))) for t in nice_ticks(0.0, top, 4))
    gap_ticks = tuple((50 + 50 * t / reach, tick_text(round(100 * t, 6))) for t in nice_ticks(-reach, reach, 4))
    return Forest(tuple(rows), ticks, gap_ticks)


def _ceiling(value: float) -> float:
    """A round number a little above ``value``, as the end of an axis of fractions."""
    value = max(value, 0.001) * 1.04
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(m * power for m in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value))


def _span(
    model: str,
    colour: int,
    value: float,
    pair: tuple[float, float],
    axis: tuple[float, float],
    form: Callable[[float | None], str],
) -> Span:
    def at(x: float) -> float:
        return round(min(max(100 * (x - axis[0]) / (axis[1] - axis[0]), 0.0), 100.0), 2)

    low, high = pair
    return Span(
        model, colour, form(value), f"{form(low)} to {form(high)}", at(value), at(low), round(at(high) - at(low), 2)
    )


def guessing_level(rows: Sequence[Row], name: str) -> float:
    """The share that guessing gets right: one of the classes, or of the images that are searched."""
    labelled = [part(row, "zeroshot")[name]["n_classes"] for row in rows if name in part(row, "zeroshot")]
    searched = [part(row, "retrieval")[name]["n_images"] for row in rows if name in part(row, "retrieval")]
    return 1 / float((labelled or searched)[0])


def _chance(rows: Sequence[Row], name: str, top: float) -> float | None:
    """Where guessing lies on the track, in %; None where that is beyond its end."""
    guess = guessing_level(rows, name)
    return round(100 * guess / top, 2) if guess <= top else None
