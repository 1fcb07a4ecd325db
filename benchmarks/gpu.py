"""What a GPU has to show, in one command of at most ten minutes: ``python
benchmarks/gpu.py [--out DIR]``.

- ``tests``: the tests marked ``cuda``, listed and run;
- ``parity``: loss and gradients of each member, streamed, on the device, beside the
  reference in float64 on the CPU;
- ``resume``: a run that is killed with -9 and resumed, and one that is not: the same
  weights, bit for bit;
- ``loss``: forward and backward at N = 4,096 to 65,536 in float32, with TF32 allowed
  and with bfloat16 products, beside open_clip's ClipLoss; milliseconds, peak memory,
  TFLOP/s and the share of an H100's peak in the precision of the row;
- ``step``: one training step of RN50 and ViT-B-32, towers in bfloat16: that of the
  ``Stepper`` that trains, and a plain loop with ClipLoss;
- ``nccl``: the objective over a process group of one rank, beside the one without a
  group.

``--device cpu --quick`` tries all of it at small sizes. Each part is a process of its
own with a time limit; what fails is written down as failed. Writes gpu.json and gpu.md.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine

import cloob
from cloob.distributed import Layout
from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed
from cloob.training.callbacks import Callback
from cloob.training.step import StepBatch, Stepper, TowersWithLoss

ROOT = Path(__file__).parents[1]
INV_TAU = 30.0
BETA = 8.0
MEMBERS = [
    (contrast, hopfield)
    for contrast in ("infoloob", "infonce")
    for hopfield in (True, False)
] + [("sigmoid", False)]
# Peaks of an H100 SXM in TFLOP/s without sparsity, by the precision of the products.
PEAK = {"float32": 67, "TF32": 495, "bfloat16": 989}
# Operations of a loss, forward and backward, as multiples of N²D.
WORK = {"cloob": 52, "infoloob": 6, "ClipLoss": 12}
Found = dict[str, Any]


def rows(n: int, dim: int, device: str, *, cone: float = 0.0) -> list[torch.Tensor]:
    """Two matrices of unit rows; in a cone their mean cosine is about ``cone``."""
    generator = torch.Generator().manual_seed(0)
    shared = (
        F.normalize(torch.randn(dim, generator=generator), dim=0)
        * (cone / max(1e-9, 1 - cone)) ** 0.5
    )
    made = [
        F.normalize(torch.randn(n, dim, generator=generator), dim=1) + shared
        for _ in range(2)
    ]
    return [F.normalize(side, dim=1).to(device).requires_grad_() for side in made]


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(work: Callable[[], Any], device: str, repeats: int) -> Found:
    """Median milliseconds of a call after one that is not counted, and the peak memory
    beyond what was there.
    """
    work()
    synchronise(device)
    before = 0
    times = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(1000 * (time.perf_counter() - start))
    peak = (
        {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
        if device == "cuda"
        else {}
    )
    return {"ms": sorted(times)[len(times) // 2], **peak}


def rate(name: str, n: int, dim: int, ms: float) -> Found:
    """TFLOP/s of a loss whose name begins with its kind and the precision of its
    products, and their share of an H100's peak in that precision.
    """
    kind, precision = name.split(",")[0].split(" ")[:2]
    tflops = WORK[kind] * n * n * dim / ms / 1e9
    return {"tflop_per_s": tflops, "share_of_h100_peak": tflops / PEAK[precision]}


def tests(args: argparse.Namespace) -> Found:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "tests": re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) (.*)$", done.stdout, re.M),
        "rc": done.returncode,
    }


def parity(args: argparse.Namespace) -> Found:
    found = {}
    for contrast, hopfield in MEMBERS:
        for cone in (0.0, 0.9):
            ours = rows(512, 256, args.device, cone=cone)
            theirs = rows(512, 256, "cpu", cone=cone)
            exact = [side.detach().double().requires_grad_() for side in theirs]
            member: Any = {"contrast": contrast, "hopfield": hopfield, "scale": "unit"}
            loss = cloob_streamed(*ours, INV_TAU, BETA, **member)
            expected = cloob_reference(*exact, INV_TAU, BETA, **member)
            loss.backward()
            expected.backward()
            gaps = [
                (a.grad.cpu().double() - b.grad).norm() / b.grad.norm()
                for a, b in zip(ours, exact, strict=True)
            ]
            name = f"{contrast}{', Hopfield' if hopfield else ''}, mean cosine {cone:g}"
            found[name] = {
                "loss": abs(float(loss.detach()) - float(expected.detach())),
                "gradient": float(max(gaps)),
            }
    return found


class KillAt(Callback):
    """Kills the process with -9 after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, metrics: Any) -> None:
        if metrics["step"] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_once(args: argparse.Namespace) -> Found:
    """One training run of ``resume``, in the process that may be killed."""
    config = cloob.get_recipe("demo-scratch").override(
        model="tiny-vit",
        steps=12,
        warmup=2,
        batch_size=64,
        workers=0,
        device=args.device,
        seed=1,
        save_every=4,
    )
    config = config.override(out=args.run, resume="auto")
    result = cloob.train(
        config, callbacks=[KillAt(args.kill_at)] if args.kill_at else []
    )
    return {"checkpoint": str(result.checkpoint)}


def resume(args: argparse.Namespace) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        weights = {}
        for name, kills in (("whole", (0,)), ("killed", (7, 0))):
            for kill_at in kills:
                command = [
                    sys.executable,
                    __file__,
                    "--part",
                    "run_once",
                    "--device",
                    args.device,
                ]
                command += ["--run", f"{folder}/{name}", "--kill-at", str(kill_at)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False
                )
                assert done.returncode == (-signal.SIGKILL if kill_at else 0), (
                    done.stderr[-2000:]
                )
            weights[name] = cloob.load_model(
                f"{folder}/{name}:last", device="cpu"
            ).state_dict()
    same = all(
        torch.equal(value, weights["killed"][key])
        for key, value in weights["whole"].items()
    )
    return {"bit for bit": same}


def loss(args: argparse.Namespace) -> Found:
    from open_clip.loss import ClipLoss

    clip = ClipLoss()
    found = {}
    ours: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
        "cloob float32": ("highest", lambda x, y: cloob_streamed(x, y, INV_TAU, BETA)),
        "cloob float32, TF32 allowed": (
            "high",
            lambda x, y: cloob_streamed(x, y, INV_TAU, BETA),
        ),
        "cloob bfloat16": (
            "highest",
            lambda x, y: cloob_streamed(x, y, INV_TAU, BETA, matmul=torch.bfloat16),
        ),
        "infoloob float32": (
            "highest",
            lambda x, y: cloob_streamed(x, y, INV_TAU, hopfield=False),
        ),
        "ClipLoss float32": ("highest", lambda x, y: clip(x, y, INV_TAU)),
        "ClipLoss TF32": ("high", lambda x, y: clip(x, y, INV_TAU)),
        "ClipLoss bfloat16": (
            "highest",
            lambda x, y: clip(x.bfloat16(), y.bfloat16(), INV_TAU),
        ),
    }
    for n in (256, 512) if args.quick else (4096, 8192, 16384, 32768, 65536):
        x, y = rows(n, 512, args.device)
        for name, (products, function) in ours.items():
            torch.set_float32_matmul_precision(products)
            try:
                row = measured(
                    lambda f=function, pair=(x, y): f(*pair).backward(), args.device, 3
                )
            except torch.OutOfMemoryError:
                row = {"failed": "out of memory"}
            else:
                row |= rate(name, n, x.shape[1], row["ms"])
            found[f"{n}, {name}"] = row
            print(json.dumps({f"{n}, {name}": row}), file=sys.stderr, flush=True)
    return found


def step(args: argparse.Namespace) -> Found:
    found = {}
    count = 8 if args.quick else 256
    for name in ("tiny-resnet", "tiny-vit") if args.quick else ("RN50", "ViT-B-32"):
        encoder = cloob.create_model(name, seed=0).to(args.device)
        size = encoder.image_size
        pictures = (count, 3, size, size)
        images = torch.randint(0, 256, pictures, dtype=torch.uint8, device=args.device)
        captions = [f"a picture of thing {i}" for i in range(count)]
        batch = (images, encoder.tokenizer(captions).to(args.device))
        steps = {
            "Stepper, towers bf16, cloob float32": launch_of(encoder, "cloob", batch),
            "Stepper, towers bf16, clip float32": launch_of(encoder, "clip", batch),
            "plain loop, towers bf16, ClipLoss float32": plain_step(encoder, batch),
        }
        for kind, once in steps.items():
            row = measured(once, args.device, 3 if args.quick else 10)
            row["pairs_per_s"] = 1000 * count / row["ms"]
            found[f"{name}, {count} pairs, {kind}"] = row
    return found


Pairs = tuple[torch.Tensor, torch.Tensor]


def launch_of(
    encoder: torch.nn.Module, objective: str, batch: Pairs
) -> Callable[[], Any]:
    """The step of ``cloob train``: that of a ``Stepper``, not waited for."""
    loss = cloob.make_objective(objective).to(batch[0].device)
    towers = TowersWithLoss(encoder, loss, "bf16").train()
    stepper = Stepper(towers, adamw(towers), clip_grad_norm=1.0)
    layout = Layout((len(batch[0]),))
    return lambda: stepper.launch(StepBatch(batch, layout), 1e-4)


def plain_step(encoder: torch.nn.Module, batch: Pairs) -> Callable[[], Any]:
    """A step as one writes it by hand with open_clip's loss."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    optimizer = adamw(encoder.train())

    def once() -> None:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            x, y = encoder(*batch)
        loss(x.float(), y.float(), INV_TAU).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return once


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)


def nccl(args: argparse.Namespace) -> Found:
    backend = "nccl" if args.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/group", rank=0, world_size=1
        )
        alone = rows(256, 128, args.device)
        grouped = rows(256, 128, args.device)
        cloob.make_objective("cloob").to(args.device)(*alone).backward()
        cloob.make_objective("cloob", gather=True).to(args.device)(*grouped).backward()
        torch.distributed.destroy_process_group()
    gaps = [
        float((a.grad - b.grad).norm() / a.grad.norm())
        for a, b in zip(alone, grouped, strict=True)
    ]
    return {"backend": backend, "gradient, relative": max(gaps)}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "tests": tests, "parity": parity, "resume": resume, "loss": loss, "step": step, "nccl": nccl,
}  # fmt: skip


def page(record: Found) -> str:
    lines = [
        "# One GPU\n",
        (
            f"{record['device']}, torch {record['machine']['torch']}; `python"
            " benchmarks/gpu.py`.\n"
        ),
    ]
    for part, found in record["parts"].items():
        lines += [
            f"## {part}: {found.get('failed', 'ran')}, {found['seconds']:.0f} s\n"
        ]
        for name, value in found.get("found", {}).items():
            text = (
                value
                if not isinstance(value, dict)
                else ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in value.items()
                )
            )
            lines.append(f"- {name}: {text}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to try the script"
    )
    parser.add_argument("--seconds", type=int, default=150, help="limit of a part")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu"
    )
    for hidden in ("--part", "--run"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({**PARTS, "run_once": run_once}[args.part](args)))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu --quick tries the script")
    record: Found = {
        "machine": machine("open_clip_torch"),
        "device": (
            torch.cuda.get_device_name() if args.device == "cuda" else machine()["cpu"]
        ),
        "parts": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        start = time.monotonic()
        found = {}
        command = [
            sys.executable,
            __file__,
            "--part",
            part,
            "--device",
            args.device,
            *(["--quick"] if args.quick else []),
        ]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                timeout=args.seconds,
                check=True,
            )
            found = {"found": json.loads(done.stdout.splitlines()[-1])}
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            found = {"failed": f"failed ({error})"[:300]}
        record["parts"][part] = {**found, "seconds": time.monotonic() - start}
        (args.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "gpu.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()
