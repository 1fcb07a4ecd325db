"""``cloob eval`` beside CLIP_benchmark: the same model on the same five sets, whole
commands.

``python benchmarks/evaluate.py [--cases tiny-first tiny-few large-few] [--repeats 3]
[--quick]``. The cases:

- ``tiny-first``: the tiny ResNet on the first five pictogram sets by name, whole;
- ``tiny-few``: the same on the five sets of the fewest classes, 240 images each: little
  but start-up;
- ``large-few``: ViT-B-32 there: little but the image tower, which is the same for both.

Both tools get the same model folder (random weights), the same WebDataset folders (all
classes and templates), float32, the same batch size, one decoding worker (a set of one
shard gives CLIP_benchmark's loader no more) and the same number of threads. A row is
the seconds of one process, imports and files included, with all five sets in one
command. Ours starts with an empty cache, and also writes the report and the classes'
CSV, with intervals. (The record has two more rows, from this script at commit
fc415074.)

Times are medians of interleaved repeats: ``--repeats`` of them, or two where more would
take over ``--budget`` seconds. CLIP_benchmark 1.6.2 cannot live beside our numpy:
benchmarks/overlay.py makes it an environment with the same torch, open_clip and Pillow.
Accuracies are compared too. Writes results.json to --out, in which the rows of cases
that were not measured now stay."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.figures import evaluate as table
from benchmarks.machine import machine as this_machine
from benchmarks.overlay import CLIP_BENCHMARK, overlay

FIRST = ("animal-silhouettes", "digits", "flags", "fluent3d-emoji", "noto-emoji")
FEW = (
    "animal-silhouettes",
    "digits",
    "road-signs",
    "tuxpaint-photos",
    "twemoji-activities",
)
CASES = {
    "tiny-first": ("tiny-resnet", FIRST, 1_000_000),
    "tiny-few": ("tiny-resnet", FEW, 240),
    "large-few": ("ViT-B-32", FEW, 240),
}
"""Name -> architecture, sets, images a set at most."""

BATCH = 64
WORKERS = 1


def make_sets(
    source: Path, folder: Path, names: tuple[str, ...], images: int
) -> list[Path]:
    """The first ``images`` images of each set, in CLIP_benchmark's layout."""
    made = []
    for name in names:
        target = folder / name
        (target / "test").mkdir(parents=True)
        for file in ("classnames.txt", "zeroshot_classification_templates.txt"):
            shutil.copyfile(source / name / file, target / file)
        (target / "test" / "nshards.txt").write_text("1")
        with (
            tarfile.open(source / name / "test" / "0.tar") as old,
            tarfile.open(target / "test" / "0.tar", "w") as new,
        ):
            keys: set[str] = set()
            for member in old:
                keys.add(member.name.partition(".")[0])
                if len(keys) > images:
                    break
                file = old.extractfile(member)
                new.addfile(member, io.BytesIO(file.read() if file else b""))
        made.append(target)
    return made


def make_model(name: str, folder: Path) -> Path:
    from cloob.models.folder import save_model
    from cloob.models.towers import create_model
    from cloob.objective import make_objective

    save_model(
        folder / name, create_model(name, seed=0), make_objective("cloob").config()
    )
    return folder / name


def our_command(model: Path, sets: list[Path], out: Path) -> list[str]:
    options = [
        "--out",
        str(out),
        "--batch-size",
        str(BATCH),
        "--workers",
        str(WORKERS),
        "--device",
        "cpu",
    ]
    return [
        sys.executable,
        "-m",
        "cloob",
        "eval",
        str(model),
        "--zeroshot",
        *map(str, sets),
        *options,
    ]


def their_options(model: Path, sets: list[Path], out: Path) -> list[str]:
    names = [f"wds/{path.name}" for path in sets]
    options = [
        "--dataset_root",
        str(sets[0].parent / "{dataset}"),
        "--output",
        str(out / "{dataset}.json"),
        "--quiet",
    ]
    options += [
        "--no_amp",
        "--batch_size",
        str(BATCH),
        "--num_workers",
        str(WORKERS),
        "--pretrained",
        "random",
    ]
    return ["eval", "--model", f"local-dir:{model}", "--dataset", *names, *options]


def run(command: list[str], threads: int, out: Path) -> float:
    out.mkdir(parents=True, exist_ok=True)
    cache = {
        "CLOOB_CACHE": str(out / "cache")
    }  # goes with the folder: a cache of earlier runs would have it all
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        **cache,
    }
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=out
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def measure(
    case: str, python: str, args: argparse.Namespace, work: Path
) -> dict[str, Any]:
    name, names, images = CASES[case]
    model = make_model(name, work / "models")
    sets = make_sets(args.data, work / "sets", names, min(images, args.images))
    seconds: dict[str, list[float]] = {}
    ours, theirs = work / "ours", work / "theirs"

    def note(row: str, taken: float) -> None:
        seconds.setdefault(row, []).append(taken)
        print(f"{case}: {row} {taken:.2f} s", file=sys.stderr, flush=True)

    started = time.perf_counter()
    for repeat in range(args.repeats):
        if (
            repeat > 1
            and (time.perf_counter() - started) * (repeat + 1) / repeat > args.budget
        ):
            break
        shutil.rmtree(ours, ignore_errors=True)
        note("cloob", run(our_command(model, sets, ours), args.threads, ours))
        command = [
            python,
            "-m",
            "clip_benchmark.cli",
            *their_options(model, sets, theirs),
        ]
        note("clip_benchmark", run(command, args.threads, theirs))
    apart = images_apart(ours, theirs)
    about = {
        "case": case,
        "model": name,
        "n": {key: found[0] for key, found in apart.items()},
        "machine": machine(args),
    }
    return {
        **about,
        **summary(seconds),
        "images_apart": {key: found[1] for key, found in apart.items()},
    }


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, minima, and how many times as long CLIP_benchmark takes (of the medians,
    and in each repeat).
    """
    found: dict[str, Any] = {
        tool: {"median_s": statistics.median(t), "min_s": min(t), "all_s": t}
        for tool, t in seconds.items()
    }
    a, b = seconds["cloob"], seconds["clip_benchmark"]
    found["ratio"] = statistics.median(b) / statistics.median(a)
    found["ratios"] = [theirs / ours for ours, theirs in zip(a, b, strict=True)]
    return {"command": found}


def images_apart(ours: Path, theirs: Path) -> dict[str, tuple[int, float]]:
    """Images of each set, and by how many of them the two top-1 accuracies differ."""
    zeroshot = json.loads((ours / "results.json").read_text(encoding="utf-8"))["rows"][
        0
    ]["zeroshot"]
    found = {}
    for name, numbers in zeroshot.items():
        other = json.loads((theirs / f"{name}.json").read_text(encoding="utf-8"))[
            "metrics"
        ]
        found[name] = (
            numbers["n"],
            round(abs(numbers["acc1"] - other["acc1"]) * numbers["n"], 3),
        )
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    settings = {"threads": args.threads, "batch_size": BATCH, "workers": WORKERS}
    return {**this_machine("open_clip_torch"), "clip_benchmark": "1.6.2", **settings}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "zeroshot",
    )
    parser.add_argument(
        "--images", type=int, default=1_000_000, help="images a set, at most"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--budget",
        type=float,
        default=300.0,
        help="seconds that a case's repeats may take",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--quick", action="store_true", help="tiny-few with 40 images a set, once"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "evaluate"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.quick:
        args.cases, args.images, args.repeats = ["tiny-few"], 40, 1
    if not args.data.is_dir():
        raise SystemExit(
            f"{args.data}: no such folder; --data names the folder of the pictogram"
            " sets"
        )
    python, file = overlay(CLIP_BENCHMARK), args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = (
        json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    )
    with tempfile.TemporaryDirectory() as place:
        for case in args.cases:
            row = measure(case, python, args, Path(place) / case)
            rows = [*(other for other in rows if other["case"] != case), row]
            file.write_text(
                json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
    print(table(rows))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
