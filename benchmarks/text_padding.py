"""What leaving out the padding of captions is worth: training steps on real captions, padded and not, in turn.

``python benchmarks/text_padding.py``: forward pass, CLOOB's loss and backward pass in float32, of one batch of captions
drawn from ``--data`` (shards of the pictogram benchmark; skipped clearly without them) and noise for pictures. The
table has the medians of ``--rounds`` rounds and of the ratios within a round; results.json goes to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from towers import build

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor

from cloob.data.open import open_source
from cloob.models.encoder import DualEncoder
from cloob.models.texts import trimmed
from cloob.models.towers import create_model
from cloob.objective import ContrastiveObjective

MODELS = {"resnet, text context 77": 256, "ViT-B-32": 32}
"""Tower -> batch size; 64 pixels and 224."""
ROOT = Path(__file__).parents[1]


def seconds(encoder: DualEncoder, images: Tensor, tokens: Tensor, objective: ContrastiveObjective) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    objective(*encoder(images, tokens)).backward()
    encoder.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measure(name: str, batch: int, captions: list[str], rounds: int) -> dict[str, object]:
    """One row of the table."""
    encoder = (build(name) if "," in name else create_model(name, seed=0)).train()
    objective = ContrastiveObjective.cloob()
    generator = torch.Generator().manual_seed(0)
    size = encoder.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    padded = encoder.tokenizer(captions[:batch])
    short = trimmed(padded)
    times = [
        (seconds(encoder, images, padded, objective), seconds(encoder, images, short, objective))
        for _ in range(rounds + 1)
    ][1:]
    return {
        "tower": name,
        "batch": batch,
        "tokens": [padded.shape[1], short.shape[1]],
        "mean_length": round(float((padded.argmax(1) + 1).float().mean()), 1),
        "seconds_padded": statistics.median(a for a, _ in times),
        "seconds_trimmed": statistics.median(b for _, b in times),
        "ratio": statistics.median(a / b for a, b in times),
        "ratios": [a / b for a, b in times],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "pictograms" / "train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "text_padding")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: {options.data.name} is not there; --data names a folder of shards with captions")
        return
    torch.set_num_threads(options.threads)
    source = open_source(options.data)
    chosen = np.random.default_rng(0).choice(len(source), max(MODELS.values()), replace=False)
    captions = [source.read(int(i)).caption for i in chosen]
    machine = {"cpu": processor(), "threads": options.threads, "torch": torch.__version__}
    print(", ".join(map(str, machine.values())), "\n")
    print("| tower | batch | tokens padded, trimmed | s padded | s trimmed | ratio |\n|---|---|---|---|---|---|")
    rows = []
    for name, batch in MODELS.items():
        rows.append(row := measure(name, batch, captions, options.rounds))
        figures = f"{row['seconds_padded']:.2f} | {row['seconds_trimmed']:.2f} | {row['ratio']:.2f}"
        print(f"| {name} | {batch} | {row['tokens']} | {figures} |", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"machine": machine, "rows": rows}, indent=1)
    (options.out / "results.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
