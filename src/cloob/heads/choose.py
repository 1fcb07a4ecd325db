"""``auto`` and members: several heads are fitted and stand side by side with the closed
form, unless held-out pairs clearly say otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cloob.data.vectors import VectorPairs
from cloob.errors import counted
from cloob.family import ObjectiveName
from cloob.functional.bootstrap import bootstrap_interval
from cloob.heads.closed import (
    ClosedHeads,
    closed_settings,
    fit_closed_form,
    refit_closed_form,
)
from cloob.heads.fit import fit
from cloob.heads.fitted import (
    GALLERY,
    FittedHeads,
    OnEpoch,
    Rows,
    SingleHeads,
    recalls,
    recalls_of_ids,
)
from cloob.heads.head import Head, Heads, Members, fit_members, unit_rows
from cloob.heads.settings import USUAL_SCALES, HeadSettings, check_held_out

logger = logging.getLogger(__name__)

Scales = Mapping[str, Mapping[str, float | bool]]
Sides = tuple[Tensor, Tensor]
SIDES: tuple[Literal[0, 1], ...] = (0, 1)

OBJECTIVE: ObjectiveName = "infoloob"
"""That of ``auto``: in its records no other was ahead by more than noise."""
N_JUDGES = 2000  # held-out pairs that choose
N_BANK = 1024  # training pairs of the bias against hubs
N_HALVES = 20  # of the held-out ids or groups, which judge what to join
N_WAVED = 128  # columns of the narrower side, up to which waves are tried
STRENGTHS = (0.5, 0.0)  # of the bias against hubs, the usual one first
LEAST_WIDTH = 16  # of joined heads, for four columns of a bias


class Part(NamedTuple):
    """Heads that may be joined, and their unit rows of some training pairs."""

    name: str
    heads: tuple[Head, Head]
    bank: Sides


@dataclass(frozen=True)
class Combination:
    """Parts side by side."""

    places: list[int]  # of the parts; the closed form is the last of them
    strength: float = 0.0  # of the bias against hubs

    def picked(self, parts: list[Part]) -> list[Part]:
        """Those that are joined."""
        return [parts[place] for place in self.places]

    def message(self, parts: list[Part]) -> str:
        """What is joined, in words."""
        names = " + ".join(part.name for part in self.picked(parts))
        return f"{names}, hubs {self.strength:g}" if self.strength else names


class Gain(NamedTuple):
    """What the best combination gains over all side by side, by halves of the ids or
    groups that did not choose it.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (100 * value for value in self)
        return f"{mean:+.1f} points, {low:+.1f} to {high:+.1f} in 18 of 20 halves"


class Trial(NamedTuple):
    """What heads find by themselves."""

    objective: str
    start: str | None
    recall: float
    interval: tuple[float, float]


def choose(
    pairs: VectorPairs,
    held_out: VectorPairs | None = None,
    settings: HeadSettings | None = None,
    *,
    scales: Scales = USUAL_SCALES,
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
    trained = fit_all(pairs, held_out, plans, closed, settings, folder, on_epoch)
    if joins(settings):
        assert closed is not None and held_out is not None
        fitted, chosen = join(pairs, held_out, settings, plans, trained, closed)
    elif trained:
        fitted, chosen = trained[0], Combination([0])
    else:
        assert closed is not None
        fitted, chosen = closed, Combination([0])
        if on_epoch is not None:
            on_epoch(closed.history[0])
    if held_out is None or not settings.refit:
        return fitted
    every = pairs.joined(held_out)
    heads = refitted(every, settings, plans, trained, closed, chosen, folder)
    count = f"on {len(every):,} pairs, {len(held_out):,} of them held out"
    decisions = {**fitted.decisions, "refit": count}
    return FittedHeads(heads, fitted.objective, fitted.history, decisions)


def joins(settings: HeadSettings) -> bool:
    """Whether heads may stand side by side."""
    return settings.objective == "auto" or (settings.members or 1) > 1


def closed_form(
    pairs: VectorPairs, held_out: VectorPairs | None, settings: HeadSettings
) -> ClosedHeads | None:
    """The closed form that heads start from or stand beside, or that is asked for; with
    ``auto`` that of few columns or of waves of them, whichever finds more.
    """
    starts_there = settings.start == "closed-form"
    if not (settings.is_closed_form or starts_there or joins(settings)):
        return None
    plain = fit_closed_form(pairs, held_out, closed_settings(settings, pairs))
    width = min(pairs.a.shape[1], pairs.b.shape[1])
    is_open = settings.objective == "auto" and settings.start is None
    if not is_open or settings.head == "linear" or width > N_WAVED:
        return plain
    beside = closed_settings(settings, pairs, "kcca")
    waved = fit_closed_form(pairs, held_out, beside, plain.choice.columns)
    return max(plain, waved, key=lambda fitted: fitted.recall or 0.0)


def plans_of(
    settings: HeadSettings, scales: Scales, closed: ClosedHeads | None
) -> list[HeadSettings]:
    """The settings of all heads that are trained; none for the closed form. With
    ``auto`` some start from it, if it is linear.
    """
    if settings.is_closed_form:
        return []
    name = settings.objective
    starts = [settings.start or "random"]
    if name == "auto":
        name = OBJECTIVE
        if (
            settings.start is None
            and closed is not None
            and closed.choice.form == "cca"
        ):
            starts = ["closed-form", "random"]
    plan = settings.override(objective=name, members=None, clean=None)
    for scale, value in scales.get(name, {}).items():
        if getattr(settings, scale) is None:
            plan = plan.override(**{scale: value})
    return [
        plan.override(seed=plan.seed + number, start=starts[number % len(starts)])
        for number in range(settings.members or len(starts))
    ]


def fit_all(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    plans: list[HeadSettings],
    closed: ClosedHeads | None,
    settings: HeadSettings,
    folder: Path | None,
    on_epoch: OnEpoch | None,
) -> list[SingleHeads]:
    """One fit after another; with ``auto`` each has to keep up with the closed form and
    those before.
    """
    lead = 0.0
    if settings.objective == "auto":
        assert closed is not None and held_out is not None
        lead = float(recalls(closed.heads, Rows.of(held_out, GALLERY)).mean())
    fits: list[SingleHeads] = []
    for number, plan in enumerate(plans, 1):
        fitted = fit(
            pairs,
            held_out,
            plan,
            closed=closed,
            lead=lead,
            state=state_file(folder, f"fit-{number}"),
            on_epoch=on_epoch,
        )
        fits.append(fitted)
        if settings.objective == "auto":
            lead = max(lead, fitted.recall or 0.0)
    return fits


def state_file(folder: Path | None, name: str) -> Path | None:
    """Where the state of a fit lies, if states are kept."""
    return None if folder is None else folder / f"{name}.pt"


# --- what is joined ---


def join(
    pairs: VectorPairs,
    held_out: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    trained: list[SingleHeads],
    closed: ClosedHeads,
) -> tuple[FittedHeads, Combination]:
    """All heads side by side, the closed form the last of them; another combination
    where halves of the held-out ids or groups say that it finds more.
    """
    judges = held_out.at_most(N_JUDGES)
    judge, bank = Rows.of(judges), Rows.of(pairs, N_BANK)
    names = [f"{plan.objective} {number}" for number, plan in enumerate(plans, 1)]
    parts = [
        Part(name, fitted.heads, unit_sides(fitted.heads, bank))
        for name, fitted in zip(
            [*names, closed.choice.form], [*trained, closed], strict=True
        )
    ]
    judged = [unit_sides(part.heads, judge) for part in parts]
    width = settings.embed_dim or 0
    tried = combinations(len(plans), width)
    found = torch.stack(
        [recalls_of(one, parts, judged, judge.ids, width) for one in tried]
    )
    units = judges.units_of_ids()
    gain = gain_by_halves(found, units)
    chosen = tried[int(found.mean(1).argmax())] if gain.low > 0 else tried[0]
    heads = joined_heads(chosen, parts, width)
    recall = float(recalls(heads, Rows.of(held_out, GALLERY)).mean())

    alone = [found[tried.index(Combination([place]))] for place in range(len(parts))]
    trials = [
        log_trial(plan.objective, plan.start, of_ids, units)
        for plan, of_ids in zip(plans, alone[:-1], strict=True)
    ]
    trials.append(log_trial(closed.choice.form, None, alone[-1], units))
    message = chosen.message(parts)
    logger.info("joined: %s; recall %.1f %%", message, 100 * recall)
    logger.info("the best combination instead of all side by side: %s", gain)

    best = max(range(len(plans)), key=lambda place: trials[place].recall)
    decisions = {
        "objective": {
            "chosen": plans[best].objective,
            "start": plans[best].start,
            "trials": [trial._asdict() for trial in trials],
        },
        "joined": {
            "joined": message,
            "strength": chosen.strength,
            "recall": recall,
            "difference": list(gain),
        },
        "ridge": closed.decisions,
    }
    first = trained[best]
    return FittedHeads(heads, first.objective, first.history, decisions), chosen


def unit_sides(heads: tuple[Head, Head], rows: Rows) -> Sides:
    """Unit rows of both sides."""
    return unit_rows(heads[0], rows.a), unit_rows(heads[1], rows.b)


def combinations(n_trained: int, width: int) -> list[Combination]:
    """What may be joined, all with a bias against hubs first: each of the trained heads
    or all of them, with the closed form or without, and this by itself.
    """
    every = [*range(n_trained + 1)]
    trained = [[place] for place in range(n_trained)]
    if n_trained > 1:
        trained.append(every[:-1])
    beside = [[*places, n_trained] for places in trained]
    strengths = STRENGTHS[1:] if 0 < width < LEAST_WIDTH else STRENGTHS
    return [
        Combination(places, strength)
        for strength in strengths
        for places in [*reversed(beside), *trained, [n_trained]]
    ]


@torch.no_grad()
def recalls_of(
    combination: Combination,
    parts: list[Part],
    judged: list[Sides],
    ids: Tensor,
    width: int,
) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions, of the unit rows of
    all parts.
    """
    a, b = joined_members(combination, parts, width)
    rows_a = a.joined([judged[place][0] for place in combination.places])
    rows_b = b.joined([judged[place][1] for place in combination.places])
    return recalls_of_ids(rows_a, rows_b, ids).mean(0)


def gain_by_halves(found: Tensor, units: Tensor) -> Gain:
    """What the best way gains over the first, of their (ways, ids) recalls: one random
    half of the (ids,) units chooses it, the other half judges.
    """
    names, unit = torch.unique(units, return_inverse=True)
    n = len(names)
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(N_HALVES, dtype=torch.float64)
    for number in range(N_HALVES):
        place_of_unit = torch.randperm(n, generator=generator).argsort()
        # ids by the places of their units, so that their own order does not matter
        place, order = place_of_unit[unit].sort(stable=True)
        chooses, judges = order[place < max(1, n // 2)], order[place >= n // 2]
        best = found[found[:, chooses].mean(1).argmax()]
        gains[number] = (best - found[0])[judges].mean()
    gains = gains.sort().values
    return Gain(float(gains.mean()), float(gains[1]), float(gains[-2]))


def log_trial(objective: str, start: str | None, found: Tensor, units: Tensor) -> Trial:
    """Logs what heads find by themselves, of the (ids,) recalls and the units that are
    resampled.
    """
    trial = Trial(
        objective,
        start,
        float(found.mean()),
        bootstrap_interval(found, groups=units),
    )
    n_units = len(torch.unique(units))
    logger.info(
        "%-30s recall %.1f %% (%.1f to %.1f over %s)",
        objective if start is None else f"{objective}, {start} start",
        100 * trial.recall,
        100 * trial.interval[0],
        100 * trial.interval[1],
        counted(n_units, "ids" if n_units == len(units) else "groups"),
    )
    return trial


def joined_members(
    combination: Combination, parts: list[Part], width: int
) -> tuple[Members, Members]:
    """The parts with the bias against hubs, cut to ``width`` columns if it is not 0."""
    used, strength = combination.picked(parts), combination.strength
    banks = [[part.bank[side] for part in used] for side in SIDES]
    room = width - (4 if strength else 0)  # for a bias has four columns
    is_wide = sum(rows.shape[1] for rows in banks[0]) > room
    a, b = (
        Members(
            [part.heads[side] for part in used],
            cut=room if width and is_wide else 0,
            side=side,
            rows=len(banks[0][0]) if strength else 0,
            strength=strength,
        ).eval()
        for side in SIDES
    )
    fit_members(a, b, *banks)
    return a, b


def joined_heads(combination: Combination, parts: list[Part], width: int) -> Heads:
    """The heads of a combination; of one part without a bias those that it has."""
    if len(combination.places) == 1 and not combination.strength:
        return parts[combination.places[0]].heads
    return joined_members(combination, parts, width)


def refitted(
    every: VectorPairs,
    settings: HeadSettings,
    plans: list[HeadSettings],
    trained: list[SingleHeads],
    closed: ClosedHeads | None,
    chosen: Combination,
    folder: Path | None,
) -> Heads:
    """What was chosen, fitted anew to all pairs for as long as the best took."""
    again = closed
    if closed is not None:
        beside = closed_settings(settings, every, closed.choice.form)
        again = refit_closed_form(every, beside, closed.choice)
    fits: list[SingleHeads] = []
    for place in chosen.places:
        if place == len(plans):
            assert again is not None
            fits.append(again)
            continue
        until = trained[place].best_epoch
        plan = plans[place].override(patience=0)
        state = state_file(folder, f"refit-{place + 1}-{until}")
        fits.append(fit(every, None, plan, closed=again, until=until, state=state))
    bank = Rows.of(every, N_BANK)
    parts = [Part("", one.heads, unit_sides(one.heads, bank)) for one in fits]
    combination = Combination([*range(len(parts))], chosen.strength)
    return joined_heads(combination, parts, settings.embed_dim or 0)
