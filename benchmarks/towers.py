"""How fast the tiny towers train: forward, backward and AdamW of both towers at 64 px on this machine's CPU.

``python benchmarks/towers.py`` prints the table; ``--candidates`` adds the sizes that were weighed and not taken.
Each figure is the fastest of ``--steps`` steps after one that is not counted, with a plain InfoNCE on top: on a shared
machine the fastest step is the one that other work disturbed least.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import processor

from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.towers import TINY_MODELS, create_model, open_clip, translated

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
RESNET = {"layers": [2, 2, 2, 2], "width": 16, "head_width": 64, "image_size": 64}
VIT = {"layers": 4, "width": 192, "head_width": 32, "patch_size": 16, "image_size": 64}
CONVNEXT = {"timm_model_name": "test_convnext2", "image_size": 64}
CANDIDATES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resnet, blocks 1111": (RESNET | {"layers": [1, 1, 1, 1]}, TEXT),
    "resnet, width 20, blocks 1111": (RESNET | {"layers": [1, 1, 1, 1], "width": 20}, TEXT),
    "resnet, width 24, blocks 1111": (RESNET | {"layers": [1, 1, 1, 1], "width": 24}, TEXT),
    "resnet, text width 192": (RESNET, TEXT | {"width": 192, "heads": 3}),
    "resnet, text context 77": (RESNET, TEXT | {"context_length": 77}),
    "timm resnet10t": ({"timm_model_name": "resnet10t", "image_size": 64}, TEXT),
    "vit, patch 8, width 96": (VIT | {"patch_size": 8, "width": 96}, TEXT),
    "vit, patch 8, width 128": (VIT | {"patch_size": 8, "width": 128}, TEXT),
    "vit, width 256": (VIT | {"width": 256}, TEXT),
    "convnext zepto": (CONVNEXT | {"timm_model_name": "convnext_zepto_rms"}, TEXT),
    "convnext atto": (CONVNEXT | {"timm_model_name": "convnext_atto"}, TEXT),
}


def build(name: str) -> DualEncoder:
    """A tiny tower of ours, or a candidate."""
    if name in TINY_MODELS:
        return create_model(name, seed=0)
    vision, text = CANDIDATES[name]
    config = {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}
    library = open_clip()
    with translated(name):
        model = library.CLIP(**config)
        library.factory.set_model_preprocess_cfg(
            model, {"size": 64, "mean": library.OPENAI_DATASET_MEAN} | {"std": library.OPENAI_DATASET_STD}
        )
    return DualEncoder(
        name, model, library.SimpleTokenizer(context_length=text["context_length"]), EncoderConfig.open_clip(config)
    )


def pairs_per_second(encoder: DualEncoder, *, batch: int, steps: int, bfloat16: bool) -> float:
    """Pairs a second of the fastest step."""
    encoder.train()
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-4, fused=True)
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
    tokens = encoder.tokenizer([f"picture {i} of a red apple" for i in range(batch)])
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            image_features, text_features = encoder(images, tokens)
        F.cross_entropy(30 * image_features @ text_features.T, torch.arange(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return batch / min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--candidates", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, batch {options.batch}, 64 px\n")
    print("| tower | parameters, M | without token embedding, M | pairs/s float32 | pairs/s bfloat16 |")
    print("|---|---|---|---|---|")
    for name in [*TINY_MODELS, *(CANDIDATES if options.candidates else ())]:
        encoder = build(name)
        total = sum(p.numel() for p in encoder.parameters())
        rest = total - encoder.model.token_embedding.weight.numel()
        speeds = [
            pairs_per_second(encoder, batch=options.batch, steps=options.steps, bfloat16=bfloat16)
            for bfloat16 in (False, True)
        ]
        print(f"| {name} | {total / 1e6:.2f} | {rest / 1e6:.2f} | {speeds[0]:.0f} | {speeds[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
