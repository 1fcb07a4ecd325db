"""What ``trainer.pt`` may say: names, kinds and ranges, looked at before a run goes on from any of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError
from cloob.train.state.checkpoint import FORMAT, Progress
from cloob.train.state.rng import is_rng_state

_MOST = 1 << 62  # of anything that is counted
_MOST_LANES = 1 << 16  # no run has more processes, and an order takes time for each
_MOST_PAIRS = 1 << 31  # of a batch
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def check_state(file: Path, state: Any) -> dict[str, Any]:
    """The state that a ``trainer.pt`` holds, if every part is of the kind and in the range of what a run writes.

    Whether it is of the run that goes on (its parameters, its data, its objective) is not looked at.

    Args:
        file: For errors.
        state: What was read of it.

    Raises:
        InputError: It has another format, or a part that is missing, of another kind or out of range.
    """
    if not isinstance(state, dict) or not _is_count(state.get("format"), FORMAT, FORMAT):
        raise InputError(f"{file}: is not of format {FORMAT}, which this version reads")
    for part, sound in _looked_at(state):
        if not sound:
            raise InputError(f"{file}: its {part} is missing or damaged; use an earlier checkpoint")
    return state


def _looked_at(state: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each part and whether it can be gone on from; those that came after the first version may be missing."""
    for part in ("optimizer", "objective", "progress"):
        yield part, isinstance(state.get(part), dict)
    for part in ("data", "stepper", "weights", "average"):
        yield part, isinstance(state.get(part, {}), dict)
    yield "batch_size", _is_count(state.get("batch_size"), 1, _MOST_PAIRS)
    yield "pairs", _is_count(state.get("pairs", 1), 1)
    yield "best", isinstance(state.get("best", ""), str)
    yield from _progress(state["progress"])
    yield "rng", isinstance(state.get("rng"), list) and all(is_rng_state(rank) for rank in state["rng"])
    for part in ("objective", "weights"):
        yield part, all(isinstance(key, str) and isinstance(of, Tensor) for key, of in state.get(part, {}).items())
    for fingerprint in state.get("data", {}).values():
        yield "data", isinstance(fingerprint, dict)
        yield "data", all(isinstance(key, str) and key.isprintable() for key in fingerprint)
        yield "data", all(isinstance(value, str) or _is_count(value) for value in fingerprint.values())
    yield "average", "average" not in state or _is_count(state["average"].get("updates"))
    scaler = state.get("stepper", {}).get("scaler", {})
    yield "stepper", isinstance(scaler, dict) and scaler.keys() in (set(), _SCALER)
    yield "stepper", all(isinstance(value, int | float) and 0 <= value < _MOST for value in scaler.values())
    yield "optimizer", _is_optimizer(state["optimizer"])


def _progress(progress: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    known = vars(Progress())
    for key, value in progress.items():
        part = f"progress.{key}" if key in known else "progress"
        if isinstance(known.get(key), float):
            yield part, isinstance(value, float) and math.isfinite(value)
        elif isinstance(known.get(key), dict):
            yield part, isinstance(value, dict) and all(isinstance(reason, str) for reason in value)
            yield part, all(map(_is_count, value.values()))
        elif isinstance(known.get(key), str):
            yield part, isinstance(value, str)
        else:
            yield part, key in known and _is_count(value)
    yield "progress.lanes", progress.get("lanes", 0) <= _MOST_LANES
    yield "progress.order_batch_size", progress.get("order_batch_size", 0) <= _MOST_PAIRS


def _is_optimizer(state: dict[str, Any]) -> bool:
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, dict):
        return False
    parameters = [group.get("params") if isinstance(group, dict) else None for group in groups]
    numbered = all(isinstance(numbers, list) and all(map(_is_count, numbers)) for numbers in parameters)
    return numbered and all(_is_count(key) and isinstance(entry, dict) for key, entry in moments.items())


def _is_count(value: object, least: int = 0, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most
