"""What is not as it should be: what is not there, could not be loaded, not be measured, or not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluate.report import numbers

# results.json's part -> what its count is of, where the numbers stand that make up the total, and what became of those
_PARTS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "zeroshot": ("images", ("n",), "they count as wrong"),
    "retrieval": ("images or captions", ("n_images", "n"), "they count as not found"),
    "geometry": ("images or captions", (), "they are in no measure"),
}


@dataclass(frozen=True)
class Problem:
    """One line: the set (None: the model could not be loaded), the model (None: all of them), and what happened."""

    set: str | None
    model: str | None
    message: str


@dataclass(frozen=True)
class Problems:
    """All of them, by kind."""

    missing: tuple[Problem, ...]
    unloaded: tuple[Problem, ...]
    failed: tuple[Problem, ...]
    unreadable: tuple[Problem, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unloaded or self.failed or self.unreadable)

    @property
    def summary(self) -> str:
        """One line for the head of the page."""
        kinds = (
            (self.missing, "set is not there", "sets are not there"),
            (self.unloaded, "model could not be loaded", "models could not be loaded"),
            (self.failed, "measurement failed", "measurements failed"),
            (self.unreadable, "set could not be read in full", "sets could not be read in full"),
        )
        counts = [f"{len(of_kind)} {one if len(of_kind) == 1 else many}" for of_kind, one, many in kinds if of_kind]
        return "; ".join(counts) + "."


def problems(results: Mapping[str, Any]) -> Problems:
    """Reads them out of results.json; what could not be read is the same for every model and is told once."""
    entries = [entry for entry in results.get("failures") or () if isinstance(entry, Mapping)]
    failures = [Problem(entry.get("set"), entry.get("model"), _message(entry)) for entry in entries]
    return Problems(
        missing=tuple(problem for problem in failures if problem.model is None),
        unloaded=tuple(problem for problem in failures if problem.model is not None and problem.set is None),
        failed=tuple(problem for problem in failures if problem.model is not None and problem.set is not None),
        unreadable=_unreadable(results["rows"]),
    )


def _message(entry: Mapping[str, Any]) -> str:
    """The error without the set's or the model's name in front, which stands in a column of its own."""
    name = entry.get("set") or entry.get("model")
    return str(entry.get("error")).removeprefix(f"{name}: ")


def _unreadable(rows: Sequence[Mapping[str, Any]]) -> tuple[Problem, ...]:
    where_by_problem: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for key, (what, total_keys, fate) in _PARTS.items():
            for name, values in numbers.part(row, key).items():
                counts = values.get("unreadable")
                if not isinstance(counts, Mapping) or not counts:
                    continue
                total = numbers.count(float(sum(int(n) for n in counts.values())))
                sizes = [n for n in map(numbers.number, map(values.get, total_keys)) if n is not None]
                of = f" of {numbers.count(sum(sizes))}" if sizes and len(sizes) == len(total_keys) else ""
                reasons = ", ".join(f"{reason} × {number}" for reason, number in sorted(counts.items()))
                message = f"{total}{of} {what} could not be read ({reasons}); {fate}"
                where_by_problem.setdefault((name, message), []).append((str(row["model"]), key))
    models = {str(row["model"]) for row in rows}
    result = []
    for (name, message), where in where_by_problem.items():
        if {model for model, _ in where} == models:
            result.append(Problem(name, None, message))
        else:
            result += [Problem(name, model, message) for model, _ in where]
    return tuple(result)
