"""``auto`` and members: several heads are fitted, and held-out pairs choose which of
them stand side by side with the closed form.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cloob.data.vectors import VectorPairs
from cloob.family import ObjectiveName
from cloob.functional.bootstrap import bootstrap_interval
from cloob.heads.closed import choice_of, closed_beside, fit_closed_form
from cloob.heads.fit import OnEpoch, fit
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

OBJECTIVE: ObjectiveName = "infoloob"
"""That of ``auto``: in its records no other was ahead by more than noise."""
STARTS: Sequence[str] = ("closed-form", "random")
N_JUDGES = 2000  # held-out pairs that choose
N_BANK = 1024  # training pairs of the bias against hubs
N_HALVES = 20  # of the held-out ids, which judge whether to join
CLOSED_WEIGHTS = (0.7, 1.0, 1.4)  # of the closed form beside the heads
HUB_STRENGTHS = (0.25, 0.5)
LEAST_WIDTH = 16  # of joined heads, for four columns of a bias
AT_TEN = [RECALLS.index(10), len(RECALLS) + RECALLS.index(10)]


@dataclass(frozen=True)
class Part:
    """Heads that may be joined, and their unit rows of both sides."""

    name: str
    heads: Heads
    judged: tuple[Tensor, Tensor]  # of the pairs that choose
    bank: tuple[Tensor, Tensor]  # of training pairs

    @classmethod
    def of(cls, name: str, heads: Heads, judge: Rows, bank: Rows) -> Part:
        """The part with its rows."""
        a, b = heads
        judged = unit_rows(a, judge.a), unit_rows(b, judge.b)
        return cls(name, heads, judged, (unit_rows(a, bank.a), unit_rows(b, bank.b)))


@dataclass(frozen=True)
class Combination:
    """Parts side by side, and how good they are on the pairs that choose."""

    message: str
    weights: list[float]  # of all parts; the closed form is the last
    strength: float  # of the bias against hubs
    heads: Heads
    recalls: Tensor  # (ids,)

    @property
    def is_alone(self) -> bool:
        """Whether it is one pair of fitted heads as they are."""
        return self.weights[-1] == 0 and sum(self.weights) == 1 and not self.strength


class Gain(NamedTuple):
    """What joining gains, by halves of the ids that did not choose."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (100 * value for value in self)
        return f"{mean:+.1f} points, {low:+.1f} to {high:+.1f} in 18 of 20 halves"


def choose(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    *,
    scales: Mapping[str, dict[str, Any]] = USUAL_SCALES,
    folder: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> FittedHeads:
    """Fits what the settings say: a member of the family, the closed form, several
    heads side by side, or with ``auto`` what held-out pairs choose.

    Args:
        pairs: The training pairs.
        held_out: The pairs that choose; they are judged and never trained on.
        settings: Those of the heads.
        scales: Where objectives start, by their names, as far as the settings leave it
            open.
        folder: Of the states of all fits, from which a killed choice goes on.
        on_epoch: Called with the line of every epoch, of one fit after another.

    Returns:
        The heads; ``decisions`` has what was tried, chosen and joined.
    """
    settings = settings or HeadSettings()
    check_held_out(settings, holds_out=held_out is not None, advice="some")
    plans = plans_of(settings, scales)
    joins = settings.objective == "auto" or len(plans) > 1
    closed = None
    if joins or not plans or settings.start == "closed-form":
        closed = fit_closed_form(pairs, held_out, closed_beside(settings, pairs))
    fits = []
    for number, plan in enumerate(plans, 1):
        state = None if folder is None else folder / f"fit-{number}.pt"
        fits.append(
            fit(pairs, held_out, plan, closed=closed, state=state, on_epoch=on_epoch)
        )
    if joins:
        assert held_out is not None and closed is not None
        chosen = join(pairs, held_out, settings, plans, fits, closed)
    elif fits:
        chosen = fits[0]
    else:
        assert closed is not None
        chosen = closed
        if on_epoch is not None:
            on_epoch(closed.history[0])
    if settings.refit and held_out is not None:
        every = pairs.joined(held_out)
        again = refitted(every, settings, plans, fits, closed, chosen, folder)
        count = f"on {len(every):,} pairs, {len(held_out):,} of them held out"
        return replace(again, decisions={**chosen.decisions, "refit": count})
    return chosen


def plans_of(
    settings: HeadSettings, scales: Mapping[str, dict[str, Any]]
) -> list[HeadSettings]:
    """The settings of all heads that are fitted; none for the closed form."""
    if settings.objective == "cca":
        return []
    is_auto = settings.objective == "auto"
    name = OBJECTIVE if is_auto else settings.objective
    usual_starts = STARTS if is_auto else STARTS[1:]
    starts = usual_starts if settings.start is None else [settings.start]
    n_members = settings.members or len(usual_starts)
    usual = scales.get(name, {})
    missing = {k: v for k, v in usual.items() if getattr(settings, k) is None}
    plan = settings.override(objective=name, members=None, clean=None, **missing)
    return [
        plan.override(seed=plan.seed + number, start=starts[number % len(starts)])
        for number in range(n_members)
    ]


# --- what is joined ---


def join(
    pairs: VectorPairs,
    held_out: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    fits: list[FittedHeads],
    closed: FittedHeads,
) -> FittedHeads:
    """The best of the fitted heads; joined with others and the closed form if the
    halves of the held-out ids say that this finds more.
    """
    judge, bank = Rows.of(held_out, N_JUDGES), Rows.of(pairs, N_BANK)
    names = [f"{plan.objective} {number}" for number, plan in enumerate(plans, 1)]
    names.append(f"cca {len(plans) + 1}")
    heads = [fitted.heads for fitted in (*fits, closed)]
    parts = [Part.of(*one, judge, bank) for one in zip(names, heads, strict=True)]
    tried = combinations(parts, judge.ids, settings.embed_dim or 0)
    alone = [one for one in tried if one.is_alone]
    several = [one for one in tried if not one.is_alone]
    gain = gain_by_halves(alone, several)
    best = best_of(several)
    first = max(range(len(fits)), key=lambda place: float(alone[place].recalls.mean()))

    recall = float(recalls(best.heads, Rows.of(held_out, GALLERY)).mean())
    verdict = "joined" if gain.mean > 0 else "not joined"
    logger.info("%s: %s; %.1f %% (%s)", verdict, best.message, 100 * recall, gain)
    trials = []
    for plan, one in zip(plans, alone, strict=True):
        trials.append(trial_of(plan.objective, plan.start, one.recalls))
    found = recalls_of_ids(*parts[-1].judged, judge.ids).mean(0)
    trials.append(trial_of("cca", None, found))
    decisions = {
        "objective": {
            "chosen": plans[first].objective,
            "start": plans[first].start,
            "trials": trials,
        },
        "joined": {
            "joined": best.message,
            "weights": best.weights,
            "strength": best.strength,
            "recall": recall,
            "difference": list(gain),
            "is_taken": gain.mean > 0,
        },
        "ridge": closed.decisions,
    }
    chosen = replace(fits[first], decisions=decisions)
    if gain.mean > 0:
        return replace(chosen, heads=best.heads)
    return chosen


def trial_of(objective: str, start: str | None, found: Tensor) -> dict[str, Any]:
    """The entry of a fit in the decisions, which is logged."""
    mean = float(found.mean())
    low, high = bootstrap_interval(found)
    words = objective if start is None else f"{objective}, {start} start"
    percent = 100 * mean, 100 * low, 100 * high
    logger.info("%-30s recall %.1f %% (%.1f to %.1f)", words, *percent)
    return {
        "objective": objective,
        "start": start,
        "recall": mean,
        "interval": (low, high),
    }


def best_of(tried: list[Combination]) -> Combination:
    """That with the highest recall, the first of equals."""
    return max(tried, key=lambda one: float(one.recalls.mean()))


def gain_by_halves(alone: list[Combination], several: list[Combination]) -> Gain:
    """What the best of several gains over the best alone: one random half of the ids
    chooses both, the other half judges them.
    """
    tables = [torch.stack([one.recalls for one in way]) for way in (alone, several)]
    n = tables[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(N_HALVES, dtype=torch.float64)
    for number in range(N_HALVES):
        order = torch.randperm(n, generator=generator)
        chooses, judges = order[: max(1, n // 2)], order[n // 2 :]
        chosen = [table[table[:, chooses].mean(1).argmax()] for table in tables]
        gains[number] = (chosen[1] - chosen[0])[judges].mean()
    gains = gains.sort().values
    return Gain(float(gains.mean()), float(gains[1]), float(gains[-2]))


def combinations(parts: list[Part], ids: Tensor, width: int) -> list[Combination]:
    """What may be joined; with ``width`` columns, or all of them if it is 0.

    A bias against hubs is left out where it lowers recall at ten.
    """
    strengths = () if 0 < width < LEAST_WIDTH else HUB_STRENGTHS
    tried = []
    for weights in weightings(len(parts) - 1):
        used = [number for number, weight in enumerate(weights) if weight]
        message = " + ".join(f"{weights[i]:g} × {parts[i].name}" for i in used)
        plain = side_by_side(parts, weights, 0.0, width)
        found = joined_recalls(plain, [parts[i] for i in used], ids)
        at_ten = float(found[AT_TEN].mean())
        is_fitted = used in [[number] for number in range(len(parts) - 1)]
        heads = parts[used[0]].heads if is_fitted else plain
        tried.append(Combination(message, weights, 0.0, heads, found.mean(0)))
        for strength in strengths:
            biased = side_by_side(parts, weights, strength, width)
            found = joined_recalls(biased, [parts[i] for i in used], ids)
            if float(found[AT_TEN].mean()) >= at_ten:
                words = f"{message}, hubs {strength:g}"
                found = found.mean(0)
                tried.append(Combination(words, weights, strength, biased, found))
    return tried


def weightings(n_fitted: int) -> list[list[float]]:
    """Weights of the fitted heads and the closed form: each of the fitted alone and all
    of them, without the closed form and with it, and that by itself.
    """
    rows = torch.eye(n_fitted).tolist()
    if n_fitted > 1:
        rows.append([1.0] * n_fitted)
    beside = [[*row, weight] for row in rows for weight in (0.0, *CLOSED_WEIGHTS)]
    return [*beside, [0.0] * n_fitted + [1.0]]


def side_by_side(
    parts: list[Part], weights: list[float], strength: float, width: int
) -> tuple[Members, Members]:
    """The parts that have a weight, with a bias of this strength, cut to ``width``
    columns if it is not 0.
    """
    used = [part for part, weight in zip(parts, weights, strict=True) if weight]
    weights = [weight for weight in weights if weight]
    extra = 4 if strength else 0
    total = sum(part.bank[0].shape[1] for part in used)
    cut = width - extra if width and total + extra > width else 0
    n_rows = len(used[0].bank[0]) if strength else 0
    of_a = [cast(Head, part.heads[0]) for part in used]
    of_b = [cast(Head, part.heads[1]) for part in used]
    a = Members(of_a, weights, cut=cut, side=0, rows=n_rows, strength=strength)
    b = Members(of_b, weights, cut=cut, side=1, rows=n_rows, strength=strength)
    banks = [part.bank for part in used]
    fit_members(a.eval(), b.eval(), [x for x, _ in banks], [y for _, y in banks])
    return a, b


@torch.no_grad()
def joined_recalls(
    heads: tuple[Members, Members], used: list[Part], ids: Tensor
) -> Tensor:
    """(6, ids) recalls of parts that are joined."""
    a = heads[0].joined([part.judged[0] for part in used])
    b = heads[1].joined([part.judged[1] for part in used])
    return recalls_of_ids(a, b, ids)


# --- the same on all pairs ---


def refitted(
    every: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    fits: list[FittedHeads],
    closed: FittedHeads | None,
    chosen: FittedHeads,
    folder: Path | None,
) -> FittedHeads:
    """What was chosen, fitted anew to all pairs for as long as the best took; the
    history is that of the heads before.
    """
    if closed is not None:
        choice = choice_of(closed.decisions)
        its_settings = closed_beside(settings, every)
        closed = fit_closed_form(every, None, its_settings, choice)
    if not fits:
        assert closed is not None
        return replace(chosen, heads=closed.heads)
    joined = chosen.decisions.get("joined", {})
    weights = [float(fitted.history is chosen.history) for fitted in fits] + [0.0]
    strength = 0.0
    if joined.get("is_taken"):
        weights, strength = joined["weights"], joined["strength"]
    used = [place for place in range(len(fits)) if weights[place]]
    heads = []
    for place in used:
        plan, until = plans[place].override(patience=0), fits[place].best_epoch
        state = None if folder is None else folder / f"refit-{place + 1}-{until}.pt"
        again = fit(every, None, plan, closed=closed, until=until, state=state)
        heads.append(again.heads)
    if not joined.get("is_taken"):
        return replace(chosen, heads=heads[0])
    if weights[-1]:
        assert closed is not None
        heads.append(closed.heads)
    bank = Rows.of(every, N_BANK)
    parts = [Part.of("", one, bank, bank) for one in heads]
    weights = [weight for weight in weights if weight]
    width = settings.embed_dim or 0
    return replace(chosen, heads=side_by_side(parts, weights, strength, width))
