"""``auto`` and members: several heads are fitted and stand side by side with the closed
form, unless held-out pairs clearly say otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    unit_sides,
)
from cloob.heads.head import Heads, Members, fit_members
from cloob.heads.settings import USUAL_SCALES, HeadSettings, check_held_out

logger = logging.getLogger(__name__)

Scales = Mapping[str, Mapping[str, float | bool]]
SidesByName = Mapping[str, tuple[Tensor, Tensor]]
"""Unit rows of both sides, by the names of parts."""
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
    """Heads that may be joined with others."""

    name: str
    fitted: SingleHeads


@dataclass(frozen=True)
class Combination:
    """Parts side by side."""

    parts: Sequence[Part]
    strength: float = 0.0  # of the bias against hubs

    def __str__(self) -> str:
        names = " + ".join(part.name for part in self.parts)
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
    closed = closed_form(pairs, held_out, settings, on_epoch)
    plans = plans_of(settings, scales, closed)
    parts = fit_all(pairs, held_out, plans, closed, settings, folder, on_epoch)
    if closed is not None and (joins(settings) or not plans):
        parts.append(Part(closed.settings.objective, closed))
    fitted: FittedHeads = parts[0].fitted
    chosen = Combination(parts)
    width = settings.embed_dim or 0
    if joins(settings):
        assert held_out is not None
        fitted, chosen = join(pairs, held_out, parts, width)
    if held_out is None or not settings.refit:
        return fitted
    every = pairs.joined(held_out)
    heads = refitted(every, chosen, closed, width, folder)
    count = f"on {len(every):,} pairs, {len(held_out):,} of them held out"
    decisions = {**fitted.decisions, "refit": count}
    return FittedHeads(heads, fitted.objective, fitted.history, decisions)


def joins(settings: HeadSettings) -> bool:
    """Whether heads may stand side by side."""
    return settings.objective == "auto" or (settings.members or 1) > 1


def closed_form(
    pairs: VectorPairs,
    held_out: VectorPairs | None,
    settings: HeadSettings,
    on_epoch: OnEpoch | None,
) -> ClosedHeads | None:
    """The closed form that heads start from or stand beside, or that is asked for,
    which is an epoch of its own; with ``auto`` that of few columns or of waves of them,
    whichever finds more.
    """
    starts_there = settings.start == "closed-form"
    if not (settings.is_closed_form or starts_there or joins(settings)):
        return None
    plain = fit_closed_form(pairs, held_out, closed_settings(settings, pairs))
    if settings.is_closed_form and on_epoch is not None:
        on_epoch(plain.history[0])
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
            and closed.settings.objective == "cca"
        ):
            starts = ["closed-form", "random"]
    usual_scales = {
        scale: value
        for scale, value in scales.get(name, {}).items()
        if getattr(settings, scale) is None
    }
    plan = settings.override(objective=name, members=None, clean=None, **usual_scales)
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
) -> list[Part]:
    """One fit after another; with ``auto`` each has to keep up with the closed form and
    those before.
    """
    lead = 0.0
    if settings.objective == "auto":
        assert closed is not None and held_out is not None
        lead = float(recalls(closed.heads, Rows.of(held_out, GALLERY)).mean())
    parts: list[Part] = []
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
        parts.append(Part(f"{plan.objective} {number}", fitted))
        if settings.objective == "auto":
            lead = max(lead, fitted.recall or 0.0)
    return parts


def state_file(folder: Path | None, name: str) -> Path | None:
    """Where the state of a fit lies, if states are kept."""
    return None if folder is None else folder / f"{name}.pt"


# --- what is joined ---


def join(
    pairs: VectorPairs, held_out: VectorPairs, parts: list[Part], width: int
) -> tuple[FittedHeads, Combination]:
    """All parts side by side, the closed form the last of them; another combination
    where halves of the held-out ids or groups say that it finds more.
    """
    judges = held_out.at_most(N_JUDGES)
    judge_rows = Rows.of(judges)
    judged = sides_of_parts(parts, judge_rows)
    banks = sides_of_parts(parts, Rows.of(pairs, N_BANK))
    tried = combinations(parts, width)
    recalls_by_name = {
        str(one): recalls_of(one, banks, judged, judge_rows.ids, width) for one in tried
    }
    recalls_of_tried = torch.stack([*recalls_by_name.values()])
    units = judges.units_of_ids()
    gain = gain_by_halves(recalls_of_tried, units)
    best_tried = tried[int(recalls_of_tried.mean(1).argmax())]
    chosen = best_tried if gain.low > 0 else tried[0]
    heads = joined_heads(chosen, banks, width)
    recall = float(recalls(heads, Rows.of(held_out, GALLERY)).mean())

    trials = [
        log_trial(
            fitted.settings.objective,
            fitted.settings.start,
            recalls_by_name[name],
            units,
        )
        for name, fitted in parts
    ]
    logger.info("joined: %s; recall %.1f %%", chosen, 100 * recall)
    logger.info("the best combination instead of all side by side: %s", gain)

    *trained, closed = parts
    best = max(trained, key=lambda part: float(recalls_by_name[part.name].mean()))
    decisions = {
        "objective": {
            "chosen": best.fitted.settings.objective,
            "start": best.fitted.settings.start,
            "trials": [trial._asdict() for trial in trials],
        },
        "joined": {
            "joined": str(chosen),
            "strength": chosen.strength,
            "recall": recall,
            "difference": list(gain),
        },
        "ridge": closed.fitted.decisions,
    }
    first = best.fitted
    return FittedHeads(heads, first.objective, first.history, decisions), chosen


def sides_of_parts(parts: Sequence[Part], rows: Rows) -> SidesByName:
    """Unit rows of both sides by every part."""
    return {name: unit_sides(fitted.heads, rows) for name, fitted in parts}


def combinations(parts: list[Part], width: int) -> list[Combination]:
    """What may be joined, all with a bias against hubs first: each of the trained heads
    or all of them, with the closed form, which is the last part, or without, and this
    by itself.
    """
    *all_trained, closed = parts
    trained = [[part] for part in all_trained]
    if len(all_trained) > 1:
        trained.append(all_trained)
    beside_closed = [[*chosen, closed] for chosen in trained]
    strengths = STRENGTHS[1:] if 0 < width < LEAST_WIDTH else STRENGTHS
    return [
        Combination(chosen, strength)
        for strength in strengths
        for chosen in [*reversed(beside_closed), *trained, [closed]]
    ]


@torch.no_grad()
def recalls_of(
    combination: Combination,
    banks: SidesByName,
    judged: SidesByName,
    ids: Tensor,
    width: int,
) -> Tensor:
    """(ids,) the mean of recall at 1, 5 and 10 in both directions, of the unit rows of
    all parts.
    """
    a, b = joined_members(combination, banks, width)
    sides = [judged[part.name] for part in combination.parts]
    rows_a = a.joined([side_a for side_a, _ in sides])
    rows_b = b.joined([side_b for _, side_b in sides])
    return recalls_of_ids(rows_a, rows_b, ids).mean(0)


def gain_by_halves(recalls_of_ways: Tensor, units: Tensor) -> Gain:
    """What the best way gains over the first, of their (ways, ids) recalls: one random
    half of the (ids,) units chooses it, the other half judges.
    """
    distinct, unit_of_id = torch.unique(units, return_inverse=True)
    n_units = len(distinct)
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(N_HALVES, dtype=torch.float64)
    for number in range(N_HALVES):
        place_of_unit = torch.randperm(n_units, generator=generator).argsort()
        # ids by the places of their units, so that their own order does not matter
        places, order = place_of_unit[unit_of_id].sort(stable=True)
        chooses = order[places < max(1, n_units // 2)]
        judges = order[places >= n_units // 2]
        best = recalls_of_ways[recalls_of_ways[:, chooses].mean(1).argmax()]
        gains[number] = (best - recalls_of_ways[0])[judges].mean()
    gains = gains.sort().values
    return Gain(float(gains.mean()), float(gains[1]), float(gains[-2]))


def log_trial(
    objective: str, start: str | None, recalls_of_trial: Tensor, units: Tensor
) -> Trial:
    """Logs what heads find by themselves, of the (ids,) recalls and the units that are
    resampled.
    """
    recall = float(recalls_of_trial.mean())
    low, high = bootstrap_interval(recalls_of_trial, groups=units)
    n_units = len(torch.unique(units))
    logger.info(
        "%-30s recall %.1f %% (%.1f to %.1f over %s)",
        objective if start is None else f"{objective}, {start} start",
        100 * recall,
        100 * low,
        100 * high,
        counted(n_units, "ids" if n_units == len(units) else "groups"),
    )
    return Trial(objective, start, recall, (low, high))


def joined_members(
    combination: Combination, banks: SidesByName, width: int
) -> tuple[Members, Members]:
    """The parts with the bias against hubs, by their rows of the banks; cut to
    ``width`` columns if it is not 0.
    """
    strength = combination.strength
    bank_a, bank_b = zip(*(banks[part.name] for part in combination.parts), strict=True)
    room = width - (4 if strength else 0)  # for a bias has four columns
    is_wide = sum(rows.shape[1] for rows in bank_a) > room
    a, b = (
        Members(
            [part.fitted.heads[side] for part in combination.parts],
            cut=room if width and is_wide else 0,
            side=side,
            rows=len(bank_a[0]) if strength else 0,
            strength=strength,
        ).eval()
        for side in SIDES
    )
    fit_members(a, b, bank_a, bank_b)
    return a, b


def joined_heads(combination: Combination, banks: SidesByName, width: int) -> Heads:
    """The heads of a combination; of one part without a bias those that it has."""
    if len(combination.parts) == 1 and not combination.strength:
        return combination.parts[0].fitted.heads
    return joined_members(combination, banks, width)


def refitted(
    every: VectorPairs,
    chosen: Combination,
    closed: ClosedHeads | None,
    width: int,
    folder: Path | None,
) -> Heads:
    """What was chosen, fitted anew to all pairs for as long as the best took."""
    closed_anew = None if closed is None else refit_closed_form(every, closed)
    parts: list[Part] = []
    for number, (name, earlier) in enumerate(chosen.parts, 1):
        if earlier is closed and closed_anew is not None:
            parts.append(Part(name, closed_anew))
            continue
        until = earlier.best_epoch
        fitted = fit(
            every,
            None,
            earlier.settings.override(patience=0),
            closed=closed_anew,
            until=until,
            state=state_file(folder, f"refit-{number}-{until}"),
        )
        parts.append(Part(name, fitted))
    banks = sides_of_parts(parts, Rows.of(every, N_BANK))
    return joined_heads(Combination(parts, chosen.strength), banks, width)
