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
from cloob.errors import counted
from cloob.family import ObjectiveName
from cloob.functional.bootstrap import bootstrap_interval
from cloob.heads.closed import choice_of, closed_beside, fit_closed_form
from cloob.heads.fit import OnEpoch, fit
from cloob.heads.fitted import (
    GALLERY,
    FittedHeads,
    Rows,
    recalls,
    recalls_of_ids,
)
from cloob.heads.head import Head, Heads, Members, fit_members, unit_rows
from cloob.heads.settings import (
    USUAL_SCALES,
    ClosedForm,
    HeadSettings,
    check_held_out,
)

logger = logging.getLogger(__name__)

OBJECTIVE: ObjectiveName = "infoloob"
"""That of ``auto``: in its records no other was ahead by more than noise."""
STARTS: Sequence[str] = ("closed-form", "random")
N_JUDGES = 2000  # held-out pairs that choose
N_BANK = 1024  # training pairs of the bias against hubs
N_HALVES = 20  # of the held-out ids or groups, which judge whether to join
N_WAVED = 128  # columns of the narrower side, up to which waves are tried
STRENGTHS = (0.0, 0.5)  # of the bias against hubs
LEAST_WIDTH = 16  # of joined heads, for four columns of a bias


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
    """Parts side by side."""

    places: list[int]  # of the parts; the closed form is the last of them
    strength: float = 0.0  # of the bias against hubs

    def of(self, parts: list[Part]) -> list[Part]:
        """Those that are joined."""
        return [parts[place] for place in self.places]

    def message(self, parts: list[Part]) -> str:
        """What is joined, in words."""
        names = " + ".join(part.name for part in self.of(parts))
        return f"{names}, hubs {self.strength:g}" if self.strength else names


class Gain(NamedTuple):
    """What joining gains, by halves of the ids or groups that did not choose."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (100 * value for value in self)
        return f"{mean:+.1f} points, {low:+.1f} to {high:+.1f} in 18 of 20 halves"


class Chosen(NamedTuple):
    """The heads, and which of all parts they are."""

    fitted: FittedHeads
    combination: Combination


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
    closed = closed_form(pairs, held_out, settings)
    plans = plans_of(settings, scales, closed)
    if not plans:
        assert closed is not None
        fits = [closed]
        if on_epoch is not None:
            on_epoch(closed.history[0])
    else:
        fits = fit_all(pairs, held_out, settings, plans, closed, folder, on_epoch)
    chosen = Chosen(fits[0], Combination([0]))
    if joins(settings):
        assert held_out is not None
        chosen = join(pairs, held_out, settings, plans, fits)
    if settings.refit and held_out is not None:
        every = pairs.joined(held_out)
        again = refitted(every, settings, plans, fits, chosen, folder)
        count = f"on {len(every):,} pairs, {len(held_out):,} of them held out"
        return replace(again, decisions={**again.decisions, "refit": count})
    return chosen.fitted


def joins(settings: HeadSettings) -> bool:
    """Whether heads may stand side by side."""
    return settings.objective == "auto" or (settings.members or 1) > 1


def closed_form(
    pairs: VectorPairs, held_out: VectorPairs | None, settings: HeadSettings
) -> FittedHeads | None:
    """The closed form that heads start from or stand beside, or that is asked for; with
    ``auto`` that of few columns or of waves of them, whichever finds more.
    """
    is_needed = settings.is_closed_form or settings.start == "closed-form"
    if not is_needed and not joins(settings):
        return None
    plain = fit_closed_form(pairs, held_out, closed_beside(settings, pairs))
    width = min(pairs.a.shape[1], pairs.b.shape[1])
    is_open = settings.objective == "auto" and settings.start is None
    if not is_open or settings.head == "linear" or width > N_WAVED:
        return plain
    beside = closed_beside(settings, pairs, "kcca")
    columns = choice_of(plain.decisions).columns
    waved = fit_closed_form(pairs, held_out, beside, columns=columns)
    return max(plain, waved, key=lambda fitted: fitted.recall or 0.0)


def fit_all(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    settings: HeadSettings,
    plans: list[HeadSettings],
    closed: FittedHeads | None,
    folder: Path | None,
    on_epoch: OnEpoch | None,
) -> list[FittedHeads]:
    """One fit after another, and the closed form; with ``auto`` each has to keep up
    with this and those before.
    """
    is_auto = settings.objective == "auto"
    lead = 0.0
    if is_auto:
        assert closed is not None and held_out is not None
        lead = float(recalls(closed.heads, Rows.of(held_out, GALLERY)).mean())
    fits = []
    for number, plan in enumerate(plans, 1):
        state = state_file(folder, f"fit-{number}")
        fitted = fit(
            pairs,
            held_out,
            plan,
            closed=closed,
            lead=lead,
            state=state,
            on_epoch=on_epoch,
        )
        fits.append(fitted)
        if is_auto:
            lead = max(lead, fitted.recall or 0.0)
    return fits if closed is None else [*fits, closed]


def state_file(folder: Path | None, name: str) -> Path | None:
    """Where the state of a fit lies, if states are kept."""
    return None if folder is None else folder / f"{name}.pt"


def plans_of(
    settings: HeadSettings,
    scales: Mapping[str, dict[str, Any]],
    closed: FittedHeads | None,
) -> list[HeadSettings]:
    """The settings of all heads that are fitted; none for the closed form. With
    ``auto`` some start from it, if it is linear.
    """
    if settings.is_closed_form:
        return []
    is_auto = settings.objective == "auto"
    name = OBJECTIVE if is_auto else settings.objective
    usual_starts = STARTS[1:]
    if is_auto and closed is not None and name_of(closed) == "cca":
        usual_starts = STARTS
    starts = usual_starts if settings.start is None else [settings.start]
    n_members = settings.members or len(usual_starts)
    usual = scales.get(name, {})
    missing = {k: v for k, v in usual.items() if getattr(settings, k) is None}
    plan = settings.override(objective=name, members=None, clean=None, **missing)
    return [
        plan.override(seed=plan.seed + number, start=starts[number % len(starts)])
        for number in range(n_members)
    ]


def name_of(closed: FittedHeads) -> ClosedForm:
    """Which closed form it is."""
    name: ClosedForm = closed.objective["closed_form"]
    return name


# --- what is joined ---


def join(
    pairs: VectorPairs,
    held_out: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    fits: list[FittedHeads],
) -> Chosen:
    """The best of the fitted heads; joined with others and the closed form, which is
    the last of the fits, if halves of the held-out ids or groups say that this finds
    more.
    """
    judges = held_out.at_most(N_JUDGES)
    units = judges.units_of_ids()
    judge, bank = Rows.of(judges), Rows.of(pairs, N_BANK)
    names = [f"{plan.objective} {number}" for number, plan in enumerate(plans, 1)]
    parts = [
        Part.of(name, fitted.heads, judge, bank)
        for name, fitted in zip([*names, name_of(fits[-1])], fits, strict=True)
    ]
    width = settings.embed_dim or 0
    alone = [Combination([place]) for place in range(len(plans))]
    several = combinations(len(plans), width)
    of_alone, of_several = (
        torch.stack([recalls_of(one, parts, judge.ids, width) for one in tried])
        for tried in (alone, several)
    )
    gain = gain_by_halves(of_alone, of_several, units)
    first = int(of_alone.mean(1).argmax())
    best = several[int(of_several.mean(1).argmax())]
    heads = joined_heads(best, parts, width)
    recall = float(recalls(heads, Rows.of(held_out, GALLERY)).mean())
    is_taken = gain.mean > 0
    verdict = "joined" if is_taken else "not joined"
    message = best.message(parts)
    logger.info("%s: %s; %.1f %% (%s)", verdict, message, 100 * recall, gain)

    trials = []
    for plan, found in zip(plans, of_alone, strict=True):
        trials.append(trial_of(plan.objective, plan.start, found, units))
    closed_alone = several.index(Combination([len(plans)]))
    name = name_of(fits[-1])
    trials.append(trial_of(name, None, of_several[closed_alone], units))
    objective = {
        "chosen": plans[first].objective,
        "start": plans[first].start,
        "trials": trials,
    }
    joined = {
        "joined": message,
        "strength": best.strength,
        "recall": recall,
        "difference": list(gain),
        "is_taken": is_taken,
    }
    decisions = {"objective": objective, "joined": joined, "ridge": fits[-1].decisions}
    fitted = replace(fits[first], decisions=decisions)
    if is_taken:
        return Chosen(replace(fitted, heads=heads), best)
    return Chosen(fitted, alone[first])


def trial_of(
    objective: str, start: str | None, found: Tensor, units: Tensor
) -> dict[str, Any]:
    """The entry of a fit in the decisions, which is logged; of the (ids,) recalls and
    the units that are resampled.
    """
    mean = float(found.mean())
    low, high = bootstrap_interval(found, groups=units)
    words = objective if start is None else f"{objective}, {start} start"
    percent = 100 * mean, 100 * low, 100 * high
    n_units = len(torch.unique(units))
    over = counted(n_units, "ids" if n_units == len(units) else "groups")
    logger.info("%-30s recall %.1f %% (%.1f to %.1f over %s)", words, *percent, over)
    return {
        "objective": objective,
        "start": start,
        "recall": mean,
        "interval": (low, high),
    }


def gain_by_halves(alone: Tensor, several: Tensor, units: Tensor) -> Gain:
    """What the best of several gains over the best alone, of the recalls (ways, ids) of
    both: one random half of the (ids,) units chooses, the other half judges.
    """
    names, unit = torch.unique(units, return_inverse=True)
    n = len(names)
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(N_HALVES, dtype=torch.float64)
    for number in range(N_HALVES):
        turn_of_unit = torch.randperm(n, generator=generator).argsort()
        turn, order = turn_of_unit[unit].sort(stable=True)
        chooses, judges = order[turn < max(1, n // 2)], order[turn >= n // 2]
        best_alone = alone[alone[:, chooses].mean(1).argmax()]
        best = several[several[:, chooses].mean(1).argmax()]
        gains[number] = (best - best_alone)[judges].mean()
    gains = gains.sort().values
    return Gain(float(gains.mean()), float(gains[1]), float(gains[-2]))


def combinations(n_fitted: int, width: int) -> list[Combination]:
    """What may be joined: each of the fitted heads or all of them, with the closed form
    or without, and this by itself; with a bias against hubs or without.
    """
    fitted = [[place] for place in range(n_fitted)]
    if n_fitted > 1:
        fitted.append([*range(n_fitted)])
    beside = [[*places, n_fitted] for places in fitted]
    strengths = (0.0,) if 0 < width < LEAST_WIDTH else STRENGTHS
    return [
        Combination(places, strength)
        for places in [*fitted, *beside, [n_fitted]]
        for strength in strengths
        if strength or len(places) > 1 or places == [n_fitted]
    ]


@torch.no_grad()
def recalls_of(
    combination: Combination, parts: list[Part], ids: Tensor, width: int
) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions."""
    a, b = side_by_side(combination, parts, width)
    used = combination.of(parts)
    rows_a = a.joined([part.judged[0] for part in used])
    rows_b = b.joined([part.judged[1] for part in used])
    return recalls_of_ids(rows_a, rows_b, ids).mean(0)


def side_by_side(
    combination: Combination, parts: list[Part], width: int
) -> tuple[Members, Members]:
    """The parts with the bias against hubs, cut to ``width`` columns if it is not 0."""
    used, strength = combination.of(parts), combination.strength
    banks_a = [part.bank[0] for part in used]
    banks_b = [part.bank[1] for part in used]
    extra = 4 if strength else 0
    total = sum(rows.shape[1] for rows in banks_a)
    cut = width - extra if width and total + extra > width else 0
    n_rows = len(banks_a[0]) if strength else 0
    heads_a = [cast(Head, part.heads[0]) for part in used]
    heads_b = [cast(Head, part.heads[1]) for part in used]
    a = Members(heads_a, cut=cut, side=0, rows=n_rows, strength=strength)
    b = Members(heads_b, cut=cut, side=1, rows=n_rows, strength=strength)
    fit_members(a.eval(), b.eval(), banks_a, banks_b)
    return a, b


def joined_heads(combination: Combination, parts: list[Part], width: int) -> Heads:
    """The heads of a combination; of one part without a bias those that it has."""
    if len(combination.places) == 1 and not combination.strength:
        return parts[combination.places[0]].heads
    return side_by_side(combination, parts, width)


# --- the same on all pairs ---


def refitted(
    every: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    fits: list[FittedHeads],
    chosen: Chosen,
    folder: Path | None,
) -> FittedHeads:
    """What was chosen, fitted anew to all pairs for as long as the best took; the
    history is that of the heads before.
    """
    bank = Rows.of(every, N_BANK)
    closed = None
    if len(fits) > len(plans):
        choice = choice_of(fits[-1].decisions)
        beside = closed_beside(settings, every, name_of(fits[-1]))
        closed = fit_closed_form(every, None, beside, choice)
    again = []
    for place in chosen.combination.places:
        if place == len(plans):
            assert closed is not None
            again.append(closed)
            continue
        plan, until = plans[place].override(patience=0), fits[place].best_epoch
        state = state_file(folder, f"refit-{place + 1}-{until}")
        fitted = fit(every, None, plan, closed=closed, until=until, state=state)
        again.append(fitted)
    parts = [Part.of("", fitted.heads, bank, bank) for fitted in again]
    combination = replace(chosen.combination, places=[*range(len(parts))])
    heads = joined_heads(combination, parts, settings.embed_dim or 0)
    return replace(chosen.fitted, heads=heads)
