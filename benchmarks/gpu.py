"""All that there is to prove and to measure on one GPU, in one command and under eight minutes.

``python benchmarks/gpu.py`` needs the checkout and the packages of ``pip install -e ".[train,test]"``; of ``inf-cl``,
``memeff`` and ``siglip-kernel`` those are compared that import. No data are needed. The parts, each a process of its
own that is ended when its time is over, so that a slow one cannot starve the others:

- ``environment``: the card and the versions;
- ``tests``: those with the mark ``gpu``: each fast path against float64, one rank over NCCL, FSDP2, synchronised batch
  norm, bf16 and fp16, resumption, and a step in which any wait for the device is an error;
- ``objective``: time and memory at N = 4,096 … 131,072 and D = 512 and 1,024 beside the plain formula, open_clip's
  losses and other people's kernels, and beside floors of arithmetic and memory measured in the same run;
- ``steps``: a training step of RN50 and of ViT-B-32 beside open_clip_train's;
- ``evaluation``: pictures and texts a second, and ranks.

What a part does not get to is named. Writes a record with the card's name to ``--out`` and prints tables.
``--device cpu`` does the same with small sizes: it shows that the command works and measures nothing of interest.

It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.on_gpu.record import Record, read_rows  # noqa: E402 - it is beside this file
from benchmarks.on_gpu.tables import tables  # noqa: E402 - likewise

SHARES = {"environment": 0.03, "tests": 0.3, "objective": 0.33, "steps": 0.26, "evaluation": 0.08}
"""Of the whole time; what a part leaves goes to those after it."""
GRACE = 8.0  # seconds that a part may take beyond its time to come to its end
SIZES = {"cuda": [4096, 8192, 16384, 32768, 65536, 131072], "cpu": [64, 256]}
DIMS = {"cuda": [512, 1024], "cpu": [32]}
TRAINED = {"cuda": {"RN50": 256, "ViT-B-32": 512}, "cpu": {"tiny-vit": 4}}


def run_part(name: str, path: Path, seconds: float, device_name: str) -> None:
    """One part, in this process."""
    import torch
    from benchmarks.on_gpu import environment, evaluation, marked, objective, steps

    if device_name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device; --device cpu runs small sizes")
    device = torch.device("cuda:0" if device_name == "cuda" else "cpu")
    record, kind = Record(path, seconds), device.type
    match name:
        case "environment":
            environment.measure(record, device)
        case "tests":
            marked.measure(record, device)
        case "objective":
            objective.measure(record, device, SIZES[kind], DIMS[kind])
        case "steps":
            block, rounds = (20, 5) if kind == "cuda" else (1, 1)
            steps.measure(record, device, TRAINED[kind], block, rounds)
        case _:
            batch, pairs = (256, 5000) if kind == "cuda" else (4, 50)
            evaluation.measure(record, device, list(TRAINED[kind]), batch, pairs)


def start_part(name: str, path: Path, seconds: float, device: str) -> str:
    """One part in a process of its own; how it ended."""
    command = [sys.executable, __file__, "--part", name, "--rows", str(path)]
    command += ["--seconds", str(seconds), "--device", device]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told, _ = process.communicate(timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "out of time"
    if process.returncode:
        return f"failed: {(told.strip().splitlines() or ['without a word'])[-1][:300]}"
    return "done"


def run(device: str, seconds: float, names: list[str]) -> dict[str, dict[str, Any]]:
    """All parts, one after the other."""
    parts: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(names):
            left = end - time.monotonic()
            budget = max(1.0, left * SHARES[name] / sum(SHARES[other] for other in names[place:]) - GRACE / 2)
            print(f"{name}: up to {budget:.0f} s …", file=sys.stderr, flush=True)
            began = time.monotonic()
            path = Path(folder) / f"{name}.jsonl"
            ended = start_part(name, path, budget, device)
            took = time.monotonic() - began
            parts[name] = {"seconds": took, "budget": budget, "ended": ended, "rows": read_rows(path)}
            if name == "environment" and ended != "done":
                break  # the others would say the same
    return parts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="of all parts together")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.part:
        run_part(args.part, args.rows, args.seconds, args.device)
        return 0
    parts = run(args.device, 60 * args.minutes, args.only)
    facts = next(iter(parts.get("environment", {}).get("rows", [])), {})
    name = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", args.device)).lower()).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(json.dumps({"machine": facts, "minutes": args.minutes, "parts": parts}, indent=1) + "\n")
    print(tables(parts))
    print(f"written: {path}")
    failed = [name for name, part in parts.items() if part["ended"].startswith("failed")]
    failed += ["tests"] if any(row.get("outcome") == "failed" for row in parts.get("tests", {}).get("rows", [])) else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
