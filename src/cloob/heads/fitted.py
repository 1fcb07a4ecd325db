"""What fitting gives, and how good heads are on pairs that they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from cloob.data.table import Encodings
from cloob.data.vectors import VectorPairs
from cloob.functional.bootstrap import group_means
from cloob.functional.ranking import mutual_ranks_of_ids
from cloob.heads.head import Head, Heads, unit_rows
from cloob.heads.settings import HeadSettings

RECALLS = (1, 5, 10)
GALLERY = 10_000  # pairs of a recall, at most: its time grows with their square


class Rows(NamedTuple):
    """Some pairs in memory."""

    a: Tensor  # (n, F_a)
    b: Tensor  # (n, F_b)
    ids: Tensor  # (n,) int64: rows of one id are one answer, and no negatives
    weights: Tensor | None = None  # (n,)

    @classmethod
    def of(cls, pairs: VectorPairs, most: int | None = None) -> Rows:
        """All pairs, or so many of them, evenly spread."""
        chosen = pairs if most is None else pairs.at_most(most)
        batch = chosen.batch()
        a, b = batch.parts
        weights = chosen.weights
        return cls(
            a, b, batch.ids, None if weights is None else torch.from_numpy(weights)
        )


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """The rows there; Apple's GPUs have no float64."""
    if device.type == "mps" and rows.dtype == torch.float64:
        rows = rows.float()
    return rows.to(device)


class EpochLine(TypedDict):
    """What the record says of an epoch; of a closed form there is one."""

    epoch: int
    step: int
    samples_seen: int
    loss: float | None  # the mean; None of a closed form
    val_recall: float | None  # None where nothing is held out
    is_best: NotRequired[bool]  # so far
    seconds: NotRequired[float]


OnEpoch = Callable[[EpochLine], object]


def best_epoch(history: Sequence[EpochLine]) -> int:
    """The best epoch, from 1; the last one where nothing was held out."""
    judged = [line for line in history if line.get("is_best")]
    return (judged or history)[-1]["epoch"]


@dataclass(frozen=True)
class FittedHeads:
    """Two heads, in eval mode on the CPU, and how they came about."""

    heads: Heads
    objective: dict[str, object]
    """Settings of the objective at the end, as a model folder keeps them."""
    history: list[EpochLine]
    """A line per epoch."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """What held-out pairs chose: ridge, objective, what was joined."""
    encodings: Encodings = (None, None)
    """How the tables of both sides become numbers; None for a matrix."""

    @property
    def best_epoch(self) -> int:
        """The epoch of ``heads``, from 1; the last one where nothing was held out."""
        return best_epoch(self.history)

    @property
    def recall(self) -> float | None:
        """That of the heads on held-out pairs, before a refit."""
        if "joined" in self.decisions:
            return float(self.decisions["joined"]["recall"])
        return self.history[self.best_epoch - 1]["val_recall"]


@dataclass(frozen=True)
class SingleHeads(FittedHeads):
    """One head a side, joined with no other."""

    heads: tuple[Head, Head]
    settings: HeadSettings = field(kw_only=True)
    """By which they were fitted."""


def unit_sides(heads: Heads, rows: Rows) -> tuple[Tensor, Tensor]:
    """(n, D) unit rows of both sides."""
    return unit_rows(heads[0], rows.a), unit_rows(heads[1], rows.b)


def recalls_of_ids(
    a: Tensor, b: Tensor, ids: Tensor, at: Sequence[int] = RECALLS
) -> Tensor:
    """(6, distinct ids) recall at 1, 5 and 10 in both directions, of (n, D) unit rows.

    Rows of one id are one answer, and any of them is right; a tie is a loss.
    """
    both = torch.stack(mutual_ranks_of_ids(a, b, ids)).cpu()
    ids = ids.cpu()
    return torch.stack([group_means(ranks < k, ids) for ranks in both for k in at])


def recalls(heads: Heads, rows: Rows) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions."""
    return recalls_of_ids(*unit_sides(heads, rows), rows.ids).mean(0)
