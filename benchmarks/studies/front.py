"""The numbers of README.md, docs/study.md and docs/choose.md, from the records of the
studies.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.factors import plan as factors_plan
from benchmarks.factors import tables as factors
from benchmarks.factors.world import World as Factors
from benchmarks.frozen import claims, plan, tables
from benchmarks.frozen.plan import CCA, SIZES, World
from benchmarks.pictograms import plan as scratch
from benchmarks.pictograms import tables as pictograms
from benchmarks.pictograms import wrong
from benchmarks.studies import records
from benchmarks.studies.comparison import (
    Difference,
    compared,
    counted,
    together,
    zeroshot_mean,
)
from benchmarks.studies.pages import NAMES, points, span, spread, table

AUTO = Path(__file__).parents[1] / "results" / "auto"
SINGLE = (("clip",), *((method,) for method in ("cloob", "infoloob", CCA)))
METHODS = ("cloob", "infoloob")
"""Those that are compared with CLIP."""


def said(difference: Difference | None, *, seeds: bool = False) -> str:
    """A mean and its interval over classes, or over seeds."""
    if difference is None:
        return "–"
    return (
        f"{points(difference.mean)}"
        f" ({span(difference.over_seeds if seeds else difference.over_classes)})"
    )


@functools.cache
def frozen() -> tuple[tables.Runs, tables.Sets]:
    scores = {
        name: record["score"]
        for name, record in records.read("search", tables.STUDY).items()
    }
    return tables.select(
        records.read("cells", tables.STUDY), scores
    ), records.labels_by_set(tables.STUDY)


def lead(method: str, world: World) -> Difference | None:
    """A method − CLIP over all eight sets."""
    runs, sets = frozen()
    return together(
        compared(
            runs.get((method, world), {}), runs.get(("clip", world), {}), sets
        ).values(),
        True,
    )


def recall_lead(method: str, world: World) -> str:
    """A method − CLIP in the mean recall of held-out pairs with right captions, with
    its interval over seeds.
    """
    runs, _ = frozen()
    ours, theirs = runs.get((method, world), {}), runs.get(("clip", world), {})
    gaps = [
        ours[s]["val"]["mean_recall"] - theirs[s]["val"]["mean_recall"]
        for s in sorted(ours.keys() & theirs)
    ]
    return factors.shown(gaps)


def heads() -> str:
    """Zero-shot and recall of the frozen study's main conditions."""
    lines = []
    for head, share in itertools.product(("linear", "mlp"), (0.0, 0.4, 0.6)):
        world = World(head, "swap", share)
        clip = frozen()[0]["clip", world].values()
        row = [
            f"{head}, {100 * share:.0f} % wrong",
            spread([zeroshot_mean(r) for r in clip]),
        ]
        row += [said(lead(method, world)) for method in METHODS]
        row += [
            spread([r["val"]["mean_recall"] for r in clip]),
            *(recall_lead(method, world) for method in METHODS),
        ]
        lines.append(row)
    head = ["heads, captions", "CLIP, zero-shot, %", "CLOOB − CLIP", "InfoLOOB − CLIP"]
    return table([*head, "CLIP, recall, %", "CLOOB − CLIP", "InfoLOOB − CLIP"], lines)


def fewer() -> str:
    """CLOOB against CLIP by the number of pairs, linear heads."""
    lines = []
    for pairs, share in itertools.product(SIZES, (0.0, 0.4)):
        world = World("linear", "swap", share, pairs)
        lines.append(
            [
                f"{pairs:,}, {100 * share:.0f} % wrong",
                said(lead("cloob", world)),
                recall_lead("cloob", world),
            ]
        )
    return table(
        ["pairs, captions", "CLOOB − CLIP, zero-shot", "CLOOB − CLIP, recall"], lines
    )


@functools.cache
def from_scratch() -> tuple[pictograms.Runs, pictograms.Runs, pictograms.Sets]:
    """Runs of the usual length, longer ones, and the test sets' labels."""
    study = pictograms.STUDY
    cells, scores = (
        records.read("cells", study),
        scratch.search_scores(records.read("search", study)),
    )
    return (
        *(scratch.select(cells, scores, n)[0] for n in (None, scratch.LONG_EPOCHS)),
        records.labels_by_set(study),
    )


def tower_lead(method: str, tower: str, *, longer: bool = False) -> Difference | None:
    """A method − CLIP over all eight sets, towers from scratch."""
    runs, sets = from_scratch()[int(longer)], from_scratch()[2]
    return together(
        compared(runs[method, tower], runs["clip", tower], sets).values(), True
    )


def towers() -> str:
    runs = from_scratch()[0]
    lines = [
        [
            NAMES[m],
            *(
                spread([zeroshot_mean(r) for r in runs[m, tower].values()])
                for tower in scratch.TOWERS
            ),
        ]
        for m in ("clip", *METHODS)
    ]
    lines += [
        [
            f"{NAMES[m]} − CLIP",
            *(said(tower_lead(m, tower)) for tower in scratch.TOWERS),
        ]
        for m in METHODS
    ]
    return table(["zero-shot top-1, mean of eight sets, %", *scratch.TOWERS], lines)


def scratch_wrong(method: str, what: str) -> str:
    """The ResNet with wrong captions, 36 epochs: a method − CLIP over seeds, or its
    recall.
    """
    found = [
        r
        for r in records.read(wrong.RUNS, pictograms.STUDY).values()
        if r["config"]["epochs"] == 36
    ]
    by = {
        m: {r["config"]["seed"]: r for r in found if r["config"]["method"] == m}
        for m in ("clip", method)
    }
    if what == "recall":
        return spread(
            [wrong.best_look(r)["val"]["mean_recall"] for r in by[method].values()]
        )
    return factors.shown(
        [
            wrong.zeroshot(by[method][s]) - wrong.zeroshot(by["clip"][s])
            for s in sorted(by["clip"])
        ]
    )


@functools.cache
def factor_cells() -> factors.Cells:
    return factors.select(
        records.read("cells", factors_plan.STUDY),
        factors_plan.searches(factors_plan.STUDY),
    )


def synthetic() -> str:
    lines = []
    for share in sorted(factors_plan.WRONG):
        world = Factors(wrong=share)
        clip = [
            factors.mean_zero_shot(r) for r in factor_cells()[world, "clip"].values()
        ]
        gaps = [
            factors.paired(factor_cells(), world, m, "clip", factors.mean_zero_shot)
            for m in factors.MEMBERS
        ]
        lines.append([f"{100 * share:.0f} %", spread(clip), *map(factors.shown, gaps)])
    return table(
        ["wrong captions", "CLIP, %", *(f"{NAMES[m]} − CLIP" for m in factors.MEMBERS)],
        lines,
    )


def vectors(task: str, method: str) -> str:
    """Recall@1 of a task of two matrices with right pairs: a method − CLIP, mean over
    seeds.
    """
    recalls = [
        r["recall"]
        for r in lines_of(AUTO / "members.jsonl")
        if r["task"] == task and not r["wrong"]
    ]
    gaps = [recall[method][0] - recall["clip"][0] for recall in recalls]
    return points(statistics.mean(gaps))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


_ALONE = {
    "infoloob": "InfoLOOB",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "cloob": "CLOOB",
    "cca": "closed form",
}


def auto_tasks() -> dict[str, list[dict[str, list[float]]]]:
    """Recall@1 and @10 of each method in %, by task and seed; a seed's best of
    cca-zoo's as ``zoo``.
    """
    tasks: dict[str, list[dict[str, list[float]]]] = {}
    for record in lines_of(AUTO / "members.jsonl"):
        found = {
            name: [100 * value for value in values]
            for name, values in record["recall"].items()
        }
        found["gallery"] = [record["test"]]
        found["zoo"] = max(
            values for name, values in found.items() if name.startswith("cca-zoo")
        )
        name = record["task"].replace(
            " ×", " and"
        ) + f", {100 * record['wrong']:.0f} % wrong" * (record["wrong"] > 0)
        tasks.setdefault(name, []).append(found)
    return tasks


def auto_table() -> str:
    """Recall@1 of `auto` and of what it chooses from, and of others' methods; means
    over seeds.
    """
    shown = ("auto", *_ALONE, "zoo", "plain loop")
    lines = [
        [
            task,
            f"{seeds[0]['gallery'][0]:,}",
            *(
                f"{statistics.mean(found[name][0] for found in seeds):.1f}"
                for name in shown
            ),
            str(len(seeds)),
        ]
        for task, seeds in auto_tasks().items()
    ]
    return table(
        ["", "gallery", "`auto`", *_ALONE.values(), "cca-zoo", "plain loop", "seeds"],
        lines,
    )


def auto_verdict() -> str:
    """How often `auto` is near the best single objective and ahead of it, and what
    happens to recall@10.
    """
    near = ahead = 0
    losses = []
    for task, seeds in auto_tasks().items():
        mean = {
            name: [statistics.mean(found[name][k] for found in seeds) for k in (0, 1)]
            for name in ("auto", *_ALONE)
        }
        gap = mean["auto"][0] - max(mean[name][0] for name in _ALONE)
        near, ahead = near + (gap >= -0.5), ahead + (gap > 0)
        if mean["auto"][1] < mean["infoloob"][1]:
            losses.append(
                f"{task} ({mean['infoloob'][1]:.1f} to {mean['auto'][1]:.1f})"
            )
    best = (
        f"within 0.5 points of the best single one in {near} of {len(auto_tasks())},"
        f" ahead in {ahead}"
    )
    seconds = [record["cpu_seconds"] for record in lines_of(AUTO / "members.jsonl")]
    times = [of["auto"] / of["infoloob"] for of in seconds]
    middle = statistics.median(times)
    above = f"above 3 in {sum(time > 3 for time in times)} of {len(times)} runs"
    cost = (
        f"it takes {min(times):.1f} to {max(times):.1f} times InfoLOOB's CPU time"
        f" (median {middle:.1f}, {above})"
    )
    return (
        f"{best}; recall@10 is below InfoLOOB's in {', '.join(losses) or 'none'};"
        f" {cost}"
    )


def hubs() -> str:
    """What the bias against hubs alone does to recall@1 and @10 of InfoLOOB's heads and
    the closed form, in points.
    """
    runs = [r for r in lines_of(AUTO / "members.jsonl") if "hubs" in r]
    words = []
    for k, name in enumerate(("recall@1", "recall@10")):
        gains = sorted(
            of[k] - r["recall"][method][k]
            for r in runs
            for method, of in r["hubs"].items()
        )
        words.append(
            f"{name} {points(gains[0])} to {points(gains[-1])}, median"
            f" {points(statistics.median(gains))}"
        )
    return "; ".join(words)


def search_settings() -> str:
    """What the search chose for heads on frozen encoders."""
    scores = {
        name: record["score"]
        for name, record in records.read("search", tables.STUDY).items()
    }
    lines = []
    methods = ("cloob", "infoloob", "clip")
    for method, head, share in itertools.product(
        methods, ("mlp", "linear"), (0.0, 0.4)
    ):
        cell = plan.chosen(method, World(head, "swap", share), scores)
        assert cell is not None
        s = cell.setting
        beta = "–" if s.beta is None else f"{s.beta:g}"
        numbers = [
            f"{s.inv_tau:g}",
            beta,
            f"{s.lr:g}",
            f"{s.batch_size}",
            f"{cell.epochs}",
        ]
        lines.append([NAMES[method], f"`{head}`", f"{100 * share:.0f} %", *numbers])
    return table(
        [
            "objective",
            "heads",
            "wrong captions",
            "τ⁻¹",
            "β",
            "learning rate",
            "batch",
            "epochs",
        ],
        lines,
    )


def helps() -> str:
    """README's table: what a person with such data may expect."""
    resnet = scratch.TOWERS[0]
    rows = (("cloob",), ("infoloob",), (CCA,), ("infoloob", CCA), plan.CONTROLS[0])
    lines = [
        [what, *(claimed(members, share, clean=clean) for members in rows)]
        for what, share, clean in (
            ("MLP heads on frozen encoders, 43,276 pairs, zero-shot", 0.0, False),
            ("the same, 40 % wrong captions", 0.4, False),
            ("the same, all cleaned", 0.4, True),
        )
    ]
    for what, share in (
        ("MLP heads, 3,000 pairs, recall", 0.0),
        ("the same, 40 % wrong captions", 0.4),
    ):
        lines.append([what, *(few_lead(members, share) for members in rows)])
    for what, leads in (
        (
            "two files of vectors (molecules, names), recall@1",
            [vectors("molecules × names", m) for m in (*METHODS, CCA)],
        ),
        (
            "small ResNet from scratch, 43,276 pairs, zero-shot",
            [said(tower_lead(m, resnet)) for m in METHODS],
        ),
    ):
        lines.append([what, *leads, *(len(rows) - len(leads)) * ["–"]])
    lines.append(["millions of pairs", "not run here; ahead in the paper", *4 * ["–"]])
    names = ("CLOOB", "InfoLOOB", "CCA", "InfoLOOB ⊕ CCA", "InfoLOOB ⊕ InfoLOOB")
    return table(["your data", *(f"{n} − CLIP" for n in names)], lines)


def frozen_claim() -> str:
    """In how many cells of the frozen study's claim CLOOB leads."""
    runs, sets = frozen()
    worlds = [world for world in plan.CORE if world.share >= tables.WRONG]
    found = [
        d
        for w in worlds
        for d in compared(runs["cloob", w], runs["clip", w], sets).values()
        if d.told
    ]
    return counted([d.mean for d in found])


def on_set(name: str, world: World) -> str:
    runs, sets = frozen()
    return said(compared(runs["cloob", world], runs["clip", world], sets)[name])


@functools.cache
def claim() -> claims.Found:
    return claims.found(frozen()[0])


def claimed(members: tuple[str, ...], share: float, *, clean: bool = False) -> str:
    """Zero-shot of a row of claim.md with all pairs − CLIP's, which is cleaned too or
    is not.
    """
    if (
        members in (("cloob",), ("infoloob",)) and not clean
    ):  # the study's cells have more seeds
        return said(lead(members[0], World("mlp", "swap", share)))
    return apart(claims.Key(members, clean, share), claims.Key(("clip",), clean, share))


def apart(ours: claims.Key, theirs: claims.Key) -> str:
    """A row − another in zero-shot."""
    found = (claim().get(key, {}) for key in (ours, theirs))
    return said(together(compared(*found, frozen()[1]).values(), True))


def recalled(ours: claims.Key, theirs: claims.Key) -> str:
    """A row − another in recall, with its interval over seeds."""
    a, b = (claim().get(key, {}) for key in (ours, theirs))
    return factors.shown(
        [
            a[s]["val"]["mean_recall"] - b[s]["val"]["mean_recall"]
            for s in sorted(a.keys() & b)
        ]
    )


def right_cleaned() -> str:
    """What cleaning costs where all captions are right: the worst mean of a method at a
    size, and the pairs dropped.
    """
    gaps, dropped = [], set()
    for key, cleaned in claim().items():
        if key.clean and not key.share and key.members in SINGLE:
            whole = claim()[key._replace(clean=False)]
            gaps.append(
                statistics.mean(
                    cleaned[s]["val"]["mean_recall"] - whole[s]["val"]["mean_recall"]
                    for s in cleaned
                )
            )
            dropped |= {record["cleaning"]["dropped"] for record in cleaned.values()}
    return (
        f"{points(min(gaps))} at worst, {min(dropped)} to {max(dropped)} pairs left out"
    )


def few_lead(
    members: tuple[str, ...], share: float, other: tuple[str, ...] = ("clip",)
) -> str:
    """A row of claim.md with 3,000 pairs − another, in recall."""
    return recalled(
        *(claims.Key(each, False, share, SIZES[0]) for each in (members, other))
    )


def hours(study: Path) -> str:
    """CPU-core hours of all runs with a record."""
    stages = {stage for stage, _ in records.names(study)}
    found = (
        r.get("cpu_seconds", 0.0)
        for stage in stages
        for r in records.read(stage, study).values()
    )
    return f"{sum(found) / 3600:.0f}"


FIGURES: Mapping[str, Callable[[], str]] = {
    "helps": helps,
    "heads": heads,
    "fewer": fewer,
    "towers": towers,
    "synthetic": synthetic,
    "settings": search_settings,
    **{
        f"hours-{s}": functools.partial(hours, AUTO.parents[1] / s)
        for s in ("pictograms", "frozen", "factors")
    },
    "frozen-claim": frozen_claim,
    "claim-runs": lambda: claims.runs_table(claim()),
    "claim-main": lambda: claims.runs_table(
        claim(), (*SINGLE, ("infoloob", CCA), *plan.CONTROLS)
    ),
    "claim-sizes": lambda: claims.sizes_table(claim()),
    "claim-verdicts": lambda: claims.verdicts(claim(), frozen()[1]),
    "goal-right": lambda: claims.goal(
        claim(), claims.Key(plan.CONTROLS[1], False, 0.0)
    ),
    "goal-cleaned": lambda: claims.goal(
        claim(), claims.Key(plan.CONTROLS[1], True, 0.4)
    ),
    **{
        f"closed-{what}-{100 * share:.0f}": functools.partial(
            judge,
            claims.Key(("infoloob", CCA), False, share),
            claims.Key(plan.CONTROLS[0], False, share),
        )
        for what, judge in (("zeroshot", apart), ("recall", recalled))
        for share in (0.0, 0.4)
    },
    **{
        f"closed-{row[0]}": functools.partial(
            apart, claims.Key((row[0], CCA), True), claims.Key(row, True)
        )
        for row in plan.OTHERS
    },
    "cleaning-right": right_cleaned,
    "wide": lambda: claims.both(claim()[claims.Key(plan.WIDE[0])]),
    **{
        f"cleaning-{m}": functools.partial(
            recalled, claims.Key((m,), True), claims.Key((m,))
        )
        for m in ("clip", "infoloob", "cloob", CCA)
    },
    **{
        f"joined-{name}": functools.partial(lambda key: claims.both(claim()[key]), key)
        for name, key in (
            ("clip-right", claims.Key(("clip",), False, 0.0)),
            ("clip-wrong", claims.Key(("clip",))),
            ("right", claims.Key(plan.CONTROLS[1], False, 0.0)),
            ("cleaned", claims.Key(plan.CONTROLS[1], True)),
            ("two-right", claims.Key(plan.MIXED[0], False, 0.0)),
            ("two-cleaned", claims.Key(plan.MIXED[0], True)),
        )
    },
    "photographs": lambda: on_set("tuxpaint-photos", World("linear", "swap", 0.0)),
    "names": lambda: said(lead("cloob", World("mlp", "name", 0.4))),
    "longer": lambda: said(
        tower_lead("cloob", scratch.TOWERS[0], longer=True), seeds=True
    ),
    **{f"wrong-{m}": functools.partial(scratch_wrong, m, "lead") for m in METHODS},
    **{
        f"recall-{m}": functools.partial(scratch_wrong, m, "recall")
        for m in ("clip", "cloob")
    },
    **{
        f"right-{m}": lambda m=m: said(lead(m, World("mlp", "swap", 0.0)))
        for m in METHODS
    },
    **{
        f"mixed-{m}": lambda m=m: said(lead(m, World("mlp", "swap", 0.4)))
        for m in METHODS
    },
    **{
        f"few-{m}-{100 * share:.0f}": functools.partial(few_lead, (m,), share)
        for m in ("cloob", CCA)
        for share in (0.0, 0.4)
    },
    **{f"few-cca-{m}": functools.partial(few_lead, (CCA,), 0.4, (m,)) for m in METHODS},
    "mixed-cca": lambda: claimed((CCA,), 0.4),
    "auto": auto_table,
    "auto-verdict": auto_verdict,
    "auto-hubs": hubs,
    **{
        f"molecules-{m}": functools.partial(vectors, "molecules × names", m)
        for m in METHODS
    },
}
"""What stands between the marks ``<!-- figure NAME -->`` and ``<!-- /figure -->`` of a
page.
"""
