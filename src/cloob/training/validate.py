"""How good the towers are on held-out pairs while training: the loss, and the mean recall of retrieval."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from cloob.data.batch import Skip, micro_batches
from cloob.distributed import gather_objects, on_rank_zero, rank, world_size
from cloob.functional.bootstrap import group_means
from cloob.functional.ranking import mutual_ranks, ranks_of_ids, recall_at_k
from cloob.models.runs import SKIPPED_FILE, read_lines
from cloob.objective import NonFiniteFeaturesError
from cloob.training import sharding
from cloob.training.build import Run
from cloob.training.faults import StopSignal, agree, fetch
from cloob.training.log import check_fraction, finite, with_readers
from cloob.training.progress import preserved_rng
from cloob.training.step import TowersWithLoss

RECALLS = (1, 5, 10)
GALLERY = 10_000  # pairs of the recall, about: its time grows with their square
logger = logging.getLogger(__name__)


def validate(
    run: Run, stop: StopSignal, towers: TowersWithLoss, *, hopfield: bool
) -> tuple[dict[str, float | None], list[Skip]]:
    """``val_loss`` and ``val_recall`` of the held-out pairs, which are embedded once on all ranks, and the bad pairs.

    The loss is the mean in batches of the training's size; None without a batch of two pairs, when not finite, or when
    an embedding was NaN, infinite or zero. The recall is the mean at 1, 5 and 10 in both directions among all held-out
    pairs, or some 10,000 of more; None when nothing could be embedded. An image's only right answer is its own caption,
    a vector's the first row of its id. NaN finds and is found by none.
    """
    loader, device, config = run.val_loader, run.stepper.device, run.config
    assert loader is not None
    if world_size() > 1:  # what is judged is what is exported: rank 0's running statistics
        sharding.share_buffers(towers)
    towers.eval()
    total, samples, pairs = 0.0, 0, 0
    refused: NonFiniteFeaturesError | None = None
    features: list[tuple[Tensor, Tensor, Tensor]] = []
    left_out: list[Skip] = []
    batches, every = loader.epoch(0), -(-loader.pairs_per_epoch // GALLERY)
    with preserved_rng(device), torch.no_grad():
        while not isinstance((fetched := fetch(batches, stop))[1], StopIteration):
            batch, counts = agree(*fetched, stop, device, run.saver.last)
            in_recall = pairs // loader.batch_size % every == 0
            pairs += counts.samples + counts.bad
            left_out += batch.skipped
            if counts.smallest < 1:
                continue
            on, parts = batch.to(device), -(-len(batch) // (run.stepper.micro_batch_size or len(batch)))
            sides = (micro_batches(side, parts) if parts > 1 else [side] for side in (on.images, on.tokens))
            pieces = [towers(*piece, loss=False) for piece in zip(*sides, strict=True)]
            images, texts = (torch.cat(side) for side in zip(*pieces, strict=True))
            if in_recall:
                features.append((images.cpu(), texts.cpu(), batch.ids.cpu()))
            if counts.samples > 1:
                samples += counts.samples
                ids = batch.ids.to(device) if run.hands_over_ids else None
                try:
                    total += counts.samples * float(towers.loss_of(images, texts, ids, hopfield=hopfield))
                except NonFiniteFeaturesError as error:  # of one rank, on all
                    total, refused = math.nan, refused or error
    if refused is not None and rank() == 0:
        logger.warning("held-out pairs have no loss, and bad rows count as not found: %s", refused)
    skipped = with_readers(left_out)
    if rank() == 0 and not any(line.get("held_out") for line in read_lines(config.save.out / SKIPPED_FILE)):
        place = {"step": run.progress.step, "epoch": run.progress.epoch + 1, "held_out": True}
        run.log.write_skipped(place, skipped)  # once: they are the same at each validation
    lost = [skip for _, skip in skipped]
    check_fraction(loader.name, "held-out pairs", lost, pairs, config.pairs.max_bad_fraction)
    loss = finite(total / samples) if samples else None
    return {"val_loss": loss, "val_recall": mean_recall(features, device, loader.by_id)}, lost


def mean_recall(features: list[tuple[Tensor, Tensor, Tensor]], device: torch.device, by_id: bool) -> float | None:
    """The mean recall among the unit rows and ids of all ranks' pairs (see ``validate``); on every rank."""
    collected = gather_objects(tuple(torch.cat(side) for side in zip(*features, strict=True)))

    def mean() -> float | None:
        parts = [part for part in collected if part]
        if not parts:
            return None
        images, texts, ids = (torch.cat(side).to(device) for side in zip(*parts, strict=True))
        if by_id:
            return float(recalls_of_ids(images, texts, ids).mean(1).mean())
        pairs = torch.arange(len(images), device=device).repeat(2, 1).T
        both = mutual_ranks(images, texts, pairs)
        return float(sum(recall_at_k(ranks, k) for ranks in both for k in RECALLS) / (2 * len(RECALLS)))

    return on_rank_zero(mean)


def recalls_of_ids(a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
    """(6, distinct ids) recall at 1, 5 and 10 in both directions."""
    both = ranks_of_ids(a, b, ids), ranks_of_ids(b, a, ids)
    return torch.stack([group_means(ranks < k, ids) for ranks in both for k in RECALLS])
