"""How good the towers are on held-out pairs while training: the loss, and the mean recall of retrieval."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cloob.data.batch import Batch, Skip
from cloob.distributed import rank
from cloob.functional.ranking import mutual_ranks, recall_at_k
from cloob.objective import NonFiniteFeaturesError
from cloob.training.faults import StopSignal, agree, fetch
from cloob.training.ranks import gather_objects, on_rank_zero
from cloob.training.step import TowersWithLoss
from cloob.training.watch.log import finite

RECALLS = (1, 5, 10)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """What the held-out pairs say.

    Attributes:
        loss: Mean loss in batches of the training's size; None when there was no batch, when it was not finite, or when
            an embedding was NaN, infinite or zero.
        recall: Mean of recall at 1, 5 and 10 in both directions among all held-out pairs, a fraction; an image's only
            right answer is its own caption, and an embedding with NaN finds and is found by none. None when nothing
            could be embedded.
        pairs: Held-out pairs over all ranks, usable or not.
        skipped: Those that could not be used, with the rank that read them.
    """

    loss: float | None
    recall: float | None
    pairs: int = 0
    skipped: tuple[tuple[int, Skip], ...] = ()

    def metrics(self) -> dict[str, float | None]:
        """Both by the names that logs and checkpoints use."""
        return {"val_loss": self.loss, "val_recall": self.recall}

    def reasons(self) -> dict[str, int]:
        """The unusable pairs by reason, the most frequent first."""
        return dict(Counter(skip.reason for _, skip in self.skipped).most_common())


class Batches(Protocol):
    """Held-out pairs, batch by batch: a ``PairLoader``, or anything with its ``epoch``."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches."""


def validate(
    towers: TowersWithLoss,
    loader: Batches,
    device: torch.device,
    *,
    mask_duplicates: bool,
    micro_batch_size: int = 0,
    hopfield: bool | None = None,
    stop: StopSignal | None = None,
    last_checkpoint: Path | None = None,
) -> Validation:
    """Embeds the held-out pairs once, all ranks together; the same numbers on every rank.

    Args:
        towers: Put in eval mode.
        loader: The held-out pairs.
        device: Where the towers are.
        mask_duplicates: Whether pairs of the same caption are no negatives of each other.
        micro_batch_size: Pairs of this rank that go through the towers at a time; 0 for all of a batch.
        hopfield: Whether the objective retrieves; None leaves it to the objective.
        stop: Ends it when it is set, on whatever rank.
        last_checkpoint: What the error of a batch that a rank could not get tells to go on from.

    Returns:
        Loss and recall, and what could not be used. A batch of one pair counts for the recall alone, one that leaves a
        rank without any for neither.

    Raises:
        StopRequested: ``stop`` was set.
        TrainingFailed: As ``faults.agree``.
    """
    stop = stop or StopSignal()
    towers.eval()
    total, samples, pairs = 0.0, 0, 0
    refused: NonFiniteFeaturesError | None = None
    features: list[tuple[Tensor, Tensor]] = []
    skipped: list[Skip] = []
    with torch.no_grad():
        for fetched in _drawn(loader.epoch(0), stop):
            batch, counts = agree(*fetched, stop, device, last_checkpoint)
            pairs += counts.samples + counts.bad
            skipped += batch.skipped
            if counts.smallest < 1:
                continue
            batch = batch.to(device)
            images, texts = _embedded(towers, batch, micro_batch_size)
            features.append((images.cpu(), texts.cpu()))
            if counts.samples > 1:
                samples += counts.samples
                ids = batch.ids if mask_duplicates else None
                try:
                    total += counts.samples * float(towers.loss_of(images, texts, ids, hopfield))
                except NonFiniteFeaturesError as error:  # of one rank, on all
                    total, refused = math.nan, refused or error
    if refused is not None and rank() == 0:
        logger.warning("held-out pairs have no loss, and bad rows count as not found: %s", refused)
    everywhere = [(reader, skip) for reader, part in enumerate(gather_objects(skipped)) for skip in part]
    loss = finite(total / samples) if samples else None
    return Validation(loss, _recall(features, device), pairs, tuple(everywhere))


def _embedded(towers: TowersWithLoss, batch: Batch, micro_batch_size: int) -> tuple[Tensor, Tensor]:
    """(n, D) image and text features of a batch, as many pairs at a time as training holds."""
    parts = -(-len(batch) // micro_batch_size) if micro_batch_size else 1
    pieces = zip(batch.images.tensor_split(parts), batch.tokens.tensor_split(parts), strict=True)
    images, texts = zip(*(towers(*piece, loss=False) for piece in pieces), strict=True)
    return torch.cat(images), torch.cat(texts)


def _drawn(batches: Iterator[Batch], stop: StopSignal) -> Iterator[tuple[Batch | None, Exception | None]]:
    """Each batch, or why there is none."""
    while True:
        batch, fault = fetch(batches, stop)
        if isinstance(fault, StopIteration):
            return
        yield batch, fault


def _recall(features: list[tuple[Tensor, Tensor]], device: torch.device) -> float | None:
    features_here = tuple(torch.cat(side) for side in zip(*features, strict=True))
    parts = [part for part in gather_objects(features_here) if part]
    if not parts:
        return None

    def mean() -> float:
        images, texts = (torch.cat(side).to(device) for side in zip(*parts, strict=True))
        pairs = torch.arange(len(images), device=device).repeat(2, 1).T
        both = mutual_ranks(images, texts, pairs)
        return sum(recall_at_k(ranks, k) for ranks in both for k in RECALLS) / (2 * len(RECALLS))

    return float(on_rank_zero(mean))
