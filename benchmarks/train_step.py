"""Training, end to end: images a second of ours, of open_clip_train, and of a plain
transcription of the authors' step.

``python benchmarks/train_step.py [--quick]``: the same tower, shards, batch size,
worker and thread counts, on this machine's CPU or, with ``--device cuda``, its GPU.
Each run is a process of its own that starts a real training and is stopped after some
steps:

- ``cloob``, ``cloob, clip loss``: our ``train()``, as ``cloob train`` calls it, with
  the CLOOB and the CLIP objective;
- ``cloob bf16``: the same with ``--precision bf16``: other arithmetic, so beside the
  comparison;
- ``open_clip_train``: its ``main``, which trains CLIP;
- ``plain``: open_clip's model and data pipeline, and the published formula as
  ``benchmarks/objective.py`` writes it down (F.softmax, N×N matrices kept), backward,
  AdamW, all in float32 and as torch does by default.

The first ``--warm`` steps are not counted; the clock runs from the end of one optimiser
step to the end of another, so reading, decoding, augmentation, logging and all else
between are in it. Rounds are interleaved; the table has medians over rounds of images a
second, and of the ratios within a round. Writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from objective import plain
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor

CONFIGS = Path(__file__).parents[1] / "src" / "cloob" / "models" / "configs"
OURS = "cloob"
OPEN_CLIP = "open_clip_train"
PLAIN = "plain"
CONTENDERS = (OURS, "cloob, clip loss", OPEN_CLIP, PLAIN, "cloob bf16")
# Two shards, as open_clip_train wants one for each worker.
SHARDS = "{00000..00001}.tar"
LR = 1e-3
WEIGHT_DECAY = 0.1


class Enough(BaseException):
    """As many steps as were asked for; no ``Exception``, so that no training takes it
    for its own.
    """


def clock(steps: int, device: str) -> list[float]:
    """The times at which optimiser steps of this process end, filled in as it trains;
    ends it after ``steps``.
    """
    stamps: list[float] = []

    def stamp(*_: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        if len(stamps) > steps:
            raise Enough

    register_optimizer_step_post_hook(stamp)
    return stamps


def ours(
    args: argparse.Namespace, folder: Path, objective: str, precision: str
) -> None:
    from cloob.training.config import TrainConfig
    from cloob.training.loop import train

    config = TrainConfig().override(
        data=[str(args.data / SHARDS)],
        model=args.model,
        objective=objective,
        precision=precision,
        batch_size=args.batch,
        workers=args.workers,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        warmup=10,
        device=args.device,
        epochs=50,
        out=folder / "run",
    )
    train(config)


def open_clip_arguments(args: argparse.Namespace, folder: Path) -> list[str]:
    import open_clip

    open_clip.add_model_config(CONFIGS)
    options = {
        "train-data": args.data / SHARDS,
        "train-num-samples": 4809 * 2,
        "dataset-type": "webdataset",
        "model": args.model,
        "batch-size": args.batch,
        "workers": args.workers,
        "lr": LR,
        "wd": WEIGHT_DECAY,
        "warmup": 10,
        "epochs": 50,
        "precision": "fp32",
        "device": args.device,
        "logs": folder / "logs",
        "log-every-n-steps": 50,
    }
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def with_open_clip_train(args: argparse.Namespace, folder: Path) -> None:
    arguments = open_clip_arguments(args, folder)
    from open_clip_train.main import main as train

    train(arguments)


def transcription(args: argparse.Namespace, folder: Path) -> None:
    """Batches as open_clip_train reads them, and the step as the paper describes it."""
    arguments = open_clip_arguments(args, folder)
    import open_clip
    from open_clip_train.data import get_data
    from open_clip_train.params import parse_args

    options = parse_args(arguments)
    options.distributed = False
    options.rank = 0
    options.world_size = 1
    model, preprocess, evaluation = open_clip.create_model_and_transforms(
        args.model, precision="fp32", device=args.device
    )
    data = get_data(
        options,
        (preprocess, evaluation),
        epoch=0,
        tokenizer=open_clip.get_tokenizer(args.model),
    )["train"]
    model.logit_scale.requires_grad_(False)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    model.train()
    for epoch in range(50):
        data.set_epoch(epoch)
        for images, tokens in data.dataloader:
            optimizer.zero_grad()
            images = images.to(args.device)
            tokens = tokens.to(args.device)
            x = model.encode_image(images, normalize=True)
            y = model.encode_text(tokens, normalize=True)
            loss = plain(x, y)
            loss.backward()
            optimizer.step()
            float(loss.detach())  # the loss is looked at, as everywhere


def run_one(name: str, args: argparse.Namespace) -> None:
    train: dict[str, Callable[[Path], None]] = {
        OURS: lambda folder: ours(args, folder, "cloob", "fp32"),
        "cloob, clip loss": lambda folder: ours(args, folder, "clip", "fp32"),
        "cloob bf16": lambda folder: ours(args, folder, "cloob", "bf16"),
        OPEN_CLIP: lambda folder: with_open_clip_train(args, folder),
        PLAIN: lambda folder: transcription(args, folder),
    }
    stamps = clock(args.warm + args.steps, args.device)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        train[name](Path(folder))
    taken = stamps[-1] - stamps[args.warm]
    print(f"\nimages a second: {args.batch * (len(stamps) - 1 - args.warm) / taken}")


def measure(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--one", name]
    for key in (
        "model",
        "data",
        "batch",
        "workers",
        "threads",
        "warm",
        "steps",
        "device",
    ):
        command += [f"--{key}", str(getattr(args, key))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    lines = [
        line for line in done.stdout.splitlines() if line.startswith("images a second:")
    ]
    if not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return float(lines[-1].split(":")[1])


def table(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians over rounds, of rates and of the ratios within a round."""
    rows = []
    for name, found in rates.items():
        row: dict[str, Any] = {
            "name": name,
            "images_per_second": statistics.median(found),
            "rounds": found,
        }
        for other in (OPEN_CLIP, PLAIN):
            if other in rates:
                row[f"ratio_{other}"] = statistics.median(
                    a / b for a, b in zip(found, rates[other], strict=True)
                )
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    others = [OPEN_CLIP, PLAIN]
    width = max(len(row["name"]) for row in rows)
    print(
        f"{'what':<{width}}", f"{'images/s':>9}", *(f"{f'/ {x}':>14}" for x in others)
    )
    for row in rows:
        ratios = [row.get(f"ratio_{other}") for other in others]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rate = f"{row['images_per_second']:9.0f}"
        print(f"{row['name']:<{width}}", rate, *(f"{cell:>14}" for cell in cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="tiny-resnet",
        help="an open_clip configuration, or one of our tiny ones",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data" / "pictograms" / "train",
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--warm", type=int, default=5, help="steps before the clock starts"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of few small steps: does it run?",
    )
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "train_step"
    )
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.batch = 64
        args.warm = 2
        args.steps = 4
        args.rounds = 1
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        run_one(args.one, args)
        return
    rates: dict[str, list[float]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        for name, found in rates.items():
            print(f"round {number + 1}: {name} …", file=sys.stderr, flush=True)
            found.append(measure(name, args))
    cpu = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    about = cpu | {
        key: getattr(args, key)
        for key in ("model", "device", "batch", "workers", "warm", "steps")
    }
    rows = table(rates)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(
        json.dumps({"machine": about, "rows": rows}, indent=1) + "\n"
    )
    print_table(rows, about)
    print(f"written: {args.out}/results.json")


if __name__ == "__main__":
    main()
