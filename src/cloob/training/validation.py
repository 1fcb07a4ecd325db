"""How good the towers of a run are on its held-out pairs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cloob.data.bad import check_fraction
from cloob.data.batch import Skip, micro_batches
from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.errors import InputError
from cloob.functional.bootstrap import group_means
from cloob.functional.ranking import mutual_ranks_of_ids
from cloob.training import sharding
from cloob.training.build import Run
from cloob.training.callbacks import HeldOut
from cloob.training.custom_modules import GivenTowers
from cloob.training.generators import preserved_rng
from cloob.training.gradcache import joined
from cloob.training.run_log import finite, skips_of_all_ranks
from cloob.training.step import (
    TowersWithLoss,
    nan_unless_acceptable,
)

logger = logging.getLogger(__name__)
Rows = tuple[Tensor, Tensor, Tensor]  # the unit rows of both sides, and ids
Metrics = dict[str, float | None]
RECALLS = (1, 5, 10)
GALLERY = 10_000  # pairs of the recall, about: its time grows with their square
# what a line of epochs.jsonl has beside the caller's metrics
KEYS_OF_LINE = {
    "epoch",
    "step",
    "samples_seen",
    "loss",
    "skipped",
    "val_skipped",
    "seconds",
    "val_loss",
    "val_recall",
}


@dataclass(frozen=True)
class Validation:
    """What ``epochs.jsonl`` says of the held-out pairs."""

    metrics: Metrics
    bad_pairs: list[Skip] = field(default_factory=list)


def validate_run(run: Run, *, hopfield: bool) -> Validation:
    """``validate`` of the weights and, as ``ema_…``, of their average."""
    found = validate(run, run.towers, hopfield=hopfield)
    if run.stepper.average is not None:
        averaged = TowersWithLoss(
            run.stepper.average.encoder, run.objective, run.config.precision
        )
        of_average = validate(run, averaged, hopfield=hopfield).metrics
        for name, value in of_average.items():
            found.metrics[f"ema_{name}"] = value
    return found


def validate(run: Run, towers: TowersWithLoss, *, hopfield: bool) -> Validation:
    """``val_loss`` and ``val_recall`` of the held-out pairs, which are embedded once on
    all ranks, the caller's metrics, and the bad pairs.

    The loss is the mean in batches of the training's size, the recall that at 1, 5 and
    10 in both directions among some 10,000 pairs at most. An image's only correct
    answer is its caption, a vector's the first row of its id.
    """
    assert run.val_loader is not None
    if world_size() > 1:
        # what is judged is what is exported: rank 0's running statistics
        sharding.share_buffers(towers)
    towers.eval()
    with preserved_rng(run.stepper.device), torch.no_grad():
        embedded = pass_over_held_out(run, towers, hopfield=hopfield)
    val_loss = embedded.mean_loss()
    if val_loss is not None and not math.isfinite(val_loss) and rank() == 0:
        logger.warning(
            "held-out pairs have no loss, and bad rows count as not found: some rows"
            " of the towers are NaN, infinite or zero"
        )
    bad_pairs = _check_bad_pairs(run, embedded, is_first=towers is run.towers)
    metrics: Metrics = {"val_loss": None, "val_recall": None}
    if val_loss is not None:
        metrics["val_loss"] = finite(val_loss)
    rows = _rows_of_all_ranks(embedded.rows)
    if rows is not None:
        x, y, ids = rows
        if not run.val_loader.pairs.by_id:
            ids = torch.arange(len(ids))
        device = run.stepper.device
        metrics["val_recall"] = on_rank_zero(lambda: mean_recall(x, y, ids, device))
        if run.metrics is not None:
            metrics |= _own_metrics(run, towers, rows)
    return Validation(metrics, bad_pairs)


@dataclass
class HeldOutPass:
    """What a pass over the held-out pairs has found so far."""

    # of batches of all ranks; on the device, as none is waited for
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of these batches
    pairs: int = 0  # usable or not
    rows: list[Rows] = field(default_factory=list)  # of this rank, for the recall
    bad_pairs: list[Skip] = field(default_factory=list)  # of this rank

    def mean_loss(self) -> float | None:
        """NaN where rows are bad; None where no batch had a loss."""
        if not self.losses:
            return None
        numbers = torch.stack(self.losses).tolist()
        return float(np.average(numbers, weights=self.sizes))


def pass_over_held_out(
    run: Run, towers: TowersWithLoss, *, hopfield: bool
) -> HeldOutPass:
    """Embeds all held-out pairs once: their losses, and the rows of every so manyth
    batch, among which recall is measured.
    """
    loader, device = run.val_loader, run.stepper.device
    assert loader is not None
    found = HeldOutPass()
    batches = loader.epoch(0)
    every = -(-loader.pairs_per_epoch // GALLERY)
    for number in range(loader.steps_per_epoch):
        fetched = run.fetch(batches)
        total = fetched.layout.total
        found.pairs += total + fetched.bad
        found.bad_pairs += fetched.batch.skipped
        if not fetched.is_usable:
            continue
        moved = fetched.batch.to(device)
        parts = micro_batches(moved.parts, run.stepper.micro_batch_size)
        features = joined([towers.embed(part) for part in parts])
        sides = towers.sides(features)
        if number % every == 0:
            found.rows.append((*sides, fetched.batch.ids))
        if total > 1:
            batch = run.step_batch(moved, fetched.layout, hopfield=hopfield)
            loss = towers.loss_of(features, batch)
            found.losses.append(nan_unless_acceptable(loss, sides, run.objective))
            found.sizes.append(total)
    return found


def _check_bad_pairs(run: Run, embedded: HeldOutPass, *, is_first: bool) -> list[Skip]:
    """The bad pairs of all ranks; InputError if they are too many. The first pass of a
    run names them in ``skipped.jsonl``: they are the same in every one.
    """
    assert run.val_loader is not None
    skipped = skips_of_all_ranks(embedded.bad_pairs)
    progress = run.progress
    if is_first and progress.epoch == 0:
        place = {"step": progress.step, "epoch": 1, "held_out": True}
        run.log.write_skipped(place, skipped)
    bad_pairs = [skip for _, skip in skipped]
    name, limit = run.val_loader.pairs.name, run.config.max_bad_fraction
    check_fraction(name, "held-out pairs", bad_pairs, embedded.pairs, limit)
    return bad_pairs


def _rows_of_all_ranks(batches: Sequence[Rows]) -> Rows | None:
    """The rows of all ranks' batches, on every rank; None where there are none."""
    mine = [torch.cat(side).cpu() for side in zip(*batches, strict=True)]
    parts = [part for part in gather_objects(mine) if part]
    if not parts:
        return None
    x, y, ids = (torch.cat(side) for side in zip(*parts, strict=True))
    return x, y, ids


def mean_recall(x: Tensor, y: Tensor, ids: Tensor, device: torch.device) -> float:
    """The mean over ids, both directions and k of the recall (see ``validate``)."""
    both = torch.stack(mutual_ranks_of_ids(x.to(device), y.to(device), ids.to(device)))
    recalls = [group_means(ranks < k, ids).mean() for ranks in both for k in RECALLS]
    return float(torch.stack(recalls).mean())


def _own_metrics(run: Run, towers: TowersWithLoss, rows: Rows) -> Metrics:
    """The caller's metrics, as rank 0 finds them."""
    assert run.metrics is not None
    encoder = towers.encoder
    given = encoder.model if isinstance(encoder, GivenTowers) else encoder
    with preserved_rng(run.stepper.device), torch.no_grad():
        found = run.metrics(HeldOut(given, *rows))
    values: Metrics = {name: finite(float(value)) for name, value in found.items()}
    for name in values.keys() & KEYS_OF_LINE:
        raise InputError(f"metrics=: {name!r} is a name of cloob's own")
    best = run.config.best
    if best not in ("val_loss", "val_recall", *values):
        raise InputError(
            f"best is {best!r}, but metrics= gives {', '.join(values) or 'nothing'}"
        )
    return gather_objects(values)[0]
