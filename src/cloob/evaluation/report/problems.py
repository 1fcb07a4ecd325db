"""What is not as it should be: what is not there, could not be loaded, not be measured, or not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloob.evaluation.report import numbers

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
    failures = [Problem(entry["set"], entry["model"], _message(entry)) for entry in results.get("failures", ())]
    return Problems(
        missing=tuple(problem for problem in failures if problem.model is None),
        unloaded=tuple(problem for problem in failures if problem.model is not None and problem.set is None),
        failed=tuple(problem for problem in failures if problem.model is not None and problem.set is not None),
        unreadable=_unreadable(results["rows"]),
    )


def _message(entry: Mapping[str, Any]) -> str:
    """The error without the set's or the model's name in front, which stands in a column of its own."""
    return str(entry["error"]).removeprefix(f"{entry['set'] or entry['model']}: ")


def _unreadable(rows: Sequence[Mapping[str, Any]]) -> tuple[Problem, ...]:
    models_by_problem: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for key, (what, total_keys, fate) in _PARTS.items():
            for name, values in numbers.part(row, key).items():
                if counts := values.get("unreadable"):
                    of = f" of {numbers.count(sum(values[k] for k in total_keys))}" if total_keys else ""
                    reasons = ", ".join(f"{reason} × {number}" for reason, number in sorted(counts.items()))
                    total = numbers.count(sum(counts.values()))
                    message = f"{total}{of} {what} could not be read ({reasons}); {fate}"
                    models_by_problem.setdefault((name, message), {})[row["model"]] = None
    return tuple(
        Problem(name, model, message)
        for (name, message), models in models_by_problem.items()
        for model in ([None] if len(models) == len(rows) else models)
    )
