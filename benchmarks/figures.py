"""Numbers of README.md and of the pages named below, from the records that benchmarks
and studies left.

``python -m benchmarks.figures`` writes them. With ``--check`` it names the pages that
differ, and ends with 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.factors import tables as factors
from benchmarks.frozen import tables as frozen
from benchmarks.pictograms import tables as pictograms
from benchmarks.studies.front import FIGURES, lines_of
from benchmarks.studies.pages import replaced, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLEANED = RESULTS / "suspects" / "cleaned.jsonl"
Record = dict[str, Any]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}".rstrip(".")


def ratio(shown: str, value: float | None) -> str:
    return shown if value is None else f"{shown} ({value:.2f})"


def objective(record: Record) -> str:
    """Time and memory of each contender at some sizes, next to the plain form's."""
    lines = []
    for row in record["rows"]:
        if row["name"] != "GEMM" and row["n"] in (512, 4096, 32768):
            memory = row.get("extra_bytes")
            held = (
                "–"
                if memory is None
                else ratio(number(memory / 1e6), row.get("memory_ratio"))
            )
            lines.append(
                [
                    f"{row['n']:,}",
                    row["name"],
                    ratio(number(row["median_s"]), row.get("time_ratio")),
                    held,
                ]
            )
    return table(["N", "what", "s (÷ plain)", "MB (÷ plain)"], lines)


def data(record: Record) -> str:
    lines = [
        [
            row["data"],
            row["name"],
            *(ratio(number(row[key]), row.get(f"{key}_ratio")) for key in _RATES),
        ]
        for row in record["rows"]
        if row["workers"] == 2 and row["name"] in ("cloob", "open_clip_train")
    ]
    return table(
        ["pictures", "what", "samples/s (ratio)", "samples/CPU s (ratio)"], lines
    )


def train_step(record: Record) -> str:
    """Images a second of whole trainings, with the ratios of the same rounds."""
    peers = list(
        dict.fromkeys(
            key for row in record["rows"] for key in row if key.startswith("ratio_")
        )
    )
    lines = [
        [
            row["name"],
            number(row["images_per_second"]),
            *(f"{row[p]:.2f}" if p in row else "–" for p in peers),
        ]
        for row in record["rows"]
    ]
    return table(
        ["what", "images/s", *(f"÷ {p.removeprefix('ratio_')}" for p in peers)], lines
    )


def evaluate(record: Record) -> str:
    lines = []
    for row in record["rows"]:
        ours, theirs = (
            number(row["command"][name]["median_s"])
            for name in ("cloob", "clip_benchmark")
        )
        lines.append([row["case"], ours, theirs, f"{row['command']['ratio']:.2f}"])
    return table(["case", "cloob, s", "CLIP_benchmark, s", "theirs ÷ ours"], lines)


_RATES = ("per_second", "per_cpu_second")
SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "objective": ("python benchmarks/objective.py", objective),
    "data": ("python benchmarks/data.py --data DIR/pictograms/train", data),
    "train_step": (
        "python benchmarks/train_step.py --data DIR/pictograms/train",
        train_step,
    ),
    "evaluate": ("python benchmarks/evaluate.py --data DIR/zeroshot", evaluate),
}
"""By the folder of the record: the command, and what makes a table of the record."""


def machine(record: Record) -> str:
    """Processor, cores, version of torch and load, as the record names them."""
    found = [
        about
        for about in (
            record.get("machine"),
            *(row.get("machine") for row in record["rows"]),
        )
        if about
    ]
    about: Mapping[str, Any] = found[0]
    loads = sorted(
        each[key] for each in found for key in ("load_average", "load") if key in each
    )
    parts = [str(about["cpu"]), f"{about['cores']} cores", f"torch {about['torch']}"]
    return ", ".join(
        [*parts, f"load {loads[0]:.3g} to {loads[-1]:.3g}"] if loads else parts
    )


def results(name: str, file: str = "results") -> Record:
    record: Record = json.loads(
        (RESULTS / name / f"{file}.json").read_text(encoding="utf-8")
    )
    return record


def row_of(of: str, **values: object) -> Record:
    """The row of a record with these values."""
    found: Record = next(
        each for each in results(of)["rows"] if values.items() <= each.items()
    )
    return found


def over_ranks(name: str) -> str:
    """Operations of a rank ÷ those of one process, on 1, 2 and 4 ranks."""
    one, *several = (row_of("ranks", name=name, ranks=n)["flops"] for n in (1, 2, 4))
    return f"1, {several[0] / one:.2g} and {several[1] / one:.2g}"


def activations(pairs: int) -> str:
    found = row_of("gradient_cache", micro_batch_size=pairs)
    return (
        f"{found['activations'] / 1e6:,.0f} MB of activations and"
        f" {found['seconds']:.2f} s"
    )


def rounding(kind: str) -> float:
    """The largest relative error of a gradient."""
    return max(float(each[kind]) for each in results("precision")["rows"])


def indexing(pictures: str, what: str) -> str:
    return f"{results('search')['index'][pictures][what]['median']:.1f}"


def queries() -> str:
    lines = []
    for n, found in results("search")["query"]["sizes"].items():
        exact, postgres = found["cloob exact"], found.get("PostgreSQL")
        shown = (
            f"{postgres['p50_ms']:.1f} ({postgres['recall_at_10']:.3f})"
            if postgres
            else ""
        )
        lines.append(
            [
                f"{int(n):,}",
                f"{number(exact['p50_ms'])}",
                shown,
                f"{exact['own_bytes'] / 1e6:.0f}",
            ]
        )
    return table(
        [
            "vectors",
            "exact, p50 ms",
            "PostgreSQL, p50 ms (recall@10)",
            "memory MB, exact",
        ],
        lines,
    )


def photos() -> str:
    """How long 20,000 pictures take with a ViT-B-32, on the faster and the slower of
    two machines.
    """
    record = json.loads(
        (RESULTS / "search" / "results.json").read_text(encoding="utf-8")
    )["index"]
    newest = json.loads(
        (ROOT / "benchmarks" / "results.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[-1]
    )
    minutes = {
        kind: sorted(
            20_000 / rate / 60
            for rate in (record[kind]["cloob"]["median"], newest["figures"][figure])
        )
        for kind, figure in (
            ("web", "index, web: pictures a second"),
            ("camera", "index, camera: pictures a second"),
        )
    }
    web, camera = (f"{low:.0f} to {high:.0f}" for low, high in minutes.values())
    return f"{web} minutes at 640 × 480, {camera} minutes as a camera writes them"


def hopfield_cost() -> str:
    """The time of CLOOB's loss, of its formula as written and of ClipLoss, N =
    4,096.
    """
    rows = json.loads(
        (RESULTS / "objective" / "results.json").read_text(encoding="utf-8")
    )["rows"]
    seconds = {row["name"]: row["median_s"] for row in rows if row["n"] == 4096}
    return (
        f"{seconds['streamed']:.1f} s at N = 4,096 on a CPU, {seconds['plain']:.1f} s"
        f" as written, {seconds['ClipLoss']:.1f} s open_clip's `ClipLoss`"
    )


def suspected(**values: object) -> str:
    """How often a wrong pair scores below a right one, in %, where a record has these
    values.
    """
    lines = (
        (RESULTS / "suspects" / "records.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    found = [
        r["auc"]
        for r in map(json.loads, lines)
        if r.get("auc") and values.items() <= ({"errors": None} | r).items()
    ]
    return (
        " to ".join(
            dict.fromkeys(f"{100 * auc:.0f}" for auc in (min(found), max(found)))
        )
        + " %"
    )


_ARMS = ("all", "cleaned", "right")


def cleaned(arm: str) -> str:
    values = {"set": "molecules", "share": 0.4, "arm": arm, "objective": "infoloob"}
    return next(
        f"{100 * r['recall']:.1f} %"
        for r in lines_of(CLEANED)
        if values.items() <= r.items()
    )


def reached() -> str:
    """How much of the right pairs' recall@1 cleaning reaches with 40 % wrong pairs, and
    in how many sets 90 %.
    """
    runs = [r for r in lines_of(CLEANED) if r["share"] == 0.4]
    words = []
    for objective, name in (("infoloob", "InfoLOOB"), ("cca", "the closed form")):
        recalls = {
            arm: [
                r["recall"]
                for r in runs
                if (r["arm"], r["objective"]) == (arm, objective)
            ]
            for arm in _ARMS
        }
        shares = [
            100 * some / right
            for some, right in zip(recalls["cleaned"], recalls["right"], strict=True)
        ]
        enough = (
            f"90 % or more in {sum(share >= 90 for share in shares)} of {len(shares)}"
            " sets"
        )
        words.append(f"{name} {min(shares):.0f} to {max(shares):.0f} % ({enough})")
    return " and ".join(words)


_TOWERS = {
    "ReLU": "three layers, each with a ReLU",
    "Linear-GELU-Linear": "Linear-GELU-Linear",
    "cloob.Head, fitted": '`cloob.Head` of kind `"mlp"`, fitted',
}


def cone() -> str:
    """Recall by towers and objective, a number a seed."""
    lines = []
    for towers, shown in _TOWERS.items():
        runs = [run for run in results("cone")["runs"] if run["towers"] == towers]
        cosines = sorted(f"{cosine:.2f}" for run in runs for cosine in run["cosines"])
        recalls = [
            ", ".join(f"{r['recall']:.0f}" for r in runs if r["objective"] == o)
            for o in ("cloob", "infoloob")
        ]
        lines.append(
            [shown, " to ".join(dict.fromkeys((cosines[0], cosines[-1]))), *recalls]
        )
    return table(["towers", "mean cosine at the start", "CLOOB", "InfoLOOB"], lines)


def export_cost() -> str:
    """Milliseconds of both towers, the size of the files and the first text of a
    process, by form and model.
    """
    models = results("export")["models"]
    lines = []
    for form in models["RN50"]["forms"]:
        row = [form.replace(" int8", " `--int8`")]
        for model in models.values():
            of = model["forms"][form]
            row += [
                number(of["image_ms"]),
                number(of["text_ms"]),
                f"{of['megabytes']:.0f} MB",
            ]
        first = models["ViT-B-32"]["first_text_s"].get(f"{form}, cloob.load_model")
        lines.append([*row, "" if first is None else f"{first:.2f} s"])
    head = [
        "",
        "ViT-B-32 picture",
        "text",
        "files",
        "RN50 picture",
        "text",
        "files",
        "first text, ViT-B-32",
    ]
    return table(head, lines)


def loading(what: str) -> str:
    """Least and most of all families: our seconds ÷ those of another loader, or the
    memory ÷ the weights of one.
    """
    families = results("weights")["families"].values()
    of = {
        "seconds": [
            each["cloob"]["seconds"] / each["other"]["seconds"] for each in families
        ],
        "memory": [each["cloob"]["peak_over_weights"] for each in families],
        "others": [each["other"]["peak_over_weights"] for each in families],
    }[what]
    return f"{min(of):.2f} to {max(of):.2f}"


def power(value: float) -> str:
    """A number as 1.2 × 10³."""
    digits, exponent = f"{value:.1e}".split("e")
    return (
        f"{digits} ×"
        f" 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def training_cost() -> str:
    """What the paper's recipes compute, counted; the commands take the ResNets with
    QuickGELU.
    """
    suffixed = r"\1-quickgelu"
    lines = [
        [
            f"`{re.sub('(RN.*)', suffixed, name)}`"
            + (" (RN50)" if " " not in name else ""),
            f"{recipe['image_size']}",
            f"{recipe['steps']:,}",
            *(
                power(recipe[key])
                for key in ("pairs_seen", "tower_flops_a_pair", "total_flops")
            ),
        ]
        for name, recipe in results("train_cost")["recipes"].items()
    ]
    return table(
        [
            "recipe",
            "pixels",
            "steps",
            "pairs seen",
            "operations a pair",
            "operations in all",
        ],
        lines,
    )


def training_time() -> str:
    """Hours of two recipes on eight GPUs of 10¹⁴ operations a second, and the pictures
    a second that they then take.
    """
    recipes = results("train_cost")["recipes"]
    rate = 8e14 / recipes["cc3m"]["tower_flops_a_pair"]
    small, large = (
        recipes[name]["total_flops"] / 8e14 / 3600 for name in ("cc3m", "yfcc")
    )
    return (
        f"`cc3m` takes {small:.1f} hours and `yfcc` {large:.0f}, at"
        f" {round(rate, -2):,.0f} pictures a second"
    )


def accepted(what: str) -> str:
    """The share of queries that have hits at the usual cutoff."""
    record = results("cutoff")
    row = next(each for each in record["rates"] if each["cutoff"] == record["default"])
    return f"{100 * row['accepted'][what]:.0f} %"


def small_batches(kind: str) -> str:
    """The relative error of a gradient in a narrow cone, 64 pairs, in %."""
    rows = results("precision", "small_batches")["rows"]
    low, high = next(
        row for row in rows if (row["similarity"], row["pairs"]) == (0.993, 64)
    )[kind]
    return (
        f"{100 * low:.1g} to {100 * high:.1g} %"
        if high < 0.001
        else f"{100 * low:.1f} to {100 * high:.1f} %"
    )


def stores() -> str:
    """Vectors in stores, by their number."""
    measured = results("search")["scale"]["rows"]
    version = measured["100000"]["LanceDB"]["version"].removesuffix(".0")
    names = {
        "cloob": "folder, exact",
        "PostgreSQL": "PostgreSQL, HNSW",
        "LanceDB": f"LanceDB {version} alone, IVF_PQ",
    }
    lines = []
    for n, rows in measured.items():
        for of, shown in (
            (rows[key], shown) for key, shown in names.items() if key in rows
        ):
            cells = [
                f"{of['bytes'] / int(n):,.0f}",
                *(f"{of[key]:,.1f}" for key in ("write", "build", "search")),
            ]
            lines.append([f"{int(n):,}", shown, *cells, f"{of['recall_at_10']:.3f}"])
    return table(
        [
            "rows",
            "store",
            "bytes a row",
            "write",
            "build",
            "a query, CPU ms",
            "recall@10",
        ],
        lines,
    )


def heads_time() -> str:
    """CPU time of a fit ÷ that of a plain loop."""
    ratios = sorted(
        r["estimator"]["cpu_seconds"] / r["plain"]["cpu_seconds"]
        for r in results("vectors")["runs"]
    )
    return (
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} (median {ratios[len(ratios) // 2]:.2f},"
        f" {len(ratios)} runs)"
    )


def heads_memory() -> str:
    mapped = {
        int(pairs): of["anonymous_mib"]
        for pairs, of in results("vectors")["mapped"].items()
    }
    least, most = mapped
    return (
        f"{mapped[least]} MiB with {least:,} pairs of 512 float16 numbers, and"
        f" {mapped[most]} MiB with {most:,} (files of {most * 512 * 4 / 1e9:.0f} GB)"
    )


PROSE: dict[str, Callable[[], str]] = {
    "photos": photos,
    "hopfield-cost": hopfield_cost,
    **{
        f"ranks-{name}": functools.partial(over_ranks, name)
        for name in ("cloob", "clip")
    },
    **{f"activations-{n}": functools.partial(activations, n) for n in (0, 32)},
    "rounding-plain": lambda: f"{100 * rounding('plain float32'):.0f} %",
    "rounding-streamed": lambda: f"{rounding('streamed float32'):.1e}".replace(
        "e-0", "e-"
    ),
    "rounding-bf16": lambda: f"{100 * rounding('streamed bfloat16'):.1f} %",
    "padding-resnet": lambda: (
        f"{row_of('text_padding', tower='resnet, text context 77')['ratio']:.2f}"
    ),
    "padding-vit": lambda: f"{row_of('text_padding', tower='ViT-B-32')['ratio']:.2f}",
    "ranks-memory": lambda: (
        f"{row_of('retrieval', n=100_000)['peak_bytes'] / 1e9:.2f} GB"
    ),
    "ranks-seconds": lambda: f"{row_of('retrieval', n=100_000)['seconds']:.0f} s",
    **{
        f"index-{pictures}-{what}": functools.partial(indexing, pictures, what)
        for pictures in ("web", "camera")
        for what in ("cloob", "loop", "forward")
    },
    "queries": queries,
    "export-cost": export_cost,
    **{
        f"loading-{what}": functools.partial(loading, what)
        for what in ("seconds", "memory", "others")
    },
    "training-cost": training_cost,
    "training-time": training_time,
    **{
        f"cutoff-{what}": functools.partial(accepted, what)
        for what in ("present", "near", "far")
    },
    **{
        f"small-{kind}": functools.partial(small_batches, f"{kind} float32")
        for kind in ("plain", "streamed")
    },
    "stores": stores,
    "heads-time": heads_time,
    "heads-memory": heads_memory,
    "cone": cone,
    "suspects-5000": lambda: suspected(pairs=5000, set="pictograms", errors=None),
    "suspects-43276": lambda: suspected(pairs=43_276),
    "suspects-names": lambda: suspected(errors="a file's name"),
    "suspects-cut": lambda: suspected(errors="cut"),
    "suspects-near": lambda: (
        suspected(errors="a word changed")[:3]
        + "to "
        + suspected(errors="a neighbour's caption")
    ),
    **{f"clean-{arm}": functools.partial(cleaned, arm) for arm in _ARMS},
    "clean-reached": reached,
    "start-help": lambda: f"{row_of('start', name='cloob --help')['seconds']:.3f} s",
    "start-mistake": lambda: (
        f"{row_of('start', name='cloob train, a mistake')['seconds']:.2f} s"
    ),
    "start-torch": lambda: f"{row_of('start', name='import torch')['seconds']:.2f} s",
}
"""Numbers of the pages' text, by the name in their marks."""


def speed(text: str) -> str:
    for name, (command, tables) in SECTIONS.items():
        record = results(name)
        link = f"[record](../benchmarks/results/{name}/results.json)"
        section = f"`{command}` ({link}): {machine(record)}.\n\n{tables(record)}"
        text = replaced(
            text,
            section,
            f"<!-- figures-{name}:begin -->",
            f"<!-- figures-{name}:end -->",
        )
    return marked(text)


def marked(text: str) -> str:
    """The page with what the records give between the marks of each figure."""

    def written(mark: re.Match[str]) -> str:
        figure = (FIGURES | PROSE)[mark[2]]()
        return (
            f"{mark[1]}\n{figure}\n{mark[3]}"
            if "\n" in figure
            else f"{mark[1]}{figure}{mark[3]}"
        )

    return re.sub(
        r"(<!-- figure (\S+) -->).*?(<!-- /figure -->)", written, text, flags=re.DOTALL
    )


PAGES: dict[str, Callable[[str], str]] = {
    "README.md": marked,
    "docs/study.md": marked,
    "docs/choose.md": marked,
    **{
        f"docs/{page}.md": marked
        for page in ("vectors", "export", "weights", "reproduce", "find", "scale-out")
    },
    "docs/data.md": marked,
    "docs/own-loop.md": marked,
    "docs/speed.md": speed,
    "benchmarks/README.md": marked,
    "benchmarks/frozen/claim.md": marked,
    "benchmarks/frozen/tables.md": frozen.filled,
    "benchmarks/pictograms/tables.md": pictograms.filled,
    "benchmarks/factors/tables.md": factors.filled,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, differ = parser.parse_args().check, []
    for page, filled in PAGES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            differ.append(page)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and differ:
        sys.exit(f"not what the records give: {', '.join(differ)}")


if __name__ == "__main__":
    main()
