"""What the records give for ``claim.md``: its runs in two tables, and each claim's
conditions with a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from benchmarks.frozen.plan import (
    CCA,
    CONTROLS,
    MIXED,
    OTHERS,
    PAIRS,
    ROWS,
    SIZES,
    WIDE,
    World,
)
from benchmarks.frozen.tables import STUDY, Runs
from benchmarks.studies import records
from benchmarks.studies.comparison import (
    Record,
    Sets,
    compared,
    together,
    zeroshot_mean,
)
from benchmarks.studies.pages import NAMES, percent, points, span, table

SINGLE = (("clip",), ("infoloob",), ("cloob",), (CCA,))


class Key(NamedTuple):
    members: tuple[str, ...]
    clean: bool = False
    share: float = 0.4
    pairs: int = PAIRS


GOALS = {
    Key(row, clean, share): aims
    for row in (CONTROLS[1], *MIXED)
    for clean, share, aims in ((False, 0.0, (0.24, 0.425)), (True, 0.4, (0.21, 0.32)))
}
"""Claim 6: zero-shot and recall that two heads and the closed form are to reach."""
Found = Mapping[Key, Mapping[int, Record]]


def found(cells: Runs) -> Found:
    """The claim's runs by seed; CLIP's and CLOOB's with all pairs as they are come from
    the study's cells.
    """
    runs: dict[Key, dict[int, Record]] = {}
    for record in records.read("claim", STUDY).values():
        c = record["config"]
        key = Key(
            tuple(c["members"]), c["clean"], c["world"]["share"], c["world"]["pairs"]
        )
        runs.setdefault(key, {})[c["seed"]] = record
    for method in ("clip", "cloob"):
        runs |= {
            Key((method,), False, share): cells[method, World("mlp", "swap", share)]
            for share in (0.4, 0.0)
        }
    return runs


def name(members: tuple[str, ...]) -> str:
    names = {
        **NAMES,
        CCA: "CCA",
        "infoloob-1": "InfoLOOB",
        "infoloob-2": "InfoLOOB (384)",
        "infoloob-wide": "InfoLOOB (640)",
        "clip-2": "CLIP (384)",
        "cloob-2": "CLOOB (384)",
    }
    return " ⊕ ".join(names[member] for member in members)


def runs_table(
    runs: Found,
    rows: Sequence[tuple[str, ...]] = (*ROWS, *CONTROLS, *MIXED, *OTHERS, *WIDE),
) -> str:
    """Zero-shot and recall of rows with all pairs."""
    states = [(share, clean) for share in (0.4, 0.0) for clean in (False, True)]
    lines = [
        [name(m), *(both(runs.get(Key(m, clean, s), {})) for s, clean in states)]
        for m in rows
    ]
    head = [
        f"{100 * share:.0f} % wrong{', cleaned' * clean}" for share, clean in states
    ]
    return table(
        ["zero-shot / recall, % (seeds)", *head],
        [line for line in lines if set(line[1:]) != {"–"}],
    )


def sizes_table(runs: Found) -> str:
    lines = []
    for pairs, share, clean in (
        (n, s, c) for n in SIZES for s in (0.4, 0.0) for c in (False, True)
    ):
        row = [
            both(runs.get(Key(m, clean, share, pairs), {}))
            for m in (*SINGLE, ("infoloob", CCA))
        ]
        if any(text != "–" for text in row):
            lines.append(
                [f"{pairs:,}, {100 * share:.0f} % wrong{', cleaned' * clean}", *row]
            )
    return table(["pairs, captions", *map(name, (*SINGLE, ("infoloob", CCA)))], lines)


def both(of_seed: Mapping[int, Record]) -> str:
    return (
        f"{' / '.join(map(percent, means(of_seed)))} ({len(of_seed)})"
        if of_seed
        else "–"
    )


def means(of_seed: Mapping[int, Record]) -> tuple[float, float]:
    """Zero-shot and recall, means over the seeds; NaN without any."""
    rows = [
        (zeroshot_mean(r), float(r["val"]["mean_recall"])) for r in of_seed.values()
    ] or [(math.nan, math.nan)]
    zeroshot, recall = np.mean(rows, axis=0).tolist()
    return zeroshot, recall


def reached(of_seed: Mapping[int, Record], goals: tuple[float, float]) -> list[bool]:
    return [mean >= goal for mean, goal in zip(means(of_seed), goals, strict=True)]


def goal(runs: Found, key: Key) -> str:
    """What came out for one of ``GOALS``, in words."""
    words = [
        "reached" if yes else "not reached"
        for yes in reached(runs.get(key, {}), GOALS[key])
    ]
    came = zip(
        ("zero-shot", "recall"),
        means(runs.get(key, {})),
        GOALS[key],
        words,
        strict=True,
    )
    return " and ".join(
        f"{what} {percent(mean)} (goal {percent(aim)}, {word})"
        for what, mean, aim, word in came
    )


def verdicts(runs: Found, sets: Sets) -> str:
    lines = list(_conditions(runs, sets))
    done = [line for line in lines if line[-1] != "not run"]
    head = ["claim", "difference", "points (interval)", "seeds", "verdict"]
    return (
        f"{table(head, done)}\n\nNot run: {len(lines) - len(done)} of {len(lines)}"
        " conditions."
    )


def _conditions(runs: Found, sets: Sets) -> Iterator[list[str]]:
    def zeroshot(claim: int, ours: Key, theirs: Key) -> list[str]:
        mean = together(
            compared(runs.get(ours, {}), runs.get(theirs, {}), sets).values(), True
        )
        if mean is None:
            return [str(claim), _text(ours, theirs, "zero-shot"), "–", "0", "not run"]
        interval = mean.over_classes
        shown = [f"{points(mean.mean)} ({span(interval)})", str(len(mean.seeds))]
        return [
            str(claim),
            _text(ours, theirs, "zero-shot"),
            *shown,
            "shown" if interval[0] > 0 else "not shown",
        ]

    def recall(claim: int, ours: Key, theirs: Key, least: float = 0.0) -> list[str]:
        a, b = runs.get(ours, {}), runs.get(theirs, {})
        gaps = [
            a[s]["val"]["mean_recall"] - b[s]["val"]["mean_recall"]
            for s in sorted(a.keys() & b.keys())
        ]
        if not gaps:
            return [str(claim), _text(ours, theirs, "recall"), "–", "0", "not run"]
        shown = [
            (
                f"{points(float(np.mean(gaps)))} ({points(min(gaps))} …"
                f" {points(max(gaps))})"
            ),
            str(len(gaps)),
        ]
        holds = np.mean(gaps) >= least if least else min(gaps) > 0
        return [
            str(claim),
            _text(ours, theirs, "recall"),
            *shown,
            "shown" if holds else "not shown",
        ]

    yield zeroshot(1, Key((CCA,)), Key(("clip",)))
    for pairs in (PAIRS, *SIZES):
        for m in SINGLE:
            for judge in (zeroshot, recall):
                yield judge(2, Key(m, True, 0.4, pairs), Key(m, False, 0.4, pairs))
            yield recall(3, Key(m, True, 0.0, pairs), Key(m, False, 0.0, pairs), -0.005)
    for share in (0.4, 0.0):
        yield zeroshot(
            4, Key(("infoloob", CCA), False, share), Key(CONTROLS[0], False, share)
        )
    for pairs in SIZES[:3]:
        for m in SINGLE[:3]:
            yield recall(5, Key((CCA,), False, 0.4, pairs), Key(m, False, 0.4, pairs))
    for key, goals in GOALS.items():
        of_seed = runs.get(key, {})
        verdict = "shown" if all(reached(of_seed, goals)) else "not shown"
        goal = (
            f"{_where(key)}: {percent(goals[0])} zero-shot, {percent(goals[1])} recall"
        )
        shown = [both(of_seed), str(len(of_seed)), verdict if of_seed else "not run"]
        yield ["6", f"{name(key.members)}, {goal}", *shown]
    for share in (0.4, 0.0):
        yield zeroshot(7, Key(("cloob",), False, share), Key(("clip",), False, share))


def _where(key: Key) -> str:
    return (
        f"{key.pairs:,} pairs, {100 * key.share:.0f} % wrong{', cleaned' * key.clean}"
    )


def _text(ours: Key, theirs: Key, what: str) -> str:
    if ours.members == theirs.members:
        return f"{name(ours.members)}, cleaned − all, {what}, {_where(theirs)}"
    return f"{name(ours.members)} − {name(theirs.members)}, {what}, {_where(theirs)}"
