"""What an evaluation does on the device: towers in eval mode, ranks of captions and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from benchmarks.on_gpu.losses import products
from benchmarks.on_gpu.record import Record
from benchmarks.on_gpu.timing import extra_bytes, seconds
from torch.nn import functional as F

from cloob.functional.ranking import mutual_ranks
from cloob.models.towers import create_model

REPEATS = 5


def measure(record: Record, device: torch.device, models: Sequence[str], batch: int, pairs: int) -> None:
    """Rows of pictures and texts a second, and of the time to rank all against all.

    Args:
        record: Where rows go.
        device: Where to compute.
        models: Towers.
        batch: Pictures at once.
        pairs: That are ranked, five captions a picture.
    """
    images = F.normalize(torch.randn(pairs, 512, device=device), dim=1)
    texts = F.normalize(torch.randn(5 * pairs, 512, device=device), dim=1)
    right = torch.stack([torch.arange(5 * pairs) // 5, torch.arange(5 * pairs)], dim=1).to(device)
    held = extra_bytes(lambda: mutual_ranks(images, texts, right), device)
    times = [seconds(lambda: mutual_ranks(images, texts, right), device) for _ in range(REPEATS)]
    record.row(what="ranks", pictures=pairs, captions=5 * pairs, median_s=statistics.median(times), extra_bytes=held)
    for model in models:
        if not record.has_time_for(model, 5.0):
            continue
        _towers(record, device, model, batch)


def _towers(record: Record, device: torch.device, model: str, batch: int) -> None:
    """Rows of one model: pictures and texts a second, copies to the device among it."""
    encoder = create_model(model, seed=0).eval().to(device)
    pixels = torch.randint(0, 256, (batch, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    tokens = torch.randint(1, 40_000, (batch, encoder.context_length))
    tokens[:, -1] = 49_407
    works = {"pictures": lambda: encoder.encode_image(pixels), "texts": lambda: encoder.encode_text(tokens)}
    for arithmetic in ("tf32", "bfloat16") if device.type == "cuda" else ("float32",):
        low = torch.autocast(device.type, dtype=torch.bfloat16, enabled=arithmetic == "bfloat16")
        with products(arithmetic), low:
            for what, work in works.items():
                held = extra_bytes(work, device)
                times = [seconds(work, device) for _ in range(REPEATS)]
                rate = batch / statistics.median(times)
                record.row(what=what, model=model, arithmetic=arithmetic, per_second=rate, extra_bytes=held)
