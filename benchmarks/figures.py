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
from pathlib import Path
from typing import Any

from benchmarks.studies import figures as studies
from benchmarks.studies.pages import marked, points, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AUTO = RESULTS / "auto" / "members.jsonl"
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
Recalls = dict[str, list[float]]
"""Method -> recall@1 and @10 in %."""


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


ALONE = {
    "infoloob": "InfoLOOB",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "cloob": "CLOOB",
    "cca": "closed form",
}


def auto_tasks() -> dict[str, list[Recalls]]:
    """The recalls of each task and seed; a seed's best of cca-zoo's as ``zoo``."""
    tasks: dict[str, list[Recalls]] = {}
    for record in lines_of(AUTO):
        recalls = {
            name: [100 * value for value in values]
            for name, values in record["recall"].items()
        }
        recalls["gallery"] = [record["test"]]
        of_zoo = [recalls[name] for name in recalls if name.startswith("cca-zoo")]
        recalls["zoo"] = max(of_zoo)
        name = record["task"].replace(" ×", " and")
        if record["wrong"]:
            name += f", {100 * record['wrong']:.0f} % wrong"
        tasks.setdefault(name, []).append(recalls)
    return tasks


def _mean(seeds: list[Recalls], method: str, place: int = 0) -> float:
    return statistics.mean(recalls[method][place] for recalls in seeds)


def auto_table() -> str:
    """Recall@1 of `auto` and of what it chooses from, and of others' methods; means
    over seeds.
    """
    methods = ("auto", *ALONE, "zoo", "plain loop")
    lines = []
    for task, seeds in auto_tasks().items():
        gallery = f"{seeds[0]['gallery'][0]:,}"
        means = [f"{_mean(seeds, method):.1f}" for method in methods]
        lines.append([task, gallery, *means, str(len(seeds))])
    head = ["", "gallery", "`auto`", *ALONE.values(), "cca-zoo", "plain loop", "seeds"]
    return table(head, lines)


def auto_verdict() -> str:
    """How often `auto` is near the best single objective, and ahead of it."""
    gaps = []
    for seeds in auto_tasks().values():
        best = max(_mean(seeds, name) for name in ALONE)
        gaps.append(_mean(seeds, "auto") - best)
    near = sum(gap >= -0.5 for gap in gaps)
    ahead = sum(gap > 0 for gap in gaps)
    return (
        f"within 0.5 points of the best single one in {near} of {len(gaps)}, and ahead"
        f" in {ahead}"
    )


def auto_losses() -> str:
    """Where recall@10 is below InfoLOOB's."""
    losses = []
    for task, seeds in auto_tasks().items():
        ours, infoloob = (_mean(seeds, name, 1) for name in ("auto", "infoloob"))
        if ours < infoloob:
            losses.append(f"{task} ({infoloob:.1f} to {ours:.1f})")
    return ", ".join(losses) or "none"


def auto_cost() -> str:
    """How many times as long as InfoLOOB it takes."""
    seconds = [record["cpu_seconds"] for record in lines_of(AUTO)]
    times = [by_method["auto"] / by_method["infoloob"] for by_method in seconds]
    above = sum(time > 3 for time in times)
    return (
        f"{min(times):.1f} to {max(times):.1f} times InfoLOOB's CPU time (median"
        f" {statistics.median(times):.1f}, above 3 in {above} of {len(times)} runs)"
    )


def hubs() -> str:
    """What the bias against hubs alone does to recall@1 and @10 of InfoLOOB's heads and
    the closed form, in points.
    """
    runs = [record for record in lines_of(AUTO) if "hubs" in record]
    words = []
    for place, name in enumerate(("recall@1", "recall@10")):
        gains = [
            with_bias[place] - run["recall"][method][place]
            for run in runs
            for method, with_bias in run["hubs"].items()
        ]
        words.append(
            f"{name} {points(min(gains))} to {points(max(gains))}, median"
            f" {points(statistics.median(gains))}"
        )
    return "; ".join(words)


def molecules(method: str) -> str:
    """Recall@1 of molecules and names with right pairs: a method − CLIP, mean over
    seeds.
    """
    gaps = [
        record["recall"][method][0] - record["recall"]["clip"][0]
        for record in lines_of(AUTO)
        if record["task"] == "molecules × names" and not record["wrong"]
    ]
    return points(statistics.mean(gaps))


def helps() -> str:
    return studies.helps({m: molecules(m) for m in ("cloob", "infoloob", "cca")})


def figures() -> dict[str, Callable[[], str]]:
    """By its name, what stands between the marks of a page."""
    found: dict[str, Callable[[], str]] = {
        **studies.figures(),
        "helps": helps,
        "auto": auto_table,
        "auto-verdict": auto_verdict,
        "auto-losses": auto_losses,
        "auto-cost": auto_cost,
        "auto-hubs": hubs,
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
    found["molecules-cloob"] = functools.partial(molecules, "cloob")
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
