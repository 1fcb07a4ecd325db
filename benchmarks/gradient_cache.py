"""Memory and time of one training step under gradient caching, by micro-batch size.

``python benchmarks/gradient_cache.py [--model tiny-resnet] [--batch-size 512]`` takes a CLOOB step on random pixels
and tokens: as a whole batch, and with micro-batches of decreasing size. ``activations`` is what autograd keeps for the
backward pass at most at a time; ``peak`` is the peak memory of a fresh process less what it held before the step,
which is its first: ``seconds`` has the warm-up in it.
Prints a table and writes it to ``benchmarks/results/gradient_cache/results.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine

from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.training.step import Stepper, TowersWithLoss

OUT = Path(__file__).parent / "results" / "gradient_cache"


class Alive:
    """Bytes that saved tensors hold: now, and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)


class _Held:
    def __init__(self, alive: Alive, tensor: Tensor) -> None:
        self.alive, self.tensor = alive, tensor
        alive.now += tensor.nbytes
        alive.most = max(alive.most, alive.now)

    def __del__(self) -> None:
        self.alive.now -= self.tensor.nbytes


def measure(model: str, batch_size: int, micro_batch_size: int) -> dict[str, float]:
    """One step in this process."""
    encoder = create_model(model, seed=0)
    module = TowersWithLoss(encoder, make_objective("cloob")).train()
    stepper = Stepper(module, torch.optim.AdamW(module.parameters()), micro_batch_size=micro_batch_size)
    generator = torch.Generator().manual_seed(0)
    side = encoder.image_size
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = encoder.tokenizer([f"caption {i}" for i in range(batch_size)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alive = Alive()
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda held: held.tensor):
        stepper(images, tokens, None, 1e-4)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"micro_batch_size": micro_batch_size, "activations": alive.most, "peak": peak * 1024, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-resnet")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.model, arguments.batch_size, arguments.one)))
        return
    rows = []
    for micro in (0, *(arguments.batch_size // parts for parts in (2, 4, 8, 16))):
        command = [sys.executable, __file__, "--model", arguments.model, "--batch-size", str(arguments.batch_size)]
        done = subprocess.run([*command, "--one", str(micro)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{arguments.model}, batch {arguments.batch_size}, torch {torch.__version__}\n")
    print("| micro-batch | activations, MB | peak, MB | seconds |\n|---|---|---|---|")
    for row in rows:
        name = row["micro_batch_size"] or "whole batch"
        print(f"| {name} | {row['activations'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} | {row['seconds']:.2f} |")
    OUT.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "model": arguments.model, "batch_size": arguments.batch_size, "rows": rows}
    (OUT / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
