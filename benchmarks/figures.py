"""Writes the numbers of README.md and of the docs from the records that benchmarks and
studies left.

    python -m benchmarks.figures             # writes pages and drawings
    python -m benchmarks.figures --check     # names the pages that differ; ends with 1

A number stands between ``<!-- figure NAME -->`` and ``<!-- /figure -->``.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies import figures as studies
from benchmarks.studies.pages import marked, points, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AUTO = RESULTS / "auto" / "study.jsonl"
CLEANED = RESULTS / "suspects" / "cleaned.jsonl"
SUSPECTS = RESULTS / "suspects" / "records.jsonl"
NEIGHBOUR = "a neighbour's caption"
PAGES = (
    "README.md",
    "benchmarks/README.md",
    "docs/study.md",
    "docs/study-closed-form.md",
    "docs/choose.md",
    "docs/auto.md",
    "docs/vectors.md",
    "docs/wrong-pairs.md",
    "docs/data.md",
    "docs/speed.md",
)
Record = dict[str, Any]


def results(name: str) -> Record:
    path = RESULTS / name / "results.json"
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def lines_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def objective(rows: list[Record]) -> str:
    """Time and memory of each contender at some sizes, next to the plain form's."""
    lines = []
    for row in rows:
        if row["name"] == "GEMM" or row["n"] not in (512, 4096, 32768):
            continue
        memory = "–"
        if row.get("extra_bytes") is not None:
            memory = number(row["extra_bytes"] / 1e6)
        seconds = [number(row["median_s"]), ratio(row.get("time_ratio"))]
        ratios = [*seconds, memory, ratio(row.get("memory_ratio"))]
        lines.append([f"{row['n']:,}", row["name"], *ratios])
    return table(["N", "what", "s", "÷ plain", "MB", "÷ plain"], lines)


def data(rows: list[Record]) -> str:
    lines = []
    for row in rows:
        if row["workers"] == 2 and row["name"] in ("cloob", "open_clip_train"):
            rates = []
            for key in ("per_second", "per_cpu_second"):
                rates += [number(row[key]), ratio(row[f"{key}_ratio"])]
            lines.append([row["data"], row["name"], *rates])
    head = ["pictures", "what", "samples/s", "÷ theirs", "samples/CPU s", "÷ theirs"]
    return table(head, lines)


def train_step(rows: list[Record]) -> str:
    """Images a second of whole trainings, with the ratios of the same rounds."""
    peers = dict.fromkeys(key for row in rows for key in row if key[:6] == "ratio_")
    lines = []
    for row in rows:
        ratios = [ratio(row.get(peer)) for peer in peers]
        lines.append([row["name"], number(row["images_per_second"]), *ratios])
    return table(["what", "images/s", *(f"÷ {peer[6:]}" for peer in peers)], lines)


def evaluate(rows: list[Record]) -> str:
    lines = []
    for row in rows:
        command = row["command"]
        ours = number(command["cloob"]["median_s"])
        theirs = number(command["clip_benchmark"]["median_s"])
        lines.append([row["case"], ours, theirs, f"{command['ratio']:.2f}"])
    return table(["case", "cloob, s", "CLIP_benchmark, s", "theirs ÷ ours"], lines)


def machine(name: str) -> str:
    """Processor, cores, version of torch and load, as the record names them."""
    record = results(name)
    described = [record.get("machine"), *(row.get("machine") for row in record["rows"])]
    known = [about for about in described if about]
    about: Mapping[str, Any] = known[0]
    parts = [str(about["cpu"]), f"{about['cores']} cores", f"torch {about['torch']}"]
    keys = ("load_average", "load")
    loads = sorted(each[key] for each in known for key in keys if key in each)
    if loads:
        parts.append(f"load {loads[0]:.3g} to {loads[-1]:.3g}")
    return ", ".join(parts)


def indexing(pictures: str, what: str) -> str:
    return f"{results('search')['index'][pictures][what]['median']:.1f}"


def start(name: str, digits: int) -> str:
    rows = results("start")["rows"]
    found = next(row for row in rows if row["name"] == name)
    return f"{found['seconds']:.{digits}f} s"


def heads_time() -> str:
    """CPU time of a fit ÷ that of a plain loop."""
    ratios = sorted(
        run["estimator"]["cpu_seconds"] / run["plain"]["cpu_seconds"]
        for run in results("vectors")["runs"]
    )
    middle = ratios[len(ratios) // 2]
    return (
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} (median {middle:.2f}, {len(ratios)} runs)"
    )


def heads_memory() -> str:
    mapped = results("vectors")["mapped"]
    fewest, most = sorted(mapped, key=int)
    gigabytes = int(most) * 512 * 4 / 1e9
    return (
        f"{mapped[fewest]['anonymous_mib']} MiB with {int(fewest):,} pairs of 512"
        f" float16 numbers, and {mapped[most]['anonymous_mib']} MiB with"
        f" {int(most):,} (files of {gigabytes:.0f} GB)"
    )


def suspected(**values: object) -> str:
    """How often a wrong pair scores below a right one, in %, where a record has these
    values.
    """
    found = []
    for record in lines_of(SUSPECTS):
        described = {"errors": None, **record}
        if record.get("auc") and values.items() <= described.items():
            found.append(record["auc"])
    ends = dict.fromkeys(f"{100 * auc:.0f}" for auc in (min(found), max(found)))
    return " to ".join(ends) + " %"


def suspected_near() -> str:
    """The same for captions that are nearly right."""
    word = suspected(errors="a word changed").removesuffix(" %")
    return f"{word} to {suspected(errors=NEIGHBOUR)}"


def cleaned(arm: str) -> str:
    """Recall@1 of InfoLOOB on the molecules with 40 % wrong pairs."""
    values = {"set": "molecules", "share": 0.4, "arm": arm, "objective": "infoloob"}
    found = [run for run in lines_of(CLEANED) if values.items() <= run.items()]
    return f"{100 * found[0]['recall']:.1f} %"


def reached() -> str:
    """How much of the right pairs' recall@1 cleaning reaches with 40 % wrong pairs, and
    in how many sets 90 %.
    """
    words = []
    for objective, name in (("infoloob", "InfoLOOB"), ("cca", "the closed form")):
        recalls: dict[str, list[float]] = {"cleaned": [], "right": [], "all": []}
        for run in lines_of(CLEANED):
            if run["share"] == 0.4 and run["objective"] == objective:
                recalls[run["arm"]].append(run["recall"])
        pairs = zip(recalls["cleaned"], recalls["right"], strict=True)
        shares = [100 * ours / right for ours, right in pairs]
        enough = sum(share >= 90 for share in shares)
        words.append(
            f"{name} {min(shares):.0f} to {max(shares):.0f} %"
            f" (90 % or more in {enough} of {len(shares)} sets)"
        )
    return " and ".join(words)


METHODS = {
    "auto": "`auto`",
    "infoloob": "InfoLOOB",
    "clip": "CLIP",
    "cloob": "CLOOB",
    "cca": "`cca`",
    "kcca": "`kcca`",
    "ridge": "ridge",
    "procrustes": "Procrustes",
    "pls": "PLS",
    "zoo": "cca-zoo",
    "loop": "loop",
}
"""Of the study of `auto`."""


@dataclass(frozen=True)
class Task:
    """A set with right or with wrong pairs, and its record of every seed."""

    name: str
    wrong: float
    seeds: list[Record]

    def recall(self, method: str) -> float:
        """Recall@1 in %, the mean of the seeds."""
        found = [record["recall"][method][0] for record in self.seeds]
        return 100 * statistics.mean(found)

    def best(self) -> str:
        """The method that finds most, `auto` left out."""
        return max([*METHODS][1:], key=self.recall)

    def lead(self) -> float:
        """What `auto` finds more than the best of the others, in points."""
        return round(self.recall("auto") - self.recall(self.best()), 1)

    def cost(self) -> float:
        """CPU time of `auto` over that of InfoLOOB."""
        times = [record["cpu_seconds"] for record in self.seeds]
        return statistics.median(time["auto"] / time["infoloob"] for time in times)


@functools.cache
def auto_tasks() -> list[Task]:
    """The tasks of which all seeds are there."""
    seeds: dict[tuple[str, float], list[Record]] = {}
    for record in lines_of(AUTO):
        seeds.setdefault((record["task"], record["wrong"]), []).append(record)
    whole = [
        (key, records) for key, records in sorted(seeds.items()) if len(records) == 3
    ]
    return [Task(*key, records) for key, records in whole]


def auto_table() -> str:
    """Recall@1 of all methods, and what `auto` is ahead of the best of the others."""
    lines = []
    for task in auto_tasks():
        name = task.name + (", 40 % wrong" if task.wrong else "")
        pairs = f"{task.seeds[0]['train']:,}"
        recalls = [f"{task.recall(method):.1f}" for method in METHODS]
        lines.append(
            [name, pairs, *recalls, points(task.lead() / 100), f"{task.cost():.1f}"]
        )
    return table(["", "pairs", *METHODS.values(), "lead", "CPU"], lines)


def auto_verdict() -> str:
    """How often `auto` is near the best of the others, ahead of it, and far behind."""
    leads = [task.lead() for task in auto_tasks()]
    near = sum(lead >= -0.5 for lead in leads)
    ahead = sum(lead > 0 for lead in leads)
    behind = sum(lead < -1.5 for lead in leads)
    return (
        f"within 0.5 points of the best other method in {near} of {len(leads)}, ahead"
        f" of all in {ahead}, and more than 1.5 points behind in {behind}"
    )


def auto_losses() -> str:
    """Where it is more than 1.5 points behind, and behind what."""
    far = [task for task in auto_tasks() if task.lead() < -1.5]
    words = []
    for task in far:
        name = task.name + (", 40 % wrong" if task.wrong else "")
        words.append(f"{name}: {points(task.lead() / 100)} to {METHODS[task.best()]}")
    return "; ".join(words) or "none"


def auto_cost() -> str:
    """How many times as long as InfoLOOB it takes."""
    costs = [task.cost() for task in auto_tasks()]
    return (
        f"{min(costs):.1f} to {max(costs):.1f} times InfoLOOB's CPU time (median"
        f" {statistics.median(costs):.1f})"
    )


def of_vectors(method: str) -> str:
    """Recall@1 with right pairs: a method − CLIP, mean over the sets."""
    right = [task for task in auto_tasks() if not task.wrong]
    leads = [task.recall(method) - task.recall("clip") for task in right]
    return points(statistics.mean(leads) / 100)


def helps() -> str:
    return studies.helps({m: of_vectors(m) for m in ("cloob", "infoloob", "cca")})


def figures() -> dict[str, Callable[[], str]]:
    """By its name, what stands between the marks of a page."""
    found: dict[str, Callable[[], str]] = {
        **studies.figures(),
        "helps": helps,
        "auto": auto_table,
        "auto-verdict": auto_verdict,
        "auto-losses": auto_losses,
        "auto-cost": auto_cost,
        "heads-time": heads_time,
        "heads-memory": heads_memory,
        "clean-reached": reached,
        "suspects-near": suspected_near,
        "suspects-5000": lambda: suspected(pairs=5000, set="pictograms", errors=None),
        "suspects-43276": lambda: suspected(pairs=43_276),
        "suspects-names": lambda: suspected(errors="a file's name"),
        "suspects-cut": lambda: suspected(errors="cut"),
        "start-help": lambda: start("cloob --help", 3),
        "start-mistake": lambda: start("cloob train, a mistake", 2),
        "start-torch": lambda: start("import torch", 2),
    }
    tables: dict[str, Callable[[list[Record]], str]] = {
        "objective": objective,
        "data": data,
        "train_step": train_step,
        "evaluate": evaluate,
    }
    for name, make_table in tables.items():
        mark = name.replace("_", "-")
        found[mark] = functools.partial(make_table, results(name)["rows"])
        found[f"machine-{mark}"] = functools.partial(machine, name)
    found["vectors-cloob"] = functools.partial(of_vectors, "cloob")
    for arm in ("all", "cleaned", "right"):
        found[f"clean-{arm}"] = functools.partial(cleaned, arm)
    for pictures in ("web", "camera"):
        for what in ("cloob", "loop", "forward"):
            name = f"index-{pictures}-{what}"
            found[name] = functools.partial(indexing, pictures, what)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    known = figures()
    differ = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        written = marked(text, known)
        if written == text:
            continue
        differ.append(page)
        if not check:
            path.write_text(written, encoding="utf-8")
    if not check:
        studies.draw(ROOT / "docs" / "images")
    elif differ:
        sys.exit(f"not what the records give: {', '.join(differ)}")


if __name__ == "__main__":
    main()
