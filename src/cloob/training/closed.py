"""``objective="cca"``: heads that are solved for in one pass over the pairs, in place of a training.

Each rank adds up the moments of its pairs in blocks. Their sum gives the canonical directions for every ridge; held-out
pairs choose ridge, power and whether columns are standardised. The result is a linear head on each side.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.data.loader import Loader
from cloob.distributed import gather_objects, rank
from cloob.errors import InputError
from cloob.functional.cca import CanonicalDirections, PairMoments, canonical_directions
from cloob.training.align import ClosedForm
from cloob.training.build import Run
from cloob.training.faults import StopSignal, agree, fetch
from cloob.training.record import mean_recall

_RIDGES, _POWERS = (0.1, 0.01, 0.03, 0.3, 1.0, 3.0), (1.0, 0.5, 2.0)
"""What is tried, the usual first: it is taken without held-out pairs, and where they see no difference."""
_JUDGES = 2000  # held-out pairs that choose
Rows = tuple[Tensor, Tensor, Tensor]  # (n, F_a), (n, F_b), (n,) ids
logger = logging.getLogger(__name__)


def fit(run: Run, stop: StopSignal) -> None:
    """Solves for the heads of a run; every rank calls this. StopRequested where a signal ends it: nothing is kept."""
    progress, size = run.progress, run.config.run.batch_size
    moments = None
    for a, b, _ in _batches(run, run.loader, stop, counts=True):
        block = PairMoments.of(a, b)
        moments = block if moments is None else moments + block
    total = [part for part in gather_objects(moments) if part is not None]
    if not total:
        raise InputError(f"{run.loader.name}: no usable pairs")
    moments = functools.reduce(operator.add, total)
    judges = [] if run.val_loader is None else list(_batches(run, run.val_loader, stop, counts=False))
    chosen, directions = _choose(run, moments, judges)
    assert run.encoder.heads is not None and isinstance(run.objective, ClosedForm)
    means, matrices = (moments.mean_a, moments.mean_b), directions.weighted(chosen["power"])
    for head, mean, matrix in zip(run.encoder.heads, means, matrices, strict=True):
        head.solve(mean, matrix)
    run.objective.chosen = chosen
    progress.step, progress.samples_seen = 1, moments.count
    progress.position = progress.passed = run.loader.steps_per_epoch * size


def _batches(run: Run, loader: Loader, stop: StopSignal, *, counts: bool) -> Iterator[Rows]:
    """This rank's rows on the CPU: all of training pairs, which are counted, or some of held-out ones."""
    batches, every = loader.epoch(0), 1 if counts else -(-loader.pairs_per_epoch // _JUDGES)
    while not isinstance((fetched := fetch(batches, stop))[1], StopIteration):
        batch, layout, bad = agree(*fetched, stop, run.stepper.device, run.saver.last)
        if counts:
            run.bad.count(batch, layout.total, bad)
        if len(batch):
            yield batch.images[::every], batch.tokens[::every], batch.ids[::every]


def _choose(run: Run, moments: PairMoments, judges: list[Rows]) -> tuple[dict[str, Any], CanonicalDirections]:
    """The best by the held-out pairs, or the first without; every rank comes to the same."""
    assert run.encoder.heads is not None
    width, usual = run.encoder.embed_dim, any(head.standardise == "column" for head in run.encoder.heads)
    tries_both = judges and run.config.align.standardise in (None, "auto")
    tried: list[tuple[float, dict[str, Any], CanonicalDirections]] = []
    for by_column in (usual, not usual) if tries_both else (usual,):
        for ridge, result in zip(_RIDGES, canonical_directions(moments, _RIDGES, by_column=by_column), strict=True):
            directions = CanonicalDirections(*(part[..., :width] for part in result))
            settings = {"ridge": ridge, "power": _POWERS[0], "by_column": by_column}
            if not judges:
                return settings, directions
            a, b, ids = (torch.cat(side) for side in zip(*judges, strict=True))
            a = (a - moments.mean_a).float() @ directions.a.float()
            b = (b - moments.mean_b).float() @ directions.b.float()
            for power in _POWERS:
                weights = (directions.correlations**power).float()
                rows = F.normalize(a * weights, dim=1), F.normalize(b * weights, dim=1), ids
                recall = mean_recall([rows], torch.device("cpu"), run.loader.by_id) or 0.0
                tried.append((recall, settings | {"power": power}, directions))
    _, settings, directions = max(tried, key=operator.itemgetter(0))
    if rank() == 0:
        columns = ", columns standardised" if settings["by_column"] else ""
        message = "cca: ridge %g, power %g%s (the best of %d on held-out pairs)"
        logger.info(message, settings["ridge"], settings["power"], columns, len(tried))
    return settings, directions
