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
from torch import Tensor

from cloob.data.vectors import VectorPairs
from cloob.distributed import resolve_device
from cloob.errors import TrainingFailed
from cloob.heads.closed import ClosedHeads, closed_settings, fit_closed_form
from cloob.heads.columns import PLAIN_WAYS, choose_columns
from cloob.heads.fitted import (
    GALLERY,
    EpochLine,
    OnEpoch,
    Rows,
    SingleHeads,
    best_epoch,
    recalls,
    to_device,
)
from cloob.heads.head import Head
from cloob.heads.parts import (
    Batches,
    Model,
    adamw,
    fresh_heads,
    learning_rate,
    objective_of,
    sampled,
    seeded,
    with_batch_size,
)
from cloob.heads.settings import HeadSettings
from cloob.heads.state import Progress, copied, key_of, read_state, write_state


def fit(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    plan: HeadSettings,
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
        plan: Settings of the heads and the objective, which is a member.
        closed: The closed form of the same pairs, from which the heads may start, with
            its columns; None: it is solved if they do.
        lead: The ``val_recall`` of other heads. A fit that is behind them has three
            fifths of the patience.
        until: End after this epoch of ``plan.epochs``, by which the learning rate
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
    settings = with_batch_size(plan, pairs)
    device = resolve_device(settings.device)
    heads = first_heads(pairs, held_out, settings, closed)
    model = Model(*heads, objective_of(settings)).to(device)
    optimizer = adamw(model, settings, device)
    batches = Batches(pairs, settings, device)
    judges = None if held_out is None else judge_rows(held_out, device)

    progress = Progress()
    key = key_of(pairs, held_out, settings, heads)
    if state is not None:
        progress = read_state(state, key, model, optimizer) or progress
    history = progress.history
    began = time.perf_counter() - progress.seconds
    while not is_over(history, settings, lead, until or settings.epochs):
        epoch = len(history)
        with seeded(settings.seed, epoch, device):
            loss = fit_epoch(model, optimizer, batches, settings, epoch)
        step = (epoch + 1) * batches.steps
        line: EpochLine = {
            "epoch": epoch + 1,
            "step": step,
            "samples_seen": step * settings.batch_size,
            "loss": loss,
            "val_recall": None,
        }
        if judges is not None:
            judge(line, model, judges, progress)
        line["seconds"] = time.perf_counter() - began
        history.append(line)
        if state is not None:
            write_state(state, key, progress, model, optimizer)
        if on_epoch is not None:
            on_epoch(line)
    model.cpu().eval()
    if progress.best is not None:
        model.load_state_dict(progress.best)
    return SingleHeads(model.heads, model.objective.config(), history, settings=plan)


def judge_rows(held_out: VectorPairs, device: torch.device) -> Rows:
    """The held-out rows that judge every epoch, on the device of the fit."""
    rows = Rows.of(held_out, GALLERY)
    a, b = to_device(rows.a, device), to_device(rows.b, device)
    return Rows(a, b, rows.ids.to(device))


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
    heads[0].start_from(closed.heads[0], rows.a)
    heads[1].start_from(closed.heads[1], rows.b)
    return heads


def fit_epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: HeadSettings,
    epoch: int,
) -> float:
    """Goes through the pairs once; the mean loss."""
    model.train()
    total = torch.zeros((), device=batches.device)
    n_steps = settings.epochs * batches.steps
    first_step = epoch * batches.steps
    for step, batch in enumerate(batches.epoch(epoch), first_step):
        loss: Tensor = model(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings.lr, step, n_steps)
        optimizer.step()
        model.objective.clamp_()
        total += loss.detach()
    mean = float(total) / batches.steps
    if not math.isfinite(mean):
        raise TrainingFailed(
            f"epoch {epoch + 1}: the loss is not finite; a lower learning rate may help"
        )
    return mean


def judge(line: EpochLine, model: Model, judges: Rows, progress: Progress) -> None:
    """Notes the recall of held-out rows in the line of an epoch; the weights are kept
    if they are the best so far.
    """
    model.eval()
    recall = float(recalls(model.heads, judges).mean())
    line["val_recall"] = recall
    line["is_best"] = recall > best_recall(progress.history)
    if line["is_best"]:
        progress.best = copied(model)


def is_over(
    history: list[EpochLine], settings: HeadSettings, lead: float, n_epochs: int
) -> bool:
    """Whether the last epoch is done, or too many in a row found nothing better; fewer
    are too many where other heads are ahead.
    """
    patience = settings.patience
    if best_recall(history) < lead:
        patience = -(-3 * patience // 5)
    n_stale = len(history) - best_epoch(history) if history else 0
    return len(history) >= n_epochs or 0 < patience <= n_stale


def best_recall(history: list[EpochLine]) -> float:
    """The best recall of held-out pairs so far; -1 before the first."""
    found = [line["val_recall"] for line in history if line["val_recall"] is not None]
    return max(found, default=-1.0)
