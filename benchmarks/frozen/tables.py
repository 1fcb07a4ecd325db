"""The tables of ``tables.md``, recomputed from the records between two markers, and the
figure of docs/study.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.frozen.plan import (
    CLAIMED,
    CORE,
    METHODS,
    PAIRS,
    SEEDS,
    WORLDS,
    World,
    cells_of,
    chosen,
    chosen_with_decay,
)
from benchmarks.studies import records
from benchmarks.studies.comparison import (
    Difference,
    Record,
    Sets,
    compared,
    counted,
    together,
    won_and_lost,
    zeroshot_mean,
)
from benchmarks.studies.leads import Lead, Row, forest
from benchmarks.studies.pages import NAMES, percent, replaced, spread, table

STUDY = Path(__file__).parent
COMPARED = (
    ("cloob", "clip"),
    ("infoloob", "clip"),
    ("cloob-warm", "clip"),
    ("infonce-hopfield", "clip"),
    ("cloob", "infoloob"),
)
TARGET = 0.8
"""The share of the cells above chance in which CLOOB is to be ahead."""
WRONG = 0.4
"""From this share of wrong captions on."""
_KINDS = {"swap": "swapped", "name": "file names", "cut": "cut"}
Runs = dict[tuple[str, World], dict[int, Record]]
"""(method, world) -> seed -> record."""
Differences = dict[World, dict[str, Difference]]
"""World -> test set -> the difference of two methods."""


def filled(text: str) -> str:
    return replaced(text, render(), "<!-- frozen:begin -->", "<!-- frozen:end -->")


def draw(images: Path) -> None:
    scores = {
        name: record["score"] for name, record in records.read("search", STUDY).items()
    }
    runs, sets = (
        select(records.read("cells", STUDY), scores),
        records.labels_by_set(STUDY),
    )
    forest(images / "frozen.svg", list(_TITLES.values()), list(rows(runs, sets)), NAMES)


def render() -> str:
    scores = {
        name: record["score"] for name, record in records.read("search", STUDY).items()
    }
    cells, sets = records.read("cells", STUDY), records.labels_by_set(STUDY)
    runs = select(cells, scores)
    parts = []
    if runs:
        found = {pair: differences(runs, sets, *pair) for pair in COMPARED}
        parts += [
            verdict(runs, found["cloob", "clip"]),
            accuracy(runs),
            *(effect(*pair, found[pair]) for pair in found),
        ]
        decayed = select(cells, scores, with_decay=True)
        parts.append(decaying(decayed, scores, sets))
        parts += [recalls(runs), settings(scores)]
    return "\n\n".join(part for part in parts if part)


def select(
    cells: Mapping[str, Record],
    scores: Mapping[str, float],
    *,
    with_decay: bool = False,
) -> Runs:
    """The runs with the chosen settings, or with the weight decay chosen too."""
    runs: Runs = {}
    for world in WORLDS:
        for method in METHODS:
            wanted = cells_of(method, world, scores, with_decay=with_decay)
            if of_seed := {
                cell.seed: cells[cell.id] for cell in wanted if cell.id in cells
            }:
                runs[method, world] = of_seed
    return runs


def decaying(runs: Runs, scores: Mapping[str, float], sets: Sets) -> str:
    """The claim's difference where the weight decay is chosen as well."""
    decayed = (*CLAIMED, "infoloob")
    lines = []
    for world in CORE:
        best = [chosen_with_decay(method, world, scores) for method in decayed]
        found = compared(
            runs.get(("cloob", world), {}), runs.get(("clip", world), {}), sets
        )
        told = [d for d in found.values() if d.told]
        if mean := together(told):
            row = [
                name_of(world),
                *(f"{cell.setting.weight_decay:g}" if cell else "–" for cell in best),
            ]
            row += [
                spread([zeroshot_mean(r) for r in runs.get((m, world), {}).values()])
                for m in decayed
            ]
            row += [
                *mean.shown(),
                f"{won_and_lost([d.mean for d in told])[0]} of {len(told)}",
                str(len(mean.seeds)),
            ]
            lines.append(row)
    named = [NAMES[method] for method in decayed]
    head = [
        "captions",
        *(f"decay, {name}" for name in named),
        *(f"{name}, %" for name in named),
        "CLOOB − CLIP",
    ]
    head += [
        "95 %, over seeds",
        "95 %, over classes",
        "ahead in sets above chance",
        "seeds",
    ]
    return f"### Weight decay chosen as well\n\n{table(head, lines)}" if lines else ""


def name_of(world: World) -> str:
    wrong = (
        f"{percent(world.share, 0)} % {_KINDS[world.kind]}" if world.share else "clean"
    )
    return f"{world.head}, {wrong}" + (
        "" if world.pairs == PAIRS else f", {world.pairs:,} pairs"
    )


def differences(runs: Runs, sets: Sets, method: str, baseline: str) -> Differences:
    """A method − another on each set of each world, where they have a seed in
    common.
    """
    found = {
        w: compared(runs.get((method, w), {}), runs.get((baseline, w), {}), sets)
        for w in WORLDS
    }
    return {world: of_sets for world, of_sets in found.items() if of_sets}


def verdict(runs: Runs, differences: Differences) -> str:
    """What became of the claim, which was declared before the first run."""
    lines = []
    for title, worlds, share in (
        (
            f"at least {percent(WRONG, 0)} % swapped captions",
            [w for w in CORE if w.share >= WRONG],
            TARGET,
        ),
        ("clean captions", [w for w in CORE if not w.share], 0.0),
    ):
        found = {world: differences[world] for world in worlds if world in differences}
        told = [
            d.mean for of_sets in found.values() for d in of_sets.values() if d.told
        ]
        means = {world: together(of_sets.values()) for world, of_sets in found.items()}
        clear = [
            w
            for w, m in means.items()
            if m is not None and m.over_seeds[0] > 0 and m.over_classes[0] > 0
        ]
        full = [
            w
            for w in worlds
            if all(len(runs.get((m, w), {})) == len(SEEDS) for m in ("clip", "cloob"))
        ]
        met = (
            bool(told)
            and won_and_lost(told)[0] >= share * len(told)
            and len(clear) == len(worlds)
        )
        answer = "met" if met else "not met"
        answer = (
            answer
            if len(full) == len(worlds)
            else f"open, {len(full)} of {len(worlds)} worlds have all seeds"
        )
        lines.append(
            f"- {title}: **{answer}**. CLOOB is ahead of CLIP in {counted(told)} cells"
            " above chance; both intervals of the mean are above zero for"
            f" {'; '.join(map(name_of, clear)) or 'no heads'}."
        )
    return "### The claim\n\n" + "\n".join(lines)


def accuracy(runs: Runs) -> str:
    lines = []
    for world in WORLDS:
        found = [list(runs.get((method, world), {}).values()) for method in METHODS]
        if any(found):
            lines.append(
                [
                    name_of(world),
                    *(spread([zeroshot_mean(r) for r in of]) for of in found),
                ]
            )
    return "### Mean zero-shot top-1 over the eight sets, %\n\n" + table(
        ["captions", *(NAMES[method] for method in METHODS)], lines
    )


def effect(method: str, baseline: str, differences: Differences) -> str:
    lines = []
    for world, of_sets in differences.items():
        told = [d for d in of_sets.values() if d.told]
        if mean := together(told):
            ahead = f"{won_and_lost([d.mean for d in told])[0]} of {len(told)}"
            lines.append([name_of(world), *mean.shown(), ahead, str(len(mean.seeds))])
    head = [
        "captions",
        "points",
        "95 %, over seeds",
        "95 %, over classes",
        "ahead in sets above chance",
        "seeds",
    ]
    title = f"### {NAMES[method]} − {NAMES[baseline]}: mean of the sets above chance"
    return f"{title}\n\n{table(head, lines)}" if lines else ""


def recalls(runs: Runs) -> str:
    """Mean recall on pairs held out and on pairs trained on, and what the embeddings
    look like.
    """
    lines = []
    for world in WORLDS:
        for method in METHODS:
            found = list(runs.get((method, world), {}).values())
            if found:
                row = [
                    spread([r[key] for r in found]) for key in ("train_recall", "score")
                ]
                row += [
                    spread([r[key]["mean_recall"] for r in found])
                    for key in ("val", "tuxpaint-captions")
                ]
                for key in (
                    "effective_eigenvalues_image",
                    "effective_eigenvalues_text",
                ):
                    row.append(f"{sum(r['val'][key] for r in found) / len(found):.0f}")
                lines.append([name_of(world), NAMES[method], *row])
    head = [
        "captions",
        "method",
        "training pairs",
        "held-out pairs, as wrong",
        "held-out pairs, clean",
    ]
    head += ["tuxpaint-captions", "effective eigenvalues of images", "of texts"]
    return "### Mean recall@{1, 5, 10} both ways, %\n\n" + table(head, lines)


def settings(scores: Mapping[str, float]) -> str:
    lines = [
        [name_of(world), NAMES[method], f"`{best.setting.slug}`", str(best.epochs)]
        for world in WORLDS
        for method in METHODS
        if (best := chosen(method, world, scores))
    ]
    note = "`lr` learning rate, `wd` weight decay, `n` batch, `t` τ⁻¹, `b` β."
    return f"### Settings of the cells\n\n{note}\n\n" + table(
        ["captions", "method", "setting", "epochs"], lines
    )


SHOWN = ("cloob", "infoloob")
_TITLES = {"linear": "linear heads", "mlp": "MLP heads"}


def rows(runs: Runs, sets: Sets) -> Iterator[Row]:
    """A row for each share of wrong captions, a panel for each kind of heads."""
    found = {method: differences(runs, sets, method, "clip") for method in SHOWN}
    for share in sorted({world.share for world in CORE}):
        worlds = [World(head, "swap", share) for head in _TITLES]
        leads = [
            {m: lead for m in SHOWN if (lead := mean_lead(found[m], world))}
            for world in worlds
        ]
        yield Row(f"{100 * share:g} % wrong" if share else "right captions", leads)


def mean_lead(differences: Differences, world: World) -> Lead | None:
    """The mean over the sets above chance, in points, with its interval over classes;
    None without a run.
    """
    mean = together([d for d in differences.get(world, {}).values() if d.told])
    return (
        None
        if mean is None
        else Lead(*(100 * x for x in (mean.mean, *mean.over_classes)))
    )
