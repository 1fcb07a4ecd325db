"""The numbers of docs/study.md, docs/choose.md and README.md that come from the records
of the three studies.

A ``Row`` says what was trained: which members, on which captions. All numbers are means
of a row over seeds, or differences of two rows, paired by seed.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies import records
from benchmarks.studies.comparison import (
    Difference,
    Sets,
    compared,
    counted,
    mean_of_sets,
    t_interval,
    zeroshot_mean,
)
from benchmarks.studies.leads import Lead, Panel, forest, over_shares
from benchmarks.studies.pages import NAMES, lead, percent, points, spread, table
from benchmarks.studies.records import Record

BENCHMARKS = Path(__file__).parents[1]
FROZEN = BENCHMARKS / "frozen"
PICTOGRAMS = BENCHMARKS / "pictograms"
FACTORS = BENCHMARKS / "factors"
STUDIES = {"pictograms": PICTOGRAMS, "frozen": FROZEN, "factors": FACTORS}
COMPARED = ("cloob", "infoloob")
"""The methods that are compared with CLIP."""
SHARES = (0.0, 0.4, 0.6)
"""Shares of wrong captions of the frozen study's claim."""
SIZES = (3_000, 6_000, 12_000, 24_000)
TOWERS = ("tiny-resnet", "tiny-vit", "tiny-convnext")
BySeed = Mapping[int, Record]


class Row(NamedTuple):
    """What was trained on frozen encoders: members side by side, kind of the heads,
    what wrong captions are and their share, pairs, whether they were cleaned first.
    """

    members: tuple[str, ...]
    share: float = 0.4
    clean: bool = False
    head: str = "mlp"
    kind: str = "swap"
    pairs: int = 43_276

    @property
    def name(self) -> str:
        widths = {
            "infoloob-1": "InfoLOOB",
            "infoloob-2": "InfoLOOB (384)",
            "infoloob-wide": "InfoLOOB (640)",
        }
        return " ⊕ ".join((NAMES | widths)[member] for member in self.members)


CLIP = ("clip",)
CCA = ("cca",)
TWO = ("infoloob", "infoloob-2")
TWO_AND_CCA = ("infoloob", "infoloob-1", "cca")
Runs = Mapping[Row, BySeed]


@functools.cache
def heads_runs() -> Runs:
    """The cells of the frozen study: one member each, five seeds."""
    runs: dict[Row, dict[int, Record]] = {}
    for record in records.read("cells", FROZEN).values():
        config = record["config"]
        world = config["world"]
        row = Row(
            (config["method"],),
            world["share"],
            head=world["head"],
            kind=world["kind"],
            pairs=world["pairs"],
        )
        runs.setdefault(row, {})[config["seed"]] = record
    return runs


@functools.cache
def joined_runs() -> Runs:
    """The runs of claim.md; CLIP's and CLOOB's with all pairs as they are come from the
    cells.
    """
    runs: dict[Row, dict[int, Record]] = {}
    for record in records.read("claim", FROZEN).values():
        config = record["config"]
        world = config["world"]
        row = Row(
            tuple(config["members"]),
            world["share"],
            config["clean"],
            pairs=world["pairs"],
        )
        runs.setdefault(row, {})[config["seed"]] = record
    for method, share in itertools.product(("clip", "cloob"), (0.4, 0.0)):
        row = Row((method,), share)
        runs[row] = dict(heads_runs()[row])
    return runs


@functools.cache
def frozen_sets() -> Sets:
    return records.labels_by_set(FROZEN)


def zeroshot_lead(runs: Runs, ours: Row, theirs: Row) -> str:
    """A row − another over all eight sets, with its interval over classes."""
    by_set = compared(runs[ours], runs[theirs], frozen_sets())
    mean = mean_of_sets(by_set.values(), everything=True)
    assert mean is not None
    return lead(mean.mean, mean.over_classes)


def recall_lead(runs: Runs, ours: Row, theirs: Row) -> str:
    """A row − another in the mean recall of held-out pairs with right captions, with
    its interval over seeds.
    """
    return over_seeds(_recall_gaps(runs.get(ours, {}), runs.get(theirs, {})))


def _recall_gaps(ours: BySeed, theirs: BySeed) -> list[float]:
    return [_recall(ours[s]) - _recall(theirs[s]) for s in sorted(ours.keys() & theirs)]


def _recall(record: Record) -> float:
    return float(record["val"]["mean_recall"])


def over_seeds(differences: Sequence[float]) -> str:
    if not differences:
        return "–"
    return lead(statistics.mean(differences), t_interval(differences))


def heads() -> str:
    """Zero-shot and recall of CLIP on frozen encoders, and the lead of the others."""
    runs = heads_runs()
    lines = []
    for head, share in itertools.product(("linear", "mlp"), SHARES):
        clip = Row(CLIP, share, head=head)
        others = [clip._replace(members=(method,)) for method in COMPARED]
        lines.append(
            [
                f"{head}, {percent(share, 0)} % wrong",
                spread([zeroshot_mean(record) for record in runs[clip].values()]),
                *(zeroshot_lead(runs, row, clip) for row in others),
                spread([_recall(record) for record in runs[clip].values()]),
                *(recall_lead(runs, row, clip) for row in others),
            ]
        )
    leads = ["CLOOB − CLIP", "InfoLOOB − CLIP"]
    head_line = ["heads, captions", "CLIP, zero-shot, %", *leads]
    return table([*head_line, "CLIP, recall, %", *leads], lines)


def fewer() -> str:
    """CLOOB against CLIP by the number of pairs, linear heads."""
    lines = []
    for pairs, share in itertools.product(SIZES, (0.0, 0.4)):
        clip = Row(CLIP, share, head="linear", pairs=pairs)
        cloob = clip._replace(members=("cloob",))
        lines.append(
            [
                f"{pairs:,}, {percent(share, 0)} % wrong",
                zeroshot_lead(heads_runs(), cloob, clip),
                recall_lead(heads_runs(), cloob, clip),
            ]
        )
    head = ["pairs, captions", "CLOOB − CLIP, zero-shot", "CLOOB − CLIP, recall"]
    return table(head, lines)


def settings() -> str:
    """What the search chose for heads on frozen encoders."""
    lines = []
    methods = ("cloob", "infoloob", "clip")
    for method, head, share in itertools.product(
        methods, ("mlp", "linear"), (0.0, 0.4)
    ):
        config = heads_runs()[Row((method,), share, head=head)][0]["config"]
        setting = config["setting"]
        beta = "–" if setting["beta"] is None else f"{setting['beta']:g}"
        lines.append(
            [
                NAMES[method],
                f"`{head}`",
                f"{percent(share, 0)} %",
                f"{setting['inv_tau']:g}",
                beta,
                f"{setting['lr']:g}",
                str(setting["batch_size"]),
                str(config["epochs"]),
            ]
        )
    head_line = ["objective", "heads", "wrong captions", "τ⁻¹", "β"]
    return table([*head_line, "learning rate", "batch", "epochs"], lines)


def frozen_claim() -> str:
    """In how many (heads, share, set) cells above chance CLOOB leads, from 40 % wrong
    captions on.
    """
    found = []
    for head, share in itertools.product(("linear", "mlp"), SHARES[1:]):
        clip = Row(CLIP, share, head=head)
        cloob = clip._replace(members=("cloob",))
        by_set = compared(heads_runs()[cloob], heads_runs()[clip], frozen_sets())
        found += [difference.mean for difference in by_set.values() if difference.told]
    return counted(found)


def photographs() -> str:
    """CLOOB − CLIP on one set, linear heads and right captions."""
    clip = Row(CLIP, 0.0, head="linear")
    cloob = clip._replace(members=("cloob",))
    by_set = compared(heads_runs()[cloob], heads_runs()[clip], frozen_sets())
    found = by_set["tuxpaint-photos"]
    return lead(found.mean, found.over_classes)


def claim(score: Callable[[Record], float]) -> str:
    """A measure of the rows of claim.md that the page speaks of, means over seeds."""
    rows = [CLIP, ("cloob",), ("infoloob",), CCA, ("infoloob", "cca")]
    rows += [TWO, TWO_AND_CCA, ("infoloob", "infoloob-1", "infoloob-2")]
    states = [(share, clean) for share in (0.4, 0.0) for clean in (False, True)]
    lines = []
    for members in rows:
        cells = [Row(members, share, clean) for share, clean in states]
        means = [
            statistics.mean(map(score, joined_runs()[row].values())) for row in cells
        ]
        lines.append([cells[0].name, *map(percent, means)])
    head = [
        f"{percent(share, 0)} % wrong{', cleaned' * clean}" for share, clean in states
    ]
    return table(["%", *head], lines)


def right_cleaned() -> str:
    """What cleaning costs where all captions are right: the worst mean of a method at a
    size, and the pairs left out.
    """
    losses = []
    left_out = set()
    single = (CLIP, ("infoloob",), ("cloob",), CCA)
    for row, cleaned in joined_runs().items():
        if not row.clean or row.share or row.members not in single:
            continue
        whole = joined_runs()[row._replace(clean=False)]
        losses.append(statistics.mean(_recall_gaps(cleaned, whole)))
        left_out |= {record["cleaning"]["dropped"] for record in cleaned.values()}
    worst = points(min(losses))
    return f"{worst} at worst, {min(left_out)} to {max(left_out)} pairs left out"


def claimed(members: tuple[str, ...], share: float, clean: bool = False) -> str:
    """A row − CLIP's in zero-shot with all pairs; the cells have more seeds, so they
    come first.
    """
    row = Row(members, share, clean)
    runs = heads_runs() if row in heads_runs() else joined_runs()
    return zeroshot_lead(runs, row, row._replace(members=CLIP))


def few_lead(
    members: tuple[str, ...], share: float, other: tuple[str, ...] = CLIP
) -> str:
    """A row of claim.md with 3,000 pairs − another, in recall."""
    row = Row(members, share, pairs=SIZES[0])
    return recall_lead(joined_runs(), row, row._replace(members=other))


@functools.cache
def scratch_runs(epochs: int) -> Mapping[tuple[str, str], BySeed]:
    """(method, tower) -> seed -> record of the towers from scratch, of one length."""
    runs: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records.read("cells", PICTOGRAMS).values():
        config = record["config"]
        if config["epochs"] == epochs:
            key = (config["method"], config["tower"])
            runs.setdefault(key, {})[config["seed"]] = record
    return runs


def tower_lead(method: str, tower: str, epochs: int = 12) -> Difference:
    """A method − CLIP over all eight sets, towers from scratch."""
    runs = scratch_runs(epochs)
    sets = records.labels_by_set(PICTOGRAMS)
    by_set = compared(runs[method, tower], runs["clip", tower], sets)
    mean = mean_of_sets(by_set.values(), everything=True)
    assert mean is not None
    return mean


def towers() -> str:
    runs = scratch_runs(12)
    lines = []
    for method in ("clip", *COMPARED):
        by_tower = [runs[method, tower].values() for tower in TOWERS]
        scores = [[zeroshot_mean(record) for record in found] for found in by_tower]
        lines.append([NAMES[method], *map(spread, scores)])
    for method in COMPARED:
        leads = [tower_lead(method, tower) for tower in TOWERS]
        shown = [lead(found.mean, found.over_classes) for found in leads]
        lines.append([f"{NAMES[method]} − CLIP", *shown])
    return table(["zero-shot top-1, mean of eight sets, %", *TOWERS], lines)


def longer() -> str:
    found = tower_lead("cloob", TOWERS[0], epochs=36)
    return lead(found.mean, found.over_seeds)


@functools.cache
def wrong_looks(method: str) -> Mapping[int, Record]:
    """Seed -> the best look at the ResNet with 40 % wrong captions, of 36 epochs."""
    looks = {}
    for record in records.read("wrong", PICTOGRAMS).values():
        config = record["config"]
        if (config["method"], config["epochs"]) != (method, 36):
            continue
        tested = [line for line in record["curve"] if "zeroshot" in line]
        looks[config["seed"]] = max(tested, key=_recall)
    return dict(sorted(looks.items()))


def wrong_lead(method: str) -> str:
    ours = wrong_looks(method)
    clip = wrong_looks("clip")
    gaps = [_look_mean(ours[seed]) - _look_mean(clip[seed]) for seed in clip]
    return over_seeds(gaps)


def _look_mean(look: Record) -> float:
    return statistics.mean(look["zeroshot"].values())


def wrong_recall(method: str) -> str:
    return spread([_recall(look) for look in wrong_looks(method).values()])


World = tuple[tuple[str, float], ...]
"""What differs from the base world of factors, by name."""


def world(**changes: float) -> World:
    return tuple(sorted(changes.items()))


@functools.cache
def factor_runs() -> Mapping[tuple[World, str], BySeed]:
    """(world, method) -> seed -> record of the synthetic study."""
    base = {"wrong": 0.0, "pool": 4000, "batch": 128, "named": 0.5, "correlation": 0.0}
    runs: dict[tuple[World, str], dict[int, Record]] = {}
    for record in records.read("cells", FACTORS).values():
        config = record["config"]
        of_world = config["world"]
        changes = {k: of_world[k] for k, v in base.items() if of_world[k] != v}
        key = (world(**changes), config["method"])
        runs.setdefault(key, {})[config["seed"]] = record
    return runs


def factor_gaps(where: World, method: str) -> list[float]:
    """A method − CLIP in mean zero-shot accuracy, by seed."""
    ours = factor_runs().get((where, method), {})
    clip = factor_runs().get((where, "clip"), {})
    return [
        _factor_mean(ours[seed]) - _factor_mean(clip[seed])
        for seed in sorted(ours.keys() & clip)
    ]


def _factor_mean(record: Record) -> float:
    return statistics.mean(record["zero_shot"])


FACTOR_MEMBERS = ("cloob", "infoloob", "infonce-hopfield")
FACTOR_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def _wrong(share: float, **changes: float) -> World:
    return world(**changes, **({"wrong": share} if share else {}))


def synthetic() -> str:
    lines = []
    for share in FACTOR_SHARES:
        where = _wrong(share)
        clip = [
            _factor_mean(record) for record in factor_runs()[where, "clip"].values()
        ]
        leads = [over_seeds(factor_gaps(where, method)) for method in FACTOR_MEMBERS]
        lines.append([f"{percent(share, 0)} %", spread(clip), *leads])
    head = [f"{NAMES[method]} − CLIP" for method in FACTOR_MEMBERS]
    return table(["wrong captions", "CLIP, %", *head], lines)


def hours(study: Path) -> str:
    """CPU-core hours of all runs with a record."""
    seconds = 0.0
    for stage in {stage for stage, _ in records.names(study)}:
        for record in records.read(stage, study).values():
            seconds += record.get("cpu_seconds", 0.0)
    return f"{seconds / 3600:.0f}"


def helps(of_vectors: Mapping[str, str]) -> str:
    """What a person with such data may expect.

    ``of_vectors``: method -> its lead over CLIP on two files of vectors.
    """
    rows = (("cloob",), ("infoloob",), CCA, ("infoloob", "cca"), TWO)
    lines = [
        [
            "MLP heads on frozen encoders, 43,276 pairs, zero-shot",
            *(claimed(members, 0.0) for members in rows),
        ],
        ["the same, 40 % wrong captions", *(claimed(members, 0.4) for members in rows)],
        [
            "the same, all cleaned",
            *(claimed(members, 0.4, clean=True) for members in rows),
        ],
        [
            "MLP heads, 3,000 pairs, recall",
            *(few_lead(members, 0.0) for members in rows),
        ],
        [
            "the same, 40 % wrong captions",
            *(few_lead(members, 0.4) for members in rows),
        ],
        [
            "two files of vectors, recall@1, mean of sets",
            *(of_vectors[method] for method in (*COMPARED, "cca")),
            "–",
            "–",
        ],
    ]
    leads = [tower_lead(method, TOWERS[0]) for method in COMPARED]
    shown = [lead(found.mean, found.over_classes) for found in leads]
    lines.append(
        ["small ResNet from scratch, 43,276 pairs, zero-shot", *shown, "–", "–", "–"]
    )
    lines.append(["millions of pairs", "not run here; ahead in the paper", *4 * ["–"]])
    names = ("CLOOB", "InfoLOOB", "CCA", "InfoLOOB ⊕ CCA", "InfoLOOB ⊕ InfoLOOB")
    return table(["your data", *(f"{name} − CLIP" for name in names)], lines)


def figures() -> dict[str, Callable[[], str]]:
    """By its name, what stands between the marks of a page."""
    found: dict[str, Callable[[], str]] = {
        "heads": heads,
        "fewer": fewer,
        "towers": towers,
        "synthetic": synthetic,
        "settings": settings,
        "frozen-claim": frozen_claim,
        "claim-zeroshot": lambda: claim(zeroshot_mean),
        "claim-recall": lambda: claim(_recall),
        "photographs": photographs,
        "longer": longer,
        "cleaning-right": right_cleaned,
        "mixed-cca": lambda: claimed(CCA, 0.4),
        "right-infoloob": lambda: claimed(("infoloob",), 0.0),
        "few-cca-0": lambda: few_lead(CCA, 0.0),
        "few-cca-40": lambda: few_lead(CCA, 0.4),
        "recall-clip": lambda: wrong_recall("clip"),
        "recall-cloob": lambda: wrong_recall("cloob"),
        "names": lambda: zeroshot_lead(
            heads_runs(), Row(("cloob",), kind="name"), Row(CLIP, kind="name")
        ),
    }
    for study, folder in STUDIES.items():
        found[f"hours-{study}"] = functools.partial(hours, folder)
    for method in COMPARED:
        members = (method,)
        found[f"wrong-{method}"] = functools.partial(wrong_lead, method)
        found[f"few-cca-{method}"] = functools.partial(few_lead, CCA, 0.4, members)
    for method in ("clip", "infoloob", "cloob", "cca"):
        row = Row((method,))
        cleaned = row._replace(clean=True)
        found[f"cleaning-{method}"] = functools.partial(
            lambda ours, theirs: recall_lead(joined_runs(), ours, theirs), cleaned, row
        )
    for name, judge in (("zeroshot", zeroshot_lead), ("recall", recall_lead)):
        for share in (0.0, 0.4):
            found[f"closed-{name}-{percent(share, 0)}"] = functools.partial(
                lambda judge, share: judge(
                    joined_runs(), Row(("infoloob", "cca"), share), Row(TWO, share)
                ),
                judge,
                share,
            )
    for method in ("clip", "cloob"):
        found[f"closed-{method}"] = functools.partial(
            lambda method: zeroshot_lead(
                joined_runs(),
                Row((method, "cca"), clean=True),
                Row((method, f"{method}-2"), clean=True),
            ),
            method,
        )
    return found


def draw(images: Path) -> None:
    """The figures of docs/study.md."""
    forest(images / "frozen.svg", _frozen_panels(), NAMES)
    by_share = {
        method: {share: _factor_lead(_wrong(share), method) for share in FACTOR_SHARES}
        for method in FACTOR_MEMBERS
    }
    over_shares(images / "factors-wrong.svg", by_share, NAMES)
    forest(images / "factors-worlds.svg", _factor_panels(), NAMES)


def _frozen_panels() -> list[Panel]:
    """A panel for each kind of heads, a row for each share of wrong captions."""
    panels = []
    for head, title in (("linear", "linear heads"), ("mlp", "MLP heads")):
        rows = {}
        for share in SHARES:
            label = f"{percent(share, 0)} % wrong" if share else "right captions"
            clip = Row(CLIP, share, head=head)
            rows[label] = {
                method: _above_chance(clip._replace(members=(method,)), clip)
                for method in COMPARED
            }
        panels.append(Panel(title, rows))
    return panels


def _above_chance(ours: Row, theirs: Row) -> Lead:
    """The mean over the sets above chance, in points, with its interval over
    classes.
    """
    by_set = compared(heads_runs()[ours], heads_runs()[theirs], frozen_sets())
    mean = mean_of_sets(by_set.values())
    assert mean is not None
    low, high = mean.over_classes
    return Lead(100 * mean.mean, 100 * low, 100 * high)


def _factor_panels() -> list[Panel]:
    """The base world, then one changed thing a row."""
    changes: dict[str, dict[str, float]] = {
        "the base world": {},
        "2,000 pairs": {"pool": 2_000},
        "16,000 pairs": {"pool": 16_000},
        "a stream of fresh pairs": {"pool": 128_000},
        "batches of 32": {"batch": 32},
        "batches of 512": {"batch": 512},
        "25% of the factors named": {"named": 0.25},
        "100% of the factors named": {"named": 1.0},
        "factors correlated, 0.4": {"correlation": 0.4},
        "factors correlated, 0.8": {"correlation": 0.8},
    }
    panels = []
    for share, title in ((0.0, "right captions"), (0.4, "40 % wrong captions")):
        rows = {
            label: {
                method: _factor_lead(_wrong(share, **change), method)
                for method in COMPARED
            }
            for label, change in changes.items()
        }
        panels.append(Panel(title, rows))
    return panels


def _factor_lead(where: World, method: str) -> Lead:
    gaps = [100 * gap for gap in factor_gaps(where, method)]
    return Lead(statistics.mean(gaps), *t_interval(gaps))
