"""Time and memory of image-text retrieval ranks, both ways, without the matrix of all scores.

``python benchmarks/retrieval.py [--sizes 10000 20000 100000] [--dim 512]`` ranks N images against N texts, each size in
a fresh process:

- ``chunked``: ``cloob.evaluation.measures.retrieval.retrieval_ranks``, blocks of 4096 × 4096 scores;
- ``matrix``: the N × N scores at once and a top-10 of each side, as evaluation scripts do it, up to ``--matrix-until``.

Peak memory is that of the whole process (VmHWM), with Python, torch and the embeddings (2 · 4 · N · D bytes). Time is
of the ranks alone; ``load`` says how many processes wanted the cores when it ended (5-minute average). Both must give
the same recalls. Writes results.json to ``--out``; rows of other sizes that it holds from the same machine stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine as this_machine

from cloob.evaluation.measures.retrieval import retrieval_ranks

KS = (1, 5, 10)
NOISE = 6.0  # of a text around its image, in units of the image's norm: recalls in between nothing and all


def embeddings(n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit rows; text i is a noisy copy of image i."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(n, dim), dim=1)
    texts = torch.randn(n, dim).mul_(NOISE / dim**0.5).add_(images)
    return images, F.normalize(texts, dim=1)


def chunked(images: Tensor, texts: Tensor) -> dict[str, float]:
    ranks = retrieval_ranks(images, texts)
    found = {"image_to_text": ranks.image_to_text, "text_to_image": ranks.text_to_image}
    return {f"{way}@{k}": float((rank < k).double().mean()) for way, rank in found.items() for k in KS}


def matrix(images: Tensor, texts: Tensor) -> dict[str, float]:
    scores = images @ texts.T
    found = {}
    for way, way_scores in (("image_to_text", scores), ("text_to_image", scores.T)):
        hits = way_scores.topk(max(KS), dim=1).indices == torch.arange(len(images))[:, None]
        found |= {f"{way}@{k}": float(hits[:, :k].any(1).double().mean()) for k in KS}
    return found


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands the parent's ru_maxrss down to a fresh process; VmHWM is its own
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, n: int, dim: int) -> dict[str, Any]:
    """One row; for a fresh process only."""
    images, texts = embeddings(n, dim)
    ready = peak_bytes()
    start = time.perf_counter()
    recalls = {"chunked": chunked, "matrix": matrix}[name](images, texts)
    seconds = time.perf_counter() - start
    return {
        "name": name,
        "n": n,
        "dim": dim,
        "seconds": seconds,
        "load": os.getloadavg()[1],
        "peak_bytes": peak_bytes(),
        "peak_bytes_with_the_embeddings_ready": ready,
        "bytes_of_all_scores": 4 * n * n,
        "gflops": 2.0 * n * n * dim / seconds / 1e9,
        "recalls": recalls,
    }


def in_fresh_process(name: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--sizes", str(n), "--dim", str(args.dim)]
    done = subprocess.run([*command, "--threads", str(args.threads)], check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def machine(args: argparse.Namespace) -> dict[str, Any]:
    about = this_machine()
    about.pop("load_average", None)  # each row has its own, and rows of the same machine stay
    return about | {"threads": args.threads}


def earlier(path: Path, about: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of sizes that are not measured anew."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("machine") != about:
        return []
    return [row for row in found["rows"] if row["n"] not in args.sizes or row["dim"] != args.dim]


def check_equal(rows: list[dict[str, Any]]) -> None:
    """Both ways of computing agree, up to one sample whose scores tie within rounding."""
    for row in rows:
        for other in rows:
            if other["n"] == row["n"]:
                for key, value in row["recalls"].items():
                    assert abs(value - other["recalls"][key]) <= 1.5 / row["n"], (row["n"], key)


def print_table(rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'N':>9} {'D':>5}  {'what':<8} {'seconds':>9} {'peak GB':>8} {'N×N GB':>7} {'GFLOP/s':>8} {'R@1 i→t':>8}")
    for row in rows:
        gb = (row["peak_bytes"] / 1e9, row["bytes_of_all_scores"] / 1e9)
        recall = row["recalls"]["image_to_text@1"]
        print(
            f"{row['n']:>9,} {row['dim']:>5}  {row['name']:<8} {row['seconds']:>9.1f} {gb[0]:>8.2f} {gb[1]:>7.1f} "
            f"{row['gflops']:>8.0f} {100 * recall:>7.1f}%"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 20_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--matrix-until", type=int, default=20_000, help="largest N of the full matrix")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval")
    parser.add_argument("--one", choices=("chunked", "matrix"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, args.sizes[0], args.dim)))
        return
    about = machine(args)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = earlier(args.out / "results.json", about, args)
    for n in args.sizes:
        for name in ("chunked", "matrix") if n <= args.matrix_until else ("chunked",):
            print(f"{name}, N = {n:,} …", file=sys.stderr, flush=True)
            rows.append(in_fresh_process(name, n, args))
            check_equal(rows)
            rows.sort(key=lambda row: (row["n"], row["name"]))
            (args.out / "results.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print_table(rows, about)
    print(f"written: {args.out}/results.json")


if __name__ == "__main__":
    main()
