"""The objective over ranks: what each rank computes, holds and receives, of one global batch at 1, 2 and 4 ranks.

``python benchmarks/ranks.py [--pairs 8192] [--dim 512] [--ranks 1 2 4] [--quick]``: forward and backward pass of

- ``cloob``, ``clip``: ``ContrastiveObjective(backend="streamed", gather=True)``;
- ``ClipLoss``: open_clip's, as its trainer calls it over ranks (``local_loss=True, gather_with_grad=True``).

Ranks are processes on this machine, with one thread each, that speak gloo. The processes of each run are fresh, and the
runs take turns: in each round every contender at every number of ranks. Of a run, by rank:

- ``flops``: operations of the matrix products, counted by ``torch.utils.flop_counter`` in a run that is not timed; the
  rank with the most. The same run shows that loss and gradient are those of one process (after the division by the
  number of ranks that DDP's averaging does), and ends the program where they are not;
- ``cpu_s``: CPU seconds of all threads of a rank, mean over ranks. This is what tells whether work falls, however many
  cores there are;
- ``wall_s``: from a barrier to the end of the slowest rank: falls only as far as there are cores;
- ``received_bytes``: what the kernel counted on the rank's TCP sockets (``tcpi_bytes_received``), whatever algorithm
  gloo takes; the rank with the most; null where there is no such count, as beside Linux;
- ``extra_bytes``: peak memory of the fresh process above what it held with its rows ready (VmHWM, set back before); the
  rank with the most. glibc hands freed blocks of 1 MiB and more back at once, as in ``benchmarks/objective.py``.

Medians over rounds. Writes results.json to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from benchmarks.objective import peak_bytes

from cloob.distributed import Layout
from cloob.objective import make_objective

OURS, PEER = ("cloob", "clip"), "ClipLoss"
CONTENDERS = (*OURS, PEER)
INV_TAU = 1 / 0.07  # of CLIP, the start of a learned one
APART = 1e-4  # relative: loss and gradient over ranks against one process, float32
BYTES_RECEIVED = 128  # where struct tcp_info of linux/tcp.h has tcpi_bytes_received, a u64
MINUTES = 10  # a collective call that waits longer is a hang


@dataclass(frozen=True)
class Job:
    """One run: a contender at a number of ranks, timed or counted."""

    name: str
    ranks: int
    pairs: int
    dim: int
    counted: bool
    folder: str


def contender(name: str, rank: int, ranks: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Embeddings of this rank -> its loss."""
    if name != PEER:
        return make_objective(name, backend="streamed", gather=True)
    from open_clip.loss import ClipLoss  # takes seconds, and only the peer needs it

    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)
    scale = torch.tensor(INV_TAU, requires_grad=True)  # learned, as ours
    return lambda x, y: loss(x, y, scale)


def own_rows(n: int, dim: int, own: slice) -> list[Tensor]:
    """This rank's rows of a global batch of unit rows, both sides; texts resemble their images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, dim, generator=generator)
    texts = images + torch.randn(n, dim, generator=generator)
    return [F.normalize(side[own], dim=1).requires_grad_() for side in (images, texts)]


def received() -> int | None:
    """Bytes that this process's open TCP connections have received; None where the system does not say."""
    if not hasattr(socket, "TCP_INFO") or not Path("/proc/self/fd").is_dir():
        return None
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as copy:
            info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, BYTES_RECEIVED)[0]
    return total


def forget_peak() -> None:
    """Lets the peak memory of this process begin from what it holds now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def count_flops(work: Callable[[], object]) -> int:
    """Operations of the matrix products in ``work``, those that accumulate in place too."""

    def addmm(total: Sequence[int], a: Sequence[int], b: Sequence[int], **others: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        work()
    return counter.get_total_flops()


def measure(job: Job, rank: int) -> dict[str, Any]:
    """One forward and backward pass on this rank; a counted one leaves its gradients in the folder."""
    loss, losses = contender(job.name, rank, job.ranks), []

    def step(sides: Sequence[Tensor]) -> None:
        losses.append(loss(*sides))
        losses[-1].backward()
        losses[-1] = losses[-1].detach()

    step(own_rows(16 * job.ranks, job.dim, slice(16 * rank, 16 * (rank + 1))))  # libraries load, sockets connect
    sides = own_rows(job.pairs, job.dim, Layout((job.pairs // job.ranks,) * job.ranks).local)
    dist.barrier()
    forget_peak()
    ready, before = peak_bytes("cpu"), received()
    dist.barrier()
    if job.counted:
        found: dict[str, Any] = {"flops": count_flops(lambda: step(sides))}
        gradients = torch.stack([side.grad for side in sides if side.grad is not None]) / job.ranks
        torch.save(gradients, Path(job.folder) / f"{job.name}-{job.ranks}-{rank}.pt")
    else:
        cpu, wall = time.process_time(), time.perf_counter()
        step(sides)
        found = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        found["extra_bytes"] = peak_bytes("cpu") - ready
    dist.barrier()
    after = received()
    return {**found, "loss": float(losses[-1]), "received_bytes": None if after is None else after - (before or 0)}


def worker(rank: int, job: Job, store: str) -> None:
    """One rank, a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(minutes=MINUTES), rank=rank, world_size=job.ranks)
    try:
        found = measure(job, rank)
    finally:
        dist.destroy_process_group()
    (Path(job.folder) / f"rank-{rank}.json").write_text(json.dumps(found))


def run(job: Job) -> list[dict[str, Any]]:
    """What each rank found."""
    store = Path(job.folder) / "store"
    store.unlink(missing_ok=True)
    mp.start_processes(worker, (job, str(store)), nprocs=job.ranks, start_method="forkserver")
    return [json.loads((Path(job.folder) / f"rank-{rank}.json").read_text()) for rank in range(job.ranks)]


def counted(job: Job) -> dict[str, Any]:
    """Operations and bytes of a rank, and how far loss and gradient are from one process's.

    Raises:
        SystemExit: Further than rounding explains.
    """
    ranks = run(job)
    loss = statistics.mean(
        rank["loss"] for rank in ranks
    )  # ours is the global one on each; the peer's is the rank's own
    folder = Path(job.folder)
    gradient = torch.cat([torch.load(folder / f"{job.name}-{job.ranks}-{rank}.pt") for rank in range(job.ranks)], dim=1)
    one = folder / f"{job.name}-one.pt"
    if job.ranks == 1:
        torch.save((loss, gradient), one)
    alone, expected = torch.load(one)
    gaps = {
        "loss_apart": abs(loss - alone) / abs(alone),
        "gradient_apart": float((gradient - expected).norm() / expected.norm()),
    }
    if not max(gaps.values()) <= APART:
        raise SystemExit(f"{job.name} over {job.ranks} ranks is not what one process computes: {gaps}")
    received_by = [rank["received_bytes"] for rank in ranks]
    most = None if None in received_by else max(received_by)
    return {"flops": max(rank["flops"] for rank in ranks), "received_bytes": most, "loss": loss, **gaps}


def timed(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of one contender at one number of ranks: CPU by the mean rank, the rest by the worst."""
    rounds = [
        {
            "cpu_s": statistics.mean(rank["cpu_s"] for rank in ranks),
            **{key: max(rank[key] for rank in ranks) for key in ("wall_s", "extra_bytes")},
        }
        for ranks in runs
    ]
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]} | {"rounds": rounds}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8192, help="of the global batch; all --ranks divide it")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="256 pairs, D = 32, one round: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ranks")
    args = parser.parse_args(arguments)
    if args.quick:
        args.pairs, args.dim, args.rounds = 256, 32, 1
    args.ranks = sorted({1, *args.ranks})  # the others are compared with one
    if any(args.pairs % ranks for ranks in args.ranks):
        parser.error(f"--pairs {args.pairs} cannot be divided among {args.ranks} ranks")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    # What starts the processes reads these when it starts itself.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    multiprocessing.set_forkserver_preload(["torch.distributed.nn", "cloob.objective", "open_clip.loss"])
    cases = [(name, ranks) for name in CONTENDERS for ranks in args.ranks]
    about = machine("open_clip_torch") | {"threads_a_rank": 1, "pairs": args.pairs, "dim": args.dim}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {case: Job(*case, args.pairs, args.dim, counted=True, folder=folder) for case in cases}
        found = {case: counted(job) for case, job in jobs.items()}
        runs: dict[Any, list[list[dict[str, Any]]]] = {case: [] for case in cases}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds} …", file=sys.stderr, flush=True)
            for name, ranks in cases:
                job = Job(name, ranks, args.pairs, args.dim, counted=False, folder=folder)
                runs[name, ranks].append(run(job))
    rows = [{"name": case[0], "ranks": case[1], **found[case], **timed(runs[case])} for case in cases]
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": rows}
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    print("| what | ranks | operations, G | CPU s | wall s | received, MB | held, MB |\n|" + " --- |" * 7)
    for row in rows:
        came = "–" if row["received_bytes"] is None else number(row["received_bytes"] / 1e6)
        cells = (row["flops"] / 1e9, row["cpu_s"], row["wall_s"])
        shown = [row["name"], str(row["ranks"]), *map(number, cells), came, number(row["extra_bytes"] / 1e6)]
        print(f"| {' | '.join(shown)} |")
    print(f"\nLoss and gradient are those of one process. Written: {args.out}/results.json")


if __name__ == "__main__":
    main()
