"""Heads are fitted: one loop over the pairs of two matrices, from the first weights to
the best epoch.

An epoch's order, its captions and its dropout are a function of (seed, epoch). After
every epoch the state is written where a file is given, so that a fit that was killed
goes on there and ends with the same numbers, bit for bit.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

from cloob.data.vectors import VectorPairs
from cloob.distributed import resolve_device
from cloob.errors import TrainingFailed
from cloob.heads.closed import ClosedHeads, closed_settings, fit_closed_form
from cloob.heads.columns import PLAIN_WAYS, choose_columns
from cloob.heads.fitted import EpochLine, OnEpoch, SingleHeads
from cloob.heads.head import Head
from cloob.heads.parts import (
    Batches,
    Judge,
    Model,
    adamw,
    fit_batch,
    fresh_heads,
    learning_rate,
    objective_of,
    sampled,
    seeded,
)
from cloob.heads.settings import HeadSettings
from cloob.heads.state import Progress, copied, key_of, read_state, write_state


def fit(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    *,
    closed: ClosedHeads | None = None,
    lead: float = 0.0,
    until: int | None = None,
    state: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> SingleHeads:
    """Fits two heads to pairs by a member of the family.

    Args:
        pairs: The training pairs.
        held_out: Pairs that choose the best epoch; None: the last one is taken.
        settings: Those of the heads and the objective, which is a member.
        closed: The closed form of the same pairs, from which the heads may start, with
            its columns; None: it is solved if they do.
        lead: The ``val_recall`` of other heads. A fit that is behind them has three
            fifths of the patience.
        until: End after this epoch of ``settings.epochs``, by which the learning rate
            goes.
        state: File of the state after the last epoch. Where it is that of the same
            pairs and settings the fit goes on from it, else it is written anew.
        on_epoch: Called with the line of every epoch.

    Returns:
        The heads of the best epoch.

    Raises:
        InputError: A setting does not go with the pairs.
        TrainingFailed: The loss of an epoch is not finite.
    """
    settings = fit_batch(settings or HeadSettings(objective="infoloob"), pairs)
    device = resolve_device(settings.device)
    heads = first_heads(pairs, held_out, settings, closed)
    model = Model(*heads, objective_of(settings)).to(device)
    optimizer = adamw(model, settings, device)
    batches = Batches(pairs, settings, device)
    judge = None if held_out is None else Judge(held_out, device)

    progress = Progress()
    key = key_of(pairs, held_out, settings, heads)
    if state is not None:
        progress = read_state(state, key, model, optimizer) or progress
    began = time.perf_counter() - progress.seconds
    while not is_over(progress, settings, lead, until):
        with seeded(settings.seed, progress.epoch, device):
            loss = fit_epoch(model, optimizer, batches, settings, progress)
        progress.epoch += 1
        progress.step += batches.steps
        line: EpochLine = {
            "epoch": progress.epoch,
            "step": progress.step,
            "samples_seen": progress.step * settings.batch_size,
            "loss": loss,
            "val_recall": None,
        }
        if judge is not None:
            recall = judge(model)
            is_best = keep_best(progress, recall, model)
            line["val_recall"], line["is_best"] = recall, is_best
        progress.seconds = time.perf_counter() - began
        progress.history.append({**line, "seconds": progress.seconds})
        if state is not None:
            write_state(state, key, progress, model, optimizer)
        if on_epoch is not None:
            on_epoch(progress.history[-1])
    model.cpu().eval()
    if progress.best is not None:
        model.load_state_dict(progress.best)
    return SingleHeads(model.heads, model.objective.config(), progress.history)


def first_heads(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    settings: HeadSettings,
    closed: ClosedHeads | None,
) -> tuple[Head, Head]:
    """The heads before the first step. Those with random weights take plain columns:
    with a hidden layer they find a transform themselves.
    """
    if settings.start != "closed-form":
        columns = choose_columns(pairs, settings, PLAIN_WAYS)
        return fresh_heads(pairs, settings, columns)
    if closed is None:
        closed = fit_closed_form(pairs, held_out, closed_settings(settings, pairs))
    heads = fresh_heads(pairs, settings, closed.choice.columns)
    rows = sampled(pairs)
    for head, solved, side in zip(heads, closed.heads, rows[:2], strict=True):
        head.start_from(solved, side)
    return heads


def fit_epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: HeadSettings,
    progress: Progress,
) -> float:
    """Goes through the pairs once; the mean loss."""
    model.train()
    total = torch.zeros((), device=batches.device)
    n_steps = settings.epochs * batches.steps
    for index, (a, b, ids, weights) in enumerate(batches.epoch(progress.epoch)):
        x, y = model(a, b)
        loss = model.loss(x, y, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.lr, progress.step + index, n_steps)
        optimizer.step()
        model.objective.clamp_()
        total += loss.detach()
    mean = float(total) / batches.steps
    if not math.isfinite(mean):
        raise TrainingFailed(
            f"epoch {progress.epoch + 1}: the loss is not finite; a lower learning rate"
            " may help"
        )
    return mean


def is_over(
    progress: Progress, settings: HeadSettings, lead: float, until: int | None
) -> bool:
    """Whether the last epoch is done, or too many validations in a row found nothing
    better; fewer are too many where other heads are ahead.
    """
    last_epoch = settings.epochs if until is None else min(until, settings.epochs)
    patience = settings.patience
    if (progress.best_value or 0.0) < lead:
        patience = -(-3 * patience // 5)
    return progress.epoch >= last_epoch or 0 < patience <= progress.stale


def keep_best(progress: Progress, recall: float, model: Model) -> bool:
    """Keeps the weights if they are the best so far; whether they are."""
    is_better = progress.best_value is None or recall > progress.best_value
    progress.stale = 0 if is_better else progress.stale + 1
    if is_better:
        progress.best_value = recall
        progress.best = copied(model)
    return is_better
