"""Time and memory of the objective, forward and backward, beside what people run today.

``python benchmarks/objective.py [--sizes 512 1024 2048 4096 8192 32768] [--dim 512]``
compares, at each batch size,

- ``plain``: the published formula written down with F.softmax, as every port of CLOOB
  has it; the ratios are to it;
- ``reference``: ``cloob.functional.cloob_reference``;
- ``ClipLoss``: open_clip's, which retrieves nothing: a lower bound of any contrastive
  loss that keeps its matrix;
- ``inf-cl``: tiled InfoNCE without retrieval, where its package imports (CUDA);
- ``streamed``: ours in float32, and with ``matmul=torch.bfloat16``;

Times are of interleaved repeats in one process, medians and minima: what slows the
machine slows all of them. Extra memory is the peak of a fresh process each, less what
it held with the inputs ready; glibc is told to hand freed blocks of 1 MiB and more back
at once, so that it is the memory in use and not what the allocator keeps in hand. At
``--once-from`` and above, the streamed path alone runs, once. Writes results.json to
``--out``."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.figures import objective as table
from benchmarks.machine import machine as this_machine

from cloob.functional import cloob_reference
from cloob.functional.streamed import cloob_streamed

INV_TAU = 30.0
BETA = 8.0
OURS = "streamed"
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, y: Tensor) -> Tensor:
    def retrieve(state: Tensor, stored: Tensor) -> Tensor:
        return F.normalize(F.softmax(BETA * state @ stored.T, dim=1) @ stored, dim=1)

    def loob(anchors: Tensor, candidates: Tensor) -> Tensor:
        logits = INV_TAU * anchors @ candidates.T
        positives = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return (
            logits.masked_fill(positives, -torch.inf).logsumexp(dim=1)
            - logits.diagonal()
        ).mean()

    u_x = retrieve(x, x)
    u_y = retrieve(y, x)
    v_x = retrieve(x, y)
    v_y = retrieve(y, y)
    return (loob(u_x, u_y) + loob(v_y, v_x)) / INV_TAU


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "plain": plain,
        "reference": lambda x, y: cloob_reference(x, y, INV_TAU, BETA),
        OURS: lambda x, y: cloob_streamed(x, y, INV_TAU, BETA),
        f"{OURS} bf16": lambda x, y: cloob_streamed(
            x, y, INV_TAU, BETA, matmul=torch.bfloat16
        ),
    }
    try:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        found["ClipLoss"] = lambda x, y: clip(x, y, INV_TAU)
    except ImportError:
        print("ClipLoss is left out: open_clip does not import")
    try:
        from inf_cl import cal_inf_loss

        found["inf-cl"] = lambda x, y: cal_inf_loss(
            x, y, scale=torch.tensor(INV_TAU, device=x.device)
        )
    except ImportError:
        print("inf-cl is left out: its package does not import")
    return found


def matrices_kept(name: str) -> int:
    """About how many float32 N×N matrices a contender holds at its peak."""
    return {"plain": 10, "reference": 14, "ClipLoss": 5}.get(name, 0)


def fits(name: str, n: int) -> bool:
    """Whether a contender needs at most 60 % of this machine's memory."""
    return matrices_kept(name) * 4 * n * n <= 0.6 * os.sysconf(
        "SC_PAGE_SIZE"
    ) * os.sysconf("SC_PHYS_PAGES")


def inputs(n: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = (
        F.normalize(torch.randn(n, dim, device=device), dim=1).requires_grad_()
        for _ in range(2)
    )
    return x, y


def step(loss: Loss, x: Tensor, y: Tensor) -> None:
    x.grad = y.grad = None
    loss(x, y).backward()


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux hands the parent's ru_maxrss down to a fresh process; VmHWM is its own
        line = next(
            line for line in status.read_text().splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure_memory(name: str, n: int, dim: int, device: str) -> int:
    """Peak bytes of one forward and backward beyond the inputs; for a fresh process
    only.
    """
    loss = contenders()[name]
    step(loss, *inputs(64, dim, device))  # libraries load, thread pools start
    x, y = inputs(n, dim, device)
    ready = peak_bytes(device)
    step(loss, x, y)
    return peak_bytes(device) - ready


def memory_in_fresh_process(name: str, n: int, args: argparse.Namespace) -> int:
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--sizes",
        str(n),
        "--dim",
        str(args.dim),
    ]
    command += ["--threads", str(args.threads), "--device", args.device]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return int(done.stdout.split()[-1])


def repeats(n: int, args: argparse.Namespace) -> int:
    return 1 if n >= args.once_from else args.repeats or max(5, min(41, 20480 // n))


def measure_size(n: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender at one size."""
    losses = {
        k: v
        for k, v in contenders().items()
        if fits(k, n) and (n < args.once_from or k == OURS)
    }
    x, y = inputs(n, args.dim, args.device)
    work: dict[str, Callable[[], object]] = {
        k: (lambda v=v: step(v, x, y)) for k, v in losses.items()
    }
    if n < args.once_from:
        for run in work.values():
            run()
    times: dict[str, list[float]] = {k: [] for k in work}
    for _ in range(repeats(n, args)):
        for k, run in work.items():
            times[k].append(seconds(run, args.device))
    rows: list[dict[str, Any]] = []
    for k, taken in times.items():
        row = {
            "name": k,
            "n": n,
            "repeats": len(taken),
            "median_s": statistics.median(taken),
            "min_s": min(taken),
        }
        if not args.no_memory:
            row["extra_bytes"] = memory_in_fresh_process(k, n, args)
        rows.append(row)
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds the ratios to ``plain`` of the same size."""
    for row in rows:
        beside = {other["name"]: other for other in rows if other["n"] == row["n"]}
        if "plain" in beside:
            row["time_ratio"] = row["median_s"] / beside["plain"]["median_s"]
            row["min_time_ratio"] = row["min_s"] / beside["plain"]["min_s"]
            if "extra_bytes" in row and "extra_bytes" in beside["plain"]:
                row["memory_ratio"] = row["extra_bytes"] / max(
                    1, beside["plain"]["extra_bytes"]
                )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    return {**this_machine(), "threads": args.threads, "dim": args.dim, **gpu}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 32768]
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="0 takes 41 at small sizes to 5 at large ones",
    )
    parser.add_argument("--once-from", type=int, default=16384)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "objective"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args.sizes[0], args.dim, args.device))
        return
    about = machine(args)
    rows = []
    args.out.mkdir(parents=True, exist_ok=True)
    for n in args.sizes:
        print(f"N = {n} …", file=sys.stderr, flush=True)
        rows += measure_size(n, args)
        compare(rows)
        (args.out / "results.json").write_text(
            json.dumps({"machine": about, "rows": rows}, indent=1) + "\n"
        )
    print(table(rows))
    print(f"written: {args.out}/results.json")


if __name__ == "__main__":
    main()
