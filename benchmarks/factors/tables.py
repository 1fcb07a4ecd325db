"""The tables of ``tables.md``, recomputed from the records between two markers, and two
figures of docs/study.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.factors import plan
from benchmarks.factors.plan import METHODS, Run
from benchmarks.factors.world import FACTORS, VALUES, World
from benchmarks.studies import records
from benchmarks.studies.comparison import counted, t_interval
from benchmarks.studies.leads import Lead, Row, forest, lines
from benchmarks.studies.pages import (
    NAMES,
    percent,
    points,
    replaced,
    span,
    spread,
    table,
)

COMPARED = (
    ("cloob", "clip"),
    ("infoloob", "clip"),
    ("infonce-hopfield", "clip"),
    ("cloob", "infoloob"),
)
TARGET = 0.8
"""The share of the cells above chance in which CLOOB is to be ahead."""
USUAL_DECAY = plan.Setting.weight_decay
Record = Mapping[str, Any]
Cells = Mapping[tuple[World, str], Mapping[int, Record]]
"""(world, method) -> seed -> record."""
Measure = Callable[[Record], float]


def filled(text: str) -> str:
    return replaced(text, render(), "<!-- factors:begin -->", "<!-- factors:end -->")


def render() -> str:
    stages = {
        stage: records.read(stage, plan.STUDY)
        for stage in ("search", "superseded", "cells")
    }
    found = plan.searches(plan.STUDY)
    kept = select(stages["cells"], found)
    hours = (
        sum(r["cpu_seconds"] for of_stage in stages.values() for r in of_stage.values())
        / 3600
    )
    done = sum(map(len, kept.values()))
    whole = sum(len(plan.seeds(world)) * len(METHODS) for world in plan.worlds())
    complete = sum(s.complete for s in found.values())
    parts = [
        f"State: {complete} of {len(found)} searches complete ({len(stages['search'])}"
        f" runs and {len(stages['superseded'])} of their earlier forms), {done} of"
        f" {whole} cells; {hours:.1f} CPU-core hours."
    ]
    if kept:
        base = [World(wrong=w) for w in sorted(plan.WRONG)]
        sides = [world for world in plan.worlds() if plan.is_side(world)]
        parts += ["### What was claimed", claims_table(kept)]
        parts += [
            "### Zero-shot accuracy over the share of wrong captions, %",
            accuracy_table(kept, base),
        ]
        parts += ["### One thing changed", accuracy_table(kept, sides)]
    parts += ["### What the search chose", chosen_table(found)]
    return "\n\n".join(part for part in parts if part)


def select(
    cells: Mapping[str, Record], searches: Mapping[tuple[World, str], plan.Search]
) -> Cells:
    kept: dict[tuple[World, str], dict[int, Record]] = defaultdict(dict)
    for record in cells.values():
        run = Run.from_config(record["config"])
        search = searches.get((run.world, run.method))
        # By the name: a value that two paths lead to may differ in its last bit.
        if (
            search is not None
            and search.complete
            and run.setting.slug == search.best.slug
        ):
            kept[run.world, run.method][run.seed] = record
    return dict(kept)


def mean_zero_shot(record: Record) -> float:
    return float(np.mean(record["zero_shot"]))


def gap(record: Record) -> float:
    """How much more is recalled of the training pairs than of held-out ones."""
    return float(record["train_recall"] - record["held_out_recall"])


def by_heart(record: Record) -> float:
    """Wrong training pairs whose own caption or picture comes first, for each right
    one.
    """
    return float(record["train_first_wrong"] / record["train_first_right"])


def faint_less_loud(record: Record) -> float:
    """Zero-shot accuracy on the fainter half of the factors, less that on the louder
    half.
    """
    loud, faint = np.split(np.array(record["zero_shot"]), 2)
    return float(faint.mean() - loud.mean())


def paired(
    cells: Cells, world: World, ours: str, theirs: str, measure: Measure
) -> list[float]:
    a, b = cells.get((world, ours), {}), cells.get((world, theirs), {})
    return [measure(a[seed]) - measure(b[seed]) for seed in sorted(a.keys() & b.keys())]


def shown(differences: Sequence[float]) -> str:
    return (
        f"{points(float(np.mean(differences)))} ({span(t_interval(differences))})"
        if differences
        else "–"
    )


def name(world: World) -> str:
    changed = [
        f"{key} {getattr(world, key):g}"
        for key, _ in plan.SIDES
        if getattr(world, key) != getattr(World, key)
    ]
    return ", ".join([*changed, f"{100 * world.wrong:g} % wrong"])


def accuracy_table(cells: Cells, worlds: Sequence[World]) -> str:
    lines = []
    for world in worlds:
        by_seed = [cells.get((world, method), {}) for method in METHODS]
        if any(by_seed):
            row = [name(world), " / ".join(str(len(of)) for of in by_seed)]
            row += [spread([mean_zero_shot(r) for r in of.values()]) for of in by_seed]
            lines.append(
                row
                + [
                    shown(paired(cells, world, *pair, mean_zero_shot))
                    for pair in COMPARED
                ]
            )
    head = [
        "world",
        "seeds",
        *(NAMES[m] for m in METHODS),
        *(f"{NAMES[a]} − {NAMES[b]}" for a, b in COMPARED),
    ]
    return table(head, lines) if lines else "Nothing yet."


def chosen_table(searches: Mapping[tuple[World, str], plan.Search]) -> str:
    """The best setting of each complete search, with the scores of its start and of the
    best with the usual decay.
    """
    lines = []
    for (world, method), search in searches.items():
        if search.complete:
            own, start = search.scores[search.best], search.scores[search.tried[0]]
            usual = [
                score
                for setting, score in search.scores.items()
                if setting.weight_decay == USUAL_DECAY
            ]
            scores = [
                percent(own, 2),
                percent(start, 2),
                percent(max(usual), 2) if usual else "–",
            ]
            lines.append([name(world), NAMES[method], f"`{search.best.slug}`", *scores])
    head = [
        "world",
        "method",
        "chosen",
        "held-out recall, %",
        "of the setting that the search began with",
    ]
    head += [f"of the best with weight decay {USUAL_DECAY}"]
    return table(head, lines) if lines else "Nothing yet."


def claims_table(cells: Cells) -> str:
    lines = []
    for number, parts in claims(cells):
        decides = number.isdecimal()
        short = any(len(values) < n for _, values, n, _ in parts)
        holds = all(
            len(values) > 1 and t_interval(values)[0] > 0 for _, values, _, _ in parts
        )
        texts = [f"{label}: {write(values)}" for label, values, _, write in parts]
        if number == "1":
            differences, n = by_factor(cells)
            texts.append(
                f"ahead in {counted(differences)} (share, factor) cells above chance"
            )
            holds = holds and n >= TARGET * len(differences) > 0
        verdict = (
            "–"
            if not decides
            else "open"
            if short
            else "**holds**"
            if holds
            else "**fails**"
        )
        lines.append([number, "; ".join(texts), verdict])
    return table(
        [
            "claim",
            "differences that are to be above zero, points unless said",
            "verdict",
        ],
        lines,
    )


Part = tuple[str, list[float], int, Callable[[Sequence[float]], str]]
"""What it is; its value with each seed, to be above zero by the interval; the number of
seeds; how it is written.
"""


def claims(cells: Cells) -> Iterator[tuple[str, list[Part]]]:
    """The claims of the protocol, in its order, as differences that are to be above
    zero.
    """
    forty, stream = World(wrong=0.4), World(wrong=0.4, pool=128_000)
    n = len(plan.SEEDS)

    def part(world: World, a: str, b: str, measure: Measure = mean_zero_shot) -> Part:
        return (
            f"{NAMES[a]} − {NAMES[b]}, {name(world)}",
            paired(cells, world, a, b, measure),
            n,
            shown,
        )

    yield "1", [part(World(wrong=w), "cloob", "clip") for w in (0.4, 0.6, 0.8)]
    yield (
        "2",
        [
            part(World(wrong=w), "cloob", b)
            for w in (0.4, 0.6)
            for b in ("infoloob", "infonce-hopfield")
        ],
    )
    leads = [
        paired(cells, world, "cloob", "clip", mean_zero_shot)
        for world in (forty, stream)
    ]
    lost = [
        a - b for a, b in zip(*leads, strict=False)
    ]  # the base world has further seeds
    yield (
        "3",
        [("lead with a pool − lead in the stream", lost, len(plan.SIDE_SEEDS), shown)],
    )
    yield (
        "4",
        [part(forty, "infoloob", "clip", gap), part(forty, "infoloob", "cloob", gap)],
    )
    yield "5", [part(forty, "clip", "cloob", by_heart)]
    yield "6", [part(forty, "cloob", "clip", lambda r: r["unfit_right"])]
    label, values, *_ = part(
        forty, "cloob", "clip", lambda r: r["eigenvalues"]["pictures"]
    )
    yield "7", [(f"{label}, eigenvalues", values, n, _plain)]
    ours = cells.get((forty, "cloob"), {}).values()
    alike = [
        (f"alike in {f + 1}", [r["retrieved"]["alike"][f] for r in ours], n, shown)
        for f in range(FACTORS)
    ]
    tilt = part(forty, "cloob", "clip", faint_less_loud)
    yield "8", alike
    yield "beside 8", [("lead on the faint four − lead on the loud four", *tilt[1:])]


def by_factor(cells: Cells) -> tuple[list[float], int]:
    """CLOOB − CLIP in each (share, factor) cell above chance of the first claim, and
    how many are positive.
    """
    differences = []
    for world in (World(wrong=w) for w in (0.4, 0.6, 0.8)):
        for f in range(FACTORS):
            each = [
                [r["zero_shot"][f] for r in cells.get((world, m), {}).values()]
                for m in ("cloob", "clip")
            ]
            if any(t_interval(values)[0] > 1 / VALUES for values in each):
                lead = paired(
                    cells, world, "cloob", "clip", lambda r, f=f: r["zero_shot"][f]
                )  # type: ignore[misc]
                differences += [float(np.mean(lead))] if lead else []
    return differences, sum(d > 0 for d in differences)


def _plain(values: Sequence[float]) -> str:
    low, high = t_interval(values)
    return f"{np.mean(values):+.1f} ({low:+.1f} … {high:+.1f})" if values else "–"


MEMBERS = ("cloob", "infoloob", "infonce-hopfield")
"""All but CLIP, which they are compared with."""
SHARES = sorted(plan.SIDE_WRONG)
_LABELS = {
    "pool": "{:,} pairs".format,
    "batch": "batches of {}".format,
    "named": "{:.0%} of the factors named".format,
    "correlation": "factors correlated, {:g}".format,
}
_STREAM = "a stream of fresh pairs"


def draw(images: Path) -> None:
    cells = select(records.read("cells", plan.STUDY), plan.searches(plan.STUDY))
    by_share = {
        m: {
            w: found
            for w in sorted(plan.WRONG)
            if (found := lead(cells, World(wrong=w), m))
        }
        for m in MEMBERS
    }
    lines(images / "factors-wrong.svg", by_share, NAMES)
    titles = [
        f"{100 * share:g} % wrong captions" if share else "right captions"
        for share in SHARES
    ]
    forest(images / "factors-worlds.svg", titles, list(rows(cells)), NAMES)


def rows(cells: Cells) -> Iterator[Row]:
    """The base world, then one changed thing a row; CLOOB's lead and InfoLOOB's, by the
    share of wrong captions.
    """
    changes: Sequence[tuple[str, dict[str, float]]] = [("the base world", {})]
    changes = [
        *changes,
        *(
            (label(key, value), {key: value})
            for key, values in plan.SIDES
            for value in sorted(values)
        ),
    ]
    for text, change in changes:
        worlds = [World(wrong=share, **change) for share in SHARES]  # type: ignore[arg-type]
        yield Row(
            text,
            [
                {m: found for m in MEMBERS[:2] if (found := lead(cells, w, m))}
                for w in worlds
            ],
        )


def label(key: str, value: float) -> str:
    whole = key == "pool" and value == World.seen
    return _STREAM if whole else _LABELS[key](value)


def lead(cells: Cells, world: World, method: str) -> Lead | None:
    """A method's lead over CLIP in a world, in points; None before two seeds of both
    have been run.
    """
    differences = [
        100 * d for d in paired(cells, world, method, "clip", mean_zero_shot)
    ]
    return (
        Lead(float(np.mean(differences)), *t_interval(differences))
        if len(differences) > 1
        else None
    )
