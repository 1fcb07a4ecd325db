"""The paper's set-ups (Fürst et al. 2022, arXiv:2110.11316, and the authors' README)."""

from __future__ import annotations

from typing import Any

from cloob.train.config import TrainConfig


def _cc3m(**own: Any) -> TrainConfig:
    """Conceptual Captions: RN50, batch 512, 70 epochs, ten cosine cycles; the authors' table is tab-separated.

    The authors trained in float16 mixed precision; here bfloat16 takes its place.
    """
    return TrainConfig().override(
        data=("cc3m/train.csv",),
        image_column="filepath",
        caption_column="title",
        crop_scale=(0.9, 1.0),
        workers=8,
        model="RN50",
        image_size=224,
        lr=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        schedule="cosine-restarts",
        warmup=20_000,
        restarts=10,
        epochs=70,
        batch_size=512,
        precision="bf16",
        **own,
    )


def cc3m_cloob() -> TrainConfig:
    """The paper's CLOOB on Conceptual Captions: RN50, τ⁻¹ = 30, β = 8."""
    return _cc3m(objective="cloob", inv_tau=30.0, beta=8.0, scale="paper", out="runs/cc3m-cloob")


def cc3m_clip() -> TrainConfig:
    """The paper's CLIP on Conceptual Captions: RN50, τ⁻¹ learned from 1/0.07, at most 100."""
    return _cc3m(objective="clip", inv_tau=1 / 0.07, learnable_inv_tau=True, scale="unit", out="runs/cc3m-clip")
