"""What the loss exchanges over W ranks, computed and not measured: ``python
benchmarks/exchange.py [--rows 256]``.

The exchanges are those of docs/architecture.md: all-gathers and reduce-scatters of two
(N, D) float32 matrices, with N = rows · W. In a ring each brings a rank 8 N D (W − 1) /
W bytes in W − 1 steps. CLOOB has four (X and Y, the retrieved rows, and both
backwards), CLIP two, as open_clip's ClipLoss with ``--gather-with-grad``. Operations
are a rank's share of the objective: 68 N²D / W with retrieval; 12 N²D / W without, as
of ClipLoss with ``--local-loss``.
"""

from __future__ import annotations

import argparse

RANKS = (2, 8, 32, 128, 512, 1024)
BANDWIDTHS = {"25 Gb/s": 3.1e9, "400 Gb/s": 50e9, "NVLink, 400 GB/s": 400e9}
LATENCY = 5e-6  # seconds of a step of the ring
LOSSES = {"cloob": (4, 68), "clip, ClipLoss": (2, 12)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="of a rank")
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args()
    print(f"{args.rows} rows a rank, D = {args.dim}\n")
    print(
        "| W | N | loss | MB received | "
        + " | ".join(f"ms at {name}" for name in BANDWIDTHS)
        + " | TFLOP a rank |"
    )
    print("|---" * (5 + len(BANDWIDTHS)) + "|")
    for ranks in RANKS:
        batch = args.rows * ranks
        for loss, (exchanges, products) in LOSSES.items():
            size = exchanges * 8 * batch * args.dim * (ranks - 1) / ranks
            latency = exchanges * (ranks - 1) * LATENCY
            times = " | ".join(
                f"{1000 * (size / speed + latency):.1f}"
                for speed in BANDWIDTHS.values()
            )
            work = products * batch**2 * args.dim / ranks / 1e12
            print(
                f"| {ranks:,} | {batch:,} | {loss} | {size / 1e6:,.1f} | {times} |"
                f" {work:.3f} |"
            )


if __name__ == "__main__":
    main()
