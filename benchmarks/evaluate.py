"""``cloob eval`` beside CLIP_benchmark: the same model on the same five sets, whole
commands.

``python benchmarks/evaluate.py --data FOLDER [--repeats 3]``. The cases:

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

Times are medians of interleaved repeats. CLIP_benchmark 1.6.2 cannot live beside our
numpy: benchmarks/overlay.py makes it an environment with the same torch, open_clip and
Pillow. Accuracies are compared too. Writes results.json to --out."""

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
from benchmarks.machine import machine
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
    words = f"-m cloob eval {model} --batch-size {BATCH} --workers {WORKERS}"
    options = ["--out", str(out), "--device", "cpu", "--zeroshot"]
    return [sys.executable, *words.split(), *options, *map(str, sets)]


def their_command(python: str, model: Path, sets: list[Path], out: Path) -> list[str]:
    words = (
        f"-m clip_benchmark.cli eval --model local-dir:{model} --pretrained random"
        f" --dataset_root {sets[0].parent}/{{dataset}} --output {out}/{{dataset}}.json"
        f" --quiet --no_amp --batch_size {BATCH} --num_workers {WORKERS} --dataset"
    )
    return [python, *words.split(), *(f"wds/{path.name}" for path in sets)]


def run(command: list[str], threads: int, out: Path) -> float:
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        # goes with the folder: a cache of earlier runs would have it all
        "CLOOB_CACHE": str(out / "cache"),
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
    sets = make_sets(args.data, work / "sets", names, images)
    seconds: dict[str, list[float]] = {}
    ours = work / "ours"
    theirs = work / "theirs"

    for _ in range(args.repeats):
        shutil.rmtree(ours, ignore_errors=True)
        commands = {
            "cloob": (our_command(model, sets, ours), ours),
            "clip_benchmark": (their_command(python, model, sets, theirs), theirs),
        }
        for row, (command, out) in commands.items():
            taken = run(command, args.threads, out)
            seconds.setdefault(row, []).append(taken)
            print(f"{case}: {row} {taken:.2f} s", file=sys.stderr, flush=True)
    medians = {tool: statistics.median(times) for tool, times in seconds.items()}
    command: dict[str, Any] = {
        tool: {"median_s": medians[tool], "all_s": times}
        for tool, times in seconds.items()
    }
    command["ratio"] = medians["clip_benchmark"] / medians["cloob"]
    return {
        "case": case,
        "model": name,
        "machine": machine("open_clip_torch"),
        "clip_benchmark": "1.6.2",
        "threads": args.threads,
        "command": command,
        "images_apart": images_apart(ours, theirs),
    }


def images_apart(ours: Path, theirs: Path) -> dict[str, float]:
    """By how many images of each set the two top-1 accuracies differ."""
    results = json.loads((ours / "results.json").read_text(encoding="utf-8"))
    apart = {}
    for name, numbers in results["rows"][0]["zeroshot"].items():
        other = json.loads((theirs / f"{name}.json").read_text(encoding="utf-8"))
        difference = numbers["acc1"] - other["metrics"]["acc1"]
        apart[name] = round(abs(difference) * numbers["n"], 3)
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "evaluate"
    )
    args = parser.parse_args()
    python = overlay(CLIP_BENCHMARK)
    with tempfile.TemporaryDirectory() as place:
        rows = [measure(case, python, args, Path(place) / case) for case in CASES]
    args.out.mkdir(parents=True, exist_ok=True)
    written = json.dumps({"rows": rows}, indent=1) + "\n"
    (args.out / "results.json").write_text(written, encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
