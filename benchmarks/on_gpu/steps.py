"""A training step of RN50 and of ViT-B-32 on batches in page-locked memory, beside open_clip_train's own loop.

Both get what their own data pipelines hand out: ours raw pixels (uint8), open_clip_train normalised ones (float32).
Data are not decoded here. Blocks of steps are interleaved, and each ends with a look at its last loss.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.on_gpu.losses import products
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.timing import extra_bytes, seconds
from torch import Tensor

from cloob.data.batch import Batch
from cloob.data.copies import Copies
from cloob.distributed import Layout
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.train.config.run import OptimConfig
from cloob.train.optim import make_optimizer
from cloob.train.step import Stepper, TowersWithLoss

THEIRS = "open_clip_train"
Block = Callable[[], object]


def measure(record: Record, device: torch.device, models: dict[str, int], block: int, rounds: int) -> None:
    """A row for each contender and model.

    Args:
        record: Where rows go.
        device: Where to train.
        models: Names with the pairs of a batch.
        block: Steps that are timed together.
        rounds: Blocks of each contender.
    """
    for model, pairs in models.items():
        _one_model(record, device, model, pairs, block, rounds)


def _one_model(record: Record, device: torch.device, model: str, pairs: int, block: int, rounds: int) -> None:
    precision = "bf16" if device.type == "cuda" else "fp32"
    makers: dict[str, Callable[[], Block]] = {
        "cloob": lambda: _ours(model, pairs, block, device, precision, "cloob"),
        "cloob, clip loss": lambda: _ours(model, pairs, block, device, precision, "clip"),
        "cloob, clip loss, channels first": lambda: _ours(model, pairs, block, device, precision, "clip", last=False),
        THEIRS: lambda: _theirs(model, pairs, block, device, precision),
    }
    blocks: dict[str, Block] = {}
    times: dict[str, list[float]] = {}
    held: dict[str, int | None] = {}
    for name, make in makers.items():
        if not record.has_time_for(f"{name}, {model}", 0.0 if not held else 10.0):
            continue
        try:
            blocks[name] = make()
            with products("tf32"):
                held[name] = extra_bytes(blocks[name], device)  # and warms up
            times[name] = []
        except Exception as error:  # a package that is not there, or memory
            record.skip(f"{name}, {model}", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
            blocks.pop(name, None)
    for _ in range(rounds):
        for name, run in blocks.items():
            expected = times[name][-1] if times[name] else 0.0
            if record.has_time_for(f"another round of {name}, {model}", expected, share=0.3):
                with products("tf32"):
                    times[name].append(seconds(run, device))
    rates = {name: [pairs * block / took for took in taken] for name, taken in times.items() if taken}
    for name, found in rates.items():
        beside = rates.get(THEIRS, [])
        ratios = [a / b for a, b in zip(found, beside, strict=False)]
        record.row(
            what=name,
            model=model,
            pairs=pairs,
            precision=precision,
            pairs_per_second=statistics.median(found),
            rounds=found,
            extra_bytes=held[name],
            ratio=statistics.median(ratios) if ratios else None,
        )


def _ours(
    model: str, pairs: int, block: int, device: torch.device, precision: str, objective: str, *, last: bool = True
) -> Block:
    """A block of steps as ``cloob train`` takes them, with the numbers read at its end."""
    encoder = create_model(model, seed=0).train()
    encoder.set_channels_last(last)
    encoder.to(device)
    loss = make_objective(objective).to(device)
    optimizer = make_optimizer(encoder, loss, OptimConfig(lr=1e-4), device)
    late = device.type == "cuda"
    stepper = Stepper(TowersWithLoss(encoder, loss, precision).train(), optimizer, late=late)
    copies, size = Copies(device), encoder.image_size
    batch = _pinned(
        Batch(
            torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8),
            _tokens(pairs, encoder.context_length),
            torch.arange(pairs),
            tuple(map(str, range(pairs))),
        ),
        device,
    )

    def run() -> None:
        for _ in range(block):
            moved = copies(batch)
            if late:
                launched = stepper.launch(moved.images, moved.tokens, None, 1e-4, layout=Layout((pairs,)))
            else:
                stepper(moved.images, moved.tokens, None, 1e-4)
        if late:
            launched.numbers.tolist()

    return run


def _pinned(batch: Batch, device: torch.device) -> Batch:
    return batch.pin_memory() if device.type == "cuda" else batch


def _tokens(pairs: int, length: int) -> Tensor:
    """Captions that fill the context, so that both sides compute all of it."""
    tokens = torch.randint(1, 40_000, (pairs, length))
    tokens[:, -1] = 49_407
    return tokens


class _Data:
    """What ``train_one_epoch`` asks of a data set: the same batch again and again."""

    def __init__(self, images: Tensor, tokens: Tensor, block: int) -> None:
        self.batch = (images, tokens)
        self.num_batches, self.num_samples = block, block * len(images)
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on it."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.num_batches)


def _theirs(model: str, pairs: int, block: int, device: torch.device, precision: str) -> Block:
    """A block of open_clip_train's own ``train_one_epoch``, with its optimiser's settings."""
    from open_clip import create_loss, create_model_and_transforms
    from open_clip_train.params import parse_args
    from open_clip_train.train import train_one_epoch

    logging.getLogger().setLevel(logging.WARNING)
    words = ["--model", model, "--batch-size", str(pairs), "--skip-scheduler", "--lr", "1e-4"]
    words += ["--precision", "amp_bf16" if precision == "bf16" else "fp32", "--device", str(device)]
    args: Any = parse_args(words)
    vars(args).update(distributed=False, rank=0, local_rank=0, world_size=1, distill=False, wandb=False)
    towers, _, _ = create_model_and_transforms(model, precision=args.precision, device=device, output_dict=True)
    named = [(name, p) for name, p in towers.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))]
    chosen = {id(p) for p in plain}
    rest = [p for _, p in named if id(p) not in chosen]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": args.wd}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=args.eps)
    size = towers.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    images, tokens = torch.randn(pairs, 3, height, width), _tokens(pairs, towers.context_length)
    if device.type == "cuda":
        images, tokens = images.pin_memory(), tokens.pin_memory()
    data, loss = {"train": _Data(images, tokens, block)}, create_loss(args)
    return lambda: train_one_epoch(towers, data, loss, 0, optimizer, None, None, None, args)
