"""Our loop beside a plain transcription of the authors' step: the same first weights,
batches and 100 steps of a ViT.

``python benchmarks/parity.py [--steps 100]`` prints the loss of both at some steps, and
the largest difference; in float64, where rounding does not hide a difference of the
steps themselves, or with ``--float32``. Rows:

- ``like ml-jku``: ``cloob.train`` with ``like_ml_jku = true``, their warm-up and decay
  groups; the claim is 5e-7;
- ``as shipped``: ``cloob.train`` without it;
- ``noise``: the transcription against itself, with first weights changed by 1e-7: what
  rounding alone does.

The transcription is written from the paper and from what their program does, not from
its code: unit rows, retrieval by a softmax, InfoLOOB with the positive at a logit of
-1000, times tau; AdamW; a linear warm-up from 0, then a cosine with restarts. Pictures
are those of the demo. Writes float64.json or float32.json to ``--out``."""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine

import cloob
from cloob.pictures import decode

PAIRS, BATCH, INV_TAU, BETA = 1280, 64, 30.0, 8.0
LR, DECAY, BETAS, EPS, WARMUP, RESTARTS = 5e-4, 0.1, (0.9, 0.98), 1e-8, 40, 2


class Towers(nn.Module):
    """A small ViT and a text transformer over a table of pairs; remembers the rows of
    the batches that it sees.
    """

    def __init__(self) -> None:
        super().__init__()
        encoder, source = (
            cloob.create_model("tiny-vit", seed=0),
            cloob.open_source("demo"),
        )
        samples = [source.read(i) for i in range(PAIRS)]
        self.model = encoder.model
        raw = (
            torch.stack(
                [encoder.preprocess(decode(sample.image)) for sample in samples]
            )
            / 255.0
        )
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (encoder.mean, encoder.std)
        )
        self.register_buffer("pixels", (raw - mean) / std, False)
        self.register_buffer(
            "tokens", encoder.tokenizer([s.caption for s in samples]), False
        )
        self.seen: list[Tensor] = []

    def forward(self, rows: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(rows)
        return self.model.encode_image(self.pixels[rows]), self.model.encode_text(
            self.tokens[same]
        )


class Rows(torch.utils.data.Dataset[tuple[int, int]]):
    def __len__(self) -> int:
        return PAIRS

    def __getitem__(self, row: int) -> tuple[int, int]:
        return row, row


def ours(towers: Towers, steps: int, *, like_ml_jku: bool) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        config = cloob.TrainConfig().override(
            objective="cloob", inv_tau=INV_TAU, beta=BETA, scale="paper", steps=steps, batch_size=BATCH, workers=0,
            lr=LR, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, warmup=WARMUP, restarts=RESTARTS,
            schedule="cosine-restarts", like_ml_jku=like_ml_jku, device="cpu", out=f"{folder}/run",
        )  # fmt: skip
        cloob.train(config, pairs=Rows(), towers=towers)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def theirs(towers: Towers, batches: list[Tensor]) -> list[float]:
    def retrieve(state: Tensor, stored: Tensor) -> Tensor:
        return F.normalize(F.softmax(BETA * state @ stored.T, dim=1) @ stored, dim=1)

    def loob(x: Tensor, y: Tensor) -> Tensor:
        logits, right = x @ y.T * INV_TAU, torch.eye(len(x), dtype=torch.bool)
        return (
            logits.masked_fill(right, -1000.0).logsumexp(1).mean()
            - logits.diagonal().mean()
        ) / INV_TAU

    def rate(step: int) -> float:
        if step < WARMUP:
            return step / WARMUP
        done = (step - WARMUP) / max(1, len(batches) - WARMUP)
        return 0.5 * (1 + math.cos(math.pi * (RESTARTS * done % 1.0)))

    named = [
        (name, weight)
        for name, weight in towers.named_parameters()
        if weight.requires_grad
    ]
    plain = [
        any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        for name, _ in named
    ]
    groups = [
        {
            "params": [
                weight
                for (_, weight), is_plain in zip(named, plain, strict=True)
                if is_plain
            ],
            "weight_decay": 0.0,
        },
        {
            "params": [
                weight
                for (_, weight), is_plain in zip(named, plain, strict=True)
                if not is_plain
            ]
        },
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    losses = []
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        x, y = (F.normalize(side, dim=1) for side in towers(rows, rows))
        loss = loob(retrieve(x, x), retrieve(y, x)) + loob(
            retrieve(y, y), retrieve(x, y)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--float32", action="store_true", help="as trained; half the time"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "parity"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = "float32" if args.float32 else "float64"
    first = Towers().to(getattr(torch, name))
    found = {}
    for row, like in (("like ml-jku", True), ("as shipped", False)):
        towers = copy.deepcopy(first)
        found[row] = ours(towers, args.steps, like_ml_jku=like)
        batches = towers.seen
    reference, moved = theirs(copy.deepcopy(first), batches), copy.deepcopy(first)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.mul_(
                1
                + 1e-7
                * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(0)
                ).to(weight)
            )
    found["noise"] = theirs(moved, batches)
    at = sorted({0, 1, 9, args.steps // 2 - 1, args.steps - 1})
    print(
        "| loss minus the transcription's | "
        + " | ".join(f"step {i + 1}" for i in at)
        + " | largest |"
    )
    print("|---" * (len(at) + 2) + "|")
    for row, losses in found.items():
        gaps = [a - b for a, b in zip(losses, reference, strict=True)]
        print(
            f"| {row} | "
            + " | ".join(f"{gaps[i]:+.0e}" for i in at)
            + f" | {max(map(abs, gaps)):.1e} |"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "losses": {"transcription": reference, **found}}
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
