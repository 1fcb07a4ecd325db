"""``auto`` and members: held-out pairs choose an objective, and what is joined with its
heads. A client of ``fit`` and ``fit_closed_form``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cloob.data.vectors import VectorPairs
from cloob.functional.bootstrap import bootstrap_interval, grouped_bootstrap
from cloob.heads.closed import choice_of, fit_closed_form
from cloob.heads.fit import OnEpoch, Stop, fit
from cloob.heads.fitted import (
    GALLERY,
    RECALLS,
    FittedHeads,
    Rows,
    recalls,
    recalls_of_ids,
)
from cloob.heads.head import Head, Heads, Members, fit_members, unit_rows
from cloob.heads.settings import USUAL_SCALES, HeadSettings, check_held_out

logger = logging.getLogger(__name__)

TRIED = ("infoloob", "clip", "siglip", "cloob")
"""The first is taken unless another is clearly better."""
TRIAL_EPOCHS = 2
N_SMALL = 8192  # pairs up to which a second head takes seconds
N_JUDGES = 2000  # held-out pairs that choose
N_BANK = 1024  # training pairs of the bias against hubs
CLOSED_WEIGHTS = (0.7, 1.0, 1.4)  # of the closed form beside the heads
HUB_STRENGTHS = (0.25, 0.5)
LEAST_WIDTH = 16  # of joined heads, for four columns of a bias
AT_TEN = [RECALLS.index(10), len(RECALLS) + RECALLS.index(10)]


@dataclass(frozen=True)
class Fitting:
    """How everything of one choice is fitted."""

    settings: HeadSettings
    scales: Mapping[str, dict[str, Any]] = field(default_factory=lambda: USUAL_SCALES)
    """Where the objectives start, by their names, as far as settings leave it open."""
    folder: Path | None = None
    """Of the states of all fits, from which a killed choice goes on."""
    on_epoch: OnEpoch | None = None
    """Called with the epochs of the heads that are chosen, and of no trial."""
    stop: Stop | None = None

    def fit(
        self,
        pairs: VectorPairs,
        held_out: VectorPairs | None,
        settings: HeadSettings,
        name: str,
        *,
        until: int | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> FittedHeads:
        """One fit, whose state lies in a file of this name."""
        state = None if self.folder is None else self.folder / f"{name}.pt"
        return fit(
            pairs,
            held_out,
            self.started(settings),
            until=until,
            state=state,
            on_epoch=on_epoch,
            stop=self.stop,
        )

    def started(self, settings: HeadSettings) -> HeadSettings:
        """The settings with the scales that the objective starts from here."""
        usual = self.scales.get(settings.objective, {})
        missing = {k: v for k, v in usual.items() if getattr(settings, k) is None}
        return settings.override(**missing)


class Trial(NamedTuple):
    """An objective after a few epochs."""

    settings: HeadSettings
    fitted: FittedHeads
    recalls: Tensor  # (ids,)
    line: dict[str, Any]  # its entry in the decisions

    @property
    def recall(self) -> float:
        return float(self.recalls.mean())


class Combination(NamedTuple):
    """Heads side by side, and how good they are on the pairs that choose."""

    message: str
    weights: list[float]  # of all that may be joined
    strength: float  # of the bias against hubs
    heads: Heads
    recalls: Tensor  # (ids,)


def choose(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    *,
    scales: Mapping[str, dict[str, Any]] = USUAL_SCALES,
    folder: Path | None = None,
    on_epoch: OnEpoch | None = None,
    stop: Stop | None = None,
    decided: Mapping[str, Any] | None = None,
    decide: Callable[[dict[str, Any]], object] | None = None,
) -> FittedHeads:
    """Fits what the settings say: a member, the closed form, members of other first
    weights, or with ``auto`` what held-out pairs choose.

    Args:
        pairs: The training pairs.
        held_out: The pairs that choose; they are judged and never trained on.
        settings: Those of the heads.
        scales: Where objectives start, by their names.
        folder: Of the states of all fits, from which a killed choice goes on.
        on_epoch: Called with the line of every epoch of the heads that are chosen.
        stop: Asked after every step; True ends the choice.
        decided: An earlier choice of the objective, which is not made again.
        decide: Called with such a choice as it is made.

    Returns:
        The heads; ``decisions`` has what was tried, chosen and joined.
    """
    settings = settings or HeadSettings()
    holds_out = held_out is not None
    check_held_out(settings, holds_out=holds_out, advice="some")
    fitting = Fitting(settings, scales, folder, on_epoch, stop)
    if settings.objective == "cca":
        fitted = fit_closed_form(pairs, held_out, settings)
        if on_epoch is not None:
            on_epoch(fitted.history[0])
        return refitted(fitting, pairs, held_out, fitted, [settings])
    if held_out is None:
        return fitting.fit(pairs, None, settings, "fit", on_epoch=on_epoch)
    if settings.objective != "auto":
        return fit_beside(fitting, pairs, held_out, *plan(settings))
    choice, closed = dict(decided or {}), None
    if not choice:
        tried = try_objectives(fitting, pairs, held_out)
        if tried is None:
            return nothing_fitted(fitting, pairs)
        choice, closed = tried
        if decide is not None:
            decide(choice)
    first, beside = plan(settings, choice)
    fitted = fit_beside(fitting, pairs, held_out, first, beside, closed)
    return replace(fitted, decisions={"objective": choice, **fitted.decisions})


def fit_beside(
    fitting: Fitting,
    pairs: VectorPairs,
    held_out: VectorPairs,
    chosen: HeadSettings,
    beside: list[HeadSettings],
    closed: FittedHeads | None = None,
) -> FittedHeads:
    """The heads that are chosen, joined with those beside them and the closed form if
    that helps.
    """
    on_epoch = fitting.on_epoch
    fitted = fitting.fit(pairs, held_out, chosen, "fit", on_epoch=on_epoch)
    joins = beside or fitting.settings.objective == "auto"
    if not fitted.stopped and joins:
        if closed is None:
            settings = closed_settings(fitting.settings, pairs)
            closed = fit_closed_form(pairs, held_out, settings)
        fitted = join(fitting, pairs, held_out, fitted, beside, closed)
    if fitted.stopped:
        return fitted
    return refitted(fitting, pairs, held_out, fitted, [chosen, *beside])


def nothing_fitted(fitting: Fitting, pairs: VectorPairs) -> FittedHeads:
    """What is returned where the caller stopped before any heads were chosen."""
    settings = fitting.settings.override(objective=TRIED[0])
    fitted = fitting.fit(pairs, None, settings.override(epochs=1, patience=0), "none")
    return replace(fitted, history=[], stopped=True)


def plan(
    settings: HeadSettings, choice: Mapping[str, Any] | None = None
) -> tuple[HeadSettings, list[HeadSettings]]:
    """The settings of the first heads, and of those beside them."""
    n_members = settings.members or 1
    settings = settings.override(members=None, clean=None)
    if choice is None:
        seeds = range(1, n_members)
        return settings, [settings.override(seed=settings.seed + i) for i in seeds]
    first = settings.override(objective=choice["chosen"], **choice["settings"])
    return first, [settings.override(**leaves) for leaves in choice["beside"]]


def closed_settings(settings: HeadSettings, pairs: VectorPairs) -> HeadSettings:
    """Those of the closed form beside heads: no wider than the joined rows."""
    most = max(2, min(pairs.a.shape[1], pairs.b.shape[1]))
    width = None if settings.embed_dim is None else min(settings.embed_dim, most)
    return HeadSettings(
        "cca", embed_dim=width, standardise=settings.standardise, seed=settings.seed
    )


# --- auto: what is tried, and what is taken ---


def try_objectives(
    fitting: Fitting, pairs: VectorPairs, held_out: VectorPairs
) -> tuple[dict[str, Any], FittedHeads] | None:
    """The objective that held-out pairs choose, with its settings, the heads next to it
    and what was tried; and the closed form. None where the caller stopped.

    Another takes the place of InfoLOOB if it is better on ids that did not choose it,
    with the interval.
    """
    settings = fitting.settings
    judge = Rows.of(held_out, N_JUDGES)
    n_ids = len(np.unique(judge.ids))
    logger.info("trying cca, %s on %s held-out ids …", ", ".join(TRIED), f"{n_ids:,}")
    closed = fit_closed_form(pairs, held_out, closed_settings(settings, pairs))
    lines = [judged(closed, closed_settings(settings, pairs), judge).line]

    ways = ["one", "column"]
    if settings.standardise != "auto":
        ways = [settings.standardise]
    first = []
    for way in ways:
        trial = try_objective(fitting, pairs, held_out, judge, TRIED[0], way)
        if trial is None:
            return None
        first.append(trial)
        lines.append(trial.line)
    usual = max(first, key=lambda trial: trial.recall)
    trials = [usual]
    for name in TRIED[1:]:
        way = usual.settings.standardise
        trial = try_objective(fitting, pairs, held_out, judge, name, way)
        if trial is None:
            return None
        trials.append(trial)
        lines.append(trial.line)
    return take(fitting.settings, trials, lines, len(pairs)), closed


def try_objective(
    fitting: Fitting,
    pairs: VectorPairs,
    held_out: VectorPairs,
    judge: Rows,
    name: str,
    way: str,
) -> Trial | None:
    """A few epochs of an objective; None where the caller stopped."""
    settings = fitting.settings
    settings = fitting.started(
        settings.override(
            objective=name,
            standardise=way,
            epochs=min(-(-settings.epochs // 8), TRIAL_EPOCHS),
            members=None,
            clean=None,
        )
    )
    fitted = fitting.fit(pairs, held_out, settings, f"trial-{name}-{way}")
    return None if fitted.stopped else judged(fitted, settings, judge)


def judged(fitted: FittedHeads, settings: HeadSettings, judge: Rows) -> Trial:
    """A trial with its recall, which is logged."""
    found = recalls(fitted.heads, judge)
    low, high = bootstrap_interval(found)
    leaves = own_settings(settings)
    forms = {"inv_tau": "τ⁻¹ {:g}", "beta": "β {:g}", "standardise": "{}"}
    words = [form.format(leaves[key]) for key, form in forms.items() if leaves.get(key)]
    logger.info(
        "%-26s recall %.1f %% (%.1f to %.1f)",
        " ".join([settings.objective, *words]),
        100 * float(found.mean()),
        100 * low,
        100 * high,
    )
    line = {
        "objective": settings.objective,
        **leaves,
        "recall": float(found.mean()),
        "interval": (low, high),
    }
    return Trial(settings, fitted, found, line)


def own_settings(settings: HeadSettings) -> dict[str, Any]:
    """What sets a trial apart from the others."""
    leaves = {**settings.given_scales(), "standardise": settings.standardise}
    if settings.objective == "cca":
        leaves["standardise"] = None
    return leaves


def take(
    settings: HeadSettings, trials: list[Trial], lines: list[dict[str, Any]], n: int
) -> dict[str, Any]:
    """The first trial, or a clearly better one, and the heads beside it."""
    gain = crossed([trial.recalls for trial in trials])
    usual = trials[0]
    best = max(trials, key=lambda trial: trial.recall)
    is_clear = gain[1] > 0 and best is not usual
    taken = best if is_clear else usual
    others = [trial for trial in trials if trial is not taken]
    second = max(others, key=lambda trial: trial.recall)
    verdict = "none is clearly better than another"
    if is_clear:
        verdict = f"{best.settings.objective} is clearly better"
    message = f"{verdict} ({points(gain)}): {taken.settings.objective} is taken"
    logger.info("%s", message)
    n_members = settings.members or (2 if n <= N_SMALL else 1)
    beside = []
    for number in range(1, n_members):
        trial = second if number % 2 else taken
        leaves = {"objective": trial.settings.objective, **own_settings(trial.settings)}
        beside.append({**leaves, "seed": settings.seed + number})
    return {
        "chosen": taken.settings.objective,
        "settings": own_settings(taken.settings),
        "beside": beside,
        "says": message,
        "clear": is_clear,
        "best": best.settings.objective,
        "difference": gain,
        "trials": lines,
    }


def crossed(tried: Sequence[Tensor]) -> tuple[float, float, float]:
    """What choosing gains over the first, with its interval: one half of the ids is
    judged by the other's choice.
    """
    table = torch.stack(list(tried))
    gains = torch.zeros_like(table[0])
    for half in (0, 1):
        chosen = int(table[:, 1 - half :: 2].mean(1).argmax())
        gains[half::2] = table[chosen, half::2] - table[0, half::2]
    return grouped_bootstrap([gains.double()])


def points(gain: tuple[float, float, float]) -> str:
    """A gain in words."""
    difference, low, high = (100 * value for value in gain)
    return (
        f"{difference:+.1f} points, {low:+.1f} to {high:+.1f}, on ids that did not"
        " choose"
    )


# --- what is joined ---


def join(
    fitting: Fitting,
    pairs: VectorPairs,
    held_out: VectorPairs,
    first: FittedHeads,
    others: list[HeadSettings],
    closed: FittedHeads,
) -> FittedHeads:
    """The first heads joined with others and the closed form, if the recall is higher;
    the others are fitted for exactly as long as the first took to its best.
    """
    parts, names = [first.heads], ["first head"]
    for number, settings in enumerate(others, 2):
        length = first.best_epoch
        settings = settings.override(epochs=length, patience=0)
        name = f"member-{number}-of-{length}-epochs"
        fitted = fitting.fit(pairs, held_out, settings, name)
        if fitted.stopped:
            return replace(first, stopped=True)
        parts.append(fitted.heads)
        names.append(f"{settings.objective} {number}")
    parts.append(closed.heads)
    names.append(f"cca {len(parts)}")

    judge, bank = Rows.of(held_out, N_JUDGES), Rows.of(pairs, N_BANK)
    width = fitting.settings.embed_dim or 0
    tried = combinations(parts, names, judge, bank, width)
    best = max(tried, key=lambda one: float(one.recalls.mean()))
    gain = crossed([one.recalls for one in tried])
    gallery = Rows.of(held_out, GALLERY)
    recall = float(recalls(best.heads, gallery).mean())
    alone = float(recalls(first.heads, gallery).mean())
    logger.info(
        "joined: %s; recall %.1f %% (against the first alone: %s)",
        best.message,
        100 * recall,
        points(gain),
    )
    facts = {
        "joined": best.message,
        "weights": best.weights,
        "strength": best.strength,
        "recall": recall,
        "difference": gain,
        "is_taken": recall > alone,
    }
    decisions = {**first.decisions, "joined": facts, "ridge": closed.decisions}
    if recall <= alone:
        return replace(first, decisions=decisions)
    return replace(first, heads=best.heads, decisions=decisions, alone=first.heads)


def refitted(
    fitting: Fitting,
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    fitted: FittedHeads,
    plans: list[HeadSettings],
) -> FittedHeads:
    """The same heads fitted anew, to the held-out pairs as well, where the settings ask
    for it; the history is that of the heads before.
    """
    if not fitting.settings.refit or held_out is None:
        return fitted
    every = pairs.joined(held_out)
    settings, decisions = fitting.settings, dict(fitted.decisions)
    decisions["refit"] = f"on {len(every):,} pairs, {len(held_out):,} of them held out"
    joined = decisions.get("joined", {})
    if settings.objective == "cca":
        again = fit_closed_form(every, None, settings, choice_of(decisions))
        return replace(again, history=fitted.history, decisions=decisions)
    parts: list[Heads] = []
    for number, plan in enumerate(plans if joined.get("is_taken") else plans[:1], 1):
        plan, until = plan.override(patience=0), fitted.best_epoch
        if number > 1:
            plan = plan.override(epochs=until)
        name = f"refit-{number}-of-{until}-epochs"
        again = fitting.fit(every, None, plan, name, until=until)
        if again.stopped:
            return replace(fitted, stopped=True)
        parts.append(again.heads)
    heads = parts[0]
    if joined.get("is_taken"):
        choice = choice_of(decisions["ridge"])
        closed = fit_closed_form(every, None, closed_settings(settings, every), choice)
        parts.append(closed.heads)
        heads = joined_again(joined, parts, every, settings.embed_dim or 0)
    return replace(fitted, heads=heads, decisions=decisions)


def joined_again(
    joined: Mapping[str, Any], parts: list[Heads], pairs: VectorPairs, width: int
) -> Heads:
    """Other heads in the combination that was chosen."""
    places = [place for place, weight in enumerate(joined["weights"]) if weight]
    if places == [0] and not joined["strength"]:
        return parts[0]
    bank = Rows.of(pairs, N_BANK)
    weights = [joined["weights"][i] for i in places]
    some = [parts[i] for i in places]
    banks = [sides(heads, bank) for heads in some]
    return side_by_side(weights, some, banks, joined["strength"], width)


def combinations(
    parts: list[Heads], names: list[str], judge: Rows, bank: Rows, width: int
) -> list[Combination]:
    """What may be joined, the first heads alone first; with ``width`` columns, or all
    of them if it is 0.

    A bias against hubs is left out where it lowers recall at ten.
    """
    rows = [sides(heads, judge) for heads in parts]
    banks = [sides(heads, bank) for heads in parts]
    strengths = () if 0 < width < LEAST_WIDTH else HUB_STRENGTHS
    tried = []
    for weights in weightings(len(parts)):
        places = [place for place, weight in enumerate(weights) if weight]
        message = " + ".join(f"{weights[i]:g} × {names[i]}" for i in places)
        some = [weights[i] for i in places], [parts[i] for i in places]
        some_rows, some_banks = [rows[i] for i in places], [banks[i] for i in places]
        plain = side_by_side(*some, some_banks, 0.0, width)
        found = joined_recalls(plain, some_rows, judge.ids)
        at_ten = float(found[AT_TEN].mean())
        heads: Heads = parts[0] if places == [0] else plain
        tried.append(Combination(message, weights, 0.0, heads, found.mean(0)))
        for strength in strengths:
            heads = side_by_side(*some, some_banks, strength, width)
            found = joined_recalls(heads, some_rows, judge.ids)
            if float(found[AT_TEN].mean()) < at_ten:
                continue
            words = f"{message}, hubs {strength:g}"
            tried.append(Combination(words, weights, strength, heads, found.mean(0)))
    return tried


def weightings(n: int) -> list[list[float]]:
    """Weights of n heads, the last of which is the closed form: the first alone, all
    but the closed form, either of these with it, and it alone.
    """
    n_fitted = n - 1
    plain = [[1.0] * k + [0.0] * (n - k) for k in sorted({1, n_fitted})]
    mixed = [[*row[:-1], weight] for row in plain for weight in CLOSED_WEIGHTS]
    return [*plain, *mixed, [0.0] * n_fitted + [1.0]]


def sides(heads: Heads, rows: Rows) -> tuple[Tensor, Tensor]:
    """The unit rows of both sides."""
    return unit_rows(heads[0], rows.a), unit_rows(heads[1], rows.b)


def side_by_side(
    weights: list[float],
    parts: list[Heads],
    banks: list[tuple[Tensor, Tensor]],
    strength: float,
    width: int,
) -> tuple[Members, Members]:
    """Heads joined with a bias of this strength, cut to ``width`` columns if it is not
    0.
    """
    extra = 4 if strength else 0
    total = sum(rows.shape[1] for rows, _ in banks)
    cut = width - extra if width and total + extra > width else 0
    n_rows = len(banks[0][0]) if strength else 0
    of_a = [cast(Head, heads[0]) for heads in parts]
    of_b = [cast(Head, heads[1]) for heads in parts]
    a = Members(of_a, weights, cut=cut, side=0, rows=n_rows, strength=strength)
    b = Members(of_b, weights, cut=cut, side=1, rows=n_rows, strength=strength)
    fit_members(a.eval(), b.eval(), [x for x, _ in banks], [y for _, y in banks])
    return a, b


@torch.no_grad()
def joined_recalls(
    heads: tuple[Members, Members], rows: list[tuple[Tensor, Tensor]], ids: Tensor
) -> Tensor:
    """(6, ids) recalls, from the unit rows of the heads that are joined."""
    a = heads[0].joined([x for x, _ in rows])
    b = heads[1].joined([y for _, y in rows])
    return recalls_of_ids(a, b, ids)
