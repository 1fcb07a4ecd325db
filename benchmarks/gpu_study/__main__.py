"""The study on one GPU: ``python -m benchmarks.gpu_study {build|run|table}``.

- ``build --data FOLDER --pack FILE`` makes the pack (55 MiB at most) from the pictograms;
- ``run --pack FILE --out FOLDER --minutes 25`` trains what has no record yet, in this order: tiny-resnet with CLIP and
  CLOOB, then a ViT-S/8 with both. A run that the time is not enough for keeps its state in ``--out`` and goes on when
  the command is given again: two calls of ten minutes do what one of twenty does;
- ``table --out FOLDER`` prints the records.

300 epochs of 43,276 pairs are 13.0 million pairs a run. The paper's Conceptual Captions run saw 89.6 million (175,000
steps of 512): ``--epochs 2071`` sees as many. Settings are the library's defaults, alike for all and not tuned.

It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("clip", "cloob")
TOWERS = ("tiny-resnet", "vit-s")


def plans(options: argparse.Namespace) -> list[Any]:
    """The runs, in the order in which they are done."""
    from benchmarks.gpu_study.runs import Plan

    shared = {"epochs": options.epochs, "batch": options.batch, "lr": options.lr, "precision": options.precision}
    return [
        Plan(tower, method, seed=seed, **shared)
        for seed in options.seeds
        for tower in options.towers
        for method in options.methods
    ]


def run(options: argparse.Namespace) -> int:
    """Trains until all is done or the time is over; exit code 0 if all is done."""
    import torch
    from benchmarks.gpu_study import data, pack, runs

    from cloob.models.towers import create_model

    until = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    sets = pack.read(options.pack)
    tokenizer = create_model(TOWERS[0], seed=0).tokenizer
    train, val = (data.pairs(sets[name], tokenizer, device) for name in pack.PAIRS)
    tests = data.test_sets(sets, device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{len(train):,} pairs and {len(tests)} test sets on {machine}", flush=True)
    for plan in plans(options):
        path = options.out / f"{plan.name}.json"
        if path.is_file() and asdict(plan).items() <= json.loads(path.read_text(encoding="utf-8")).items():
            continue
        one = runs.Run(plan, train, options.out / "state" / f"{plan.name}.pt")
        if not one.go(val, until):
            print(f"{plan.name}: {one.done} of {plan.epochs} epochs; the same command goes on with it", flush=True)
            return 3
        record = one.record(val, tests, machine)
        runs.write(path, record)
        one.path.unlink()
        print(f"{plan.name}: {record['pairs_per_second']:,.0f} pairs a second, {one.seconds:.0f} s", flush=True)
    print(table(options.out))
    return 0


def table(folder: Path) -> str:
    """A line for each record: how long, and what it found."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        scores = {"recall": record["val"]["mean_recall"], **{k: v["acc1"] for k, v in record["zeroshot"].items()}}
        shown = ", ".join(f"{name} {100 * score:.1f}" for name, score in scores.items())
        pairs = record["pairs_seen"] / 1e6
        lines.append(f"{path.stem} ({record['machine']}, {pairs:.1f} M pairs, {record['seconds']:.0f} s): {shown}")
    return "\n".join(lines) or "no records"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("build", "run", "table"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the pictograms' folder")
    parser.add_argument("--pack", type=Path, default=ROOT / "runs" / "gpu_study" / "pictograms.zip")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_study")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--towers", nargs="+", default=TOWERS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(words)
    if options.action == "run":
        return run(options)
    if options.action == "table":
        print(table(options.out))
        return 0
    from benchmarks.gpu_study import pack

    counts = pack.build(options.data, options.pack)
    size = options.pack.stat().st_size / 2**20
    print(f"{options.pack}: {size:.1f} MiB; " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    left = [name for name in pack.TESTS if name not in counts]
    print(f"left out for want of room: {', '.join(left) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
