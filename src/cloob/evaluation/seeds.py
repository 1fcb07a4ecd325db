"""Runs that differ by their seed alone: mean and standard deviation over seeds, and paired differences.

A bootstrap interval shows what other test samples would give; the deviation here shows what other seeds would give.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from cloob.evaluation.report.tables import METRICS, Row, set_names

_KINDS = {"zeroshot": ("acc1",), "probe": ("acc1",), "retrieval": tuple(METRICS), "vectors": tuple(METRICS)}


def over_seeds(rows: Sequence[Row], groups: Mapping[str, Mapping[int, str]]) -> list[dict[str, Any]]:
    """Means over seeds of the accuracies and recalls of each group of models, by set.

    Args:
        rows: Results, one row a model.
        groups: Name of a group -> its models by seed.

    Returns:
        Entries with ``group``, ``metric``, ``set`` (None: the mean of the sets), ``mean``, ``sd`` (n − 1 in the
        denominator; None for one seed) and ``n``. With ``minus``, another group, the numbers are of the differences
        between the two models of a seed, for the seeds that both groups have.
    """
    by_model = {row["model"]: row for row in rows}
    entries = []
    for metric, name, numbers in _numbers(rows):
        values = {
            group: {seed: numbers[model] for seed, model in models.items() if model in by_model and model in numbers}
            for group, models in groups.items()
        }
        what = {"metric": metric, "set": name}
        entries += [
            {"group": group, **what, **_spread(list(found.values()))} for group, found in values.items() if found
        ]
        for one, other in itertools.combinations(values, 2):
            gaps = [values[other][seed] - values[one][seed] for seed in values[one].keys() & values[other].keys()]
            entries += [{"group": other, "minus": one, **what, **_spread(gaps)}] if gaps else []
    return entries


def _numbers(rows: Sequence[Row]) -> Iterator[tuple[str, str | None, dict[str, float]]]:
    """Each metric and set with its number for each model, then the metric's mean over the sets that all models have."""
    for kind, keys in _KINDS.items():
        for key in keys:
            metric = f"probe_{key}" if kind == "probe" else key
            found = {
                name: {row["model"]: row[kind][name][key] for row in rows if key in row.get(kind, {}).get(name, {})}
                for name in set_names(rows, kind)
            }
            found = {name: numbers for name, numbers in found.items() if numbers}
            yield from ((metric, name, numbers) for name, numbers in found.items())
            shared = [numbers for numbers in found.values() if len(numbers) == len(rows)]
            if len(shared) > 1:
                yield metric, None, {model: mean(numbers[model] for numbers in shared) for model in shared[0]}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def seed_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each entry, in percent and percentage points."""
    lines = []
    for entry in entries:
        what = f"{METRICS[entry['metric']]}, {entry['set'] or 'mean of the sets'}"
        sign = "+" if "minus" in entry else ""
        value = f"{100 * entry['mean']:{sign}.2f}" + (f" ± {100 * entry['sd']:.2f}" if entry["sd"] is not None else "")
        who = f"{entry['group']} − {entry['minus']}" if "minus" in entry else entry["group"]
        lines.append(f"{who}: {what} {value} (n = {entry['n']})")
    return lines
