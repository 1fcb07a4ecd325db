"""What a call says of its pairs beside their rows: ids, soft targets and weights."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from cloob.family import CONTRASTS
from cloob.functional.checks import check_ids
from cloob.functional.scores import Positives, Targets, read_targets, read_weights


class Labels(NamedTuple):
    """Of the pairs of this rank: (n,) integer ids, soft targets, (n,) weights."""

    ids: Tensor | None = None
    targets: Targets | None = None
    weights: Tensor | None = None

    def checked(
        self, rows: Tensor, n_candidates: int | None, contrast: str, *, may_read: bool
    ) -> Labels:
        """These labels of (n, D) rows against so many candidates, None if that is not
        known yet; if it ``may_read`` values, it waits for the device.
        """
        n = len(rows)
        ids = check_ids(self.ids, None, n, n, rows.device)
        shape = (n, sys.maxsize if n_candidates is None else n_candidates)
        if n_candidates is None and isinstance(self.targets, Tensor):
            shape = (n, self.targets.shape[-1] if self.targets.ndim else 0)
        targets, weights = self.targets, self.weights
        if targets is not None:
            softmax = CONTRASTS[contrast].softmax
            positives = read_targets(
                targets, shape, rows, sum_to_1=softmax, may_read=may_read
            )
            check_constant("targets", positives.shares)
            targets = positives
        if weights is not None:
            weights = read_weights(weights, shape, rows, may_read=may_read)
            check_constant("weights", weights)
        integers = None if ids is None else ids[0].to(torch.int64)
        return Labels(integers, targets, weights)

    def presence(self) -> dict[str, bool]:
        """Which of them there are; ranks must have this in common."""
        return {
            "ids": self.ids is not None,
            "weights": self.weights is not None,
            "targets": self.targets is not None,
        }

    def reach(self, *, may_read: bool) -> tuple[int, bool]:
        """How many candidates the targets of this rank speak of, and whether of each;
        none if columns may not be read.
        """
        if not isinstance(self.targets, Positives):
            return 0, False
        if self.targets.columns is None:
            return self.targets.shares.shape[1], True
        n_columns = int(self.targets.columns.max()) + 1 if may_read else 0
        return n_columns, False


def check_reach(reaches: tuple[tuple[int, bool], ...], total: int) -> None:
    """Refuses targets of any rank that do not fit the candidates of all."""
    for rank, (columns, whole) in enumerate(reaches):
        if columns > total or (whole and columns != total):
            raise ValueError(
                f"targets of rank {rank} have {columns} columns, but all ranks together"
                f" have {total} pairs"
            )


def check_constant(name: str, values: Tensor) -> None:
    """Refuses what would lose its gradient."""
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} require a gradient, which the objective does not give: detach them"
        )
