"""The paper's set-ups (Fürst et al. 2022, arXiv:2110.11316, and the authors' README).

Published is the command for Conceptual Captions alone. What is our choice elsewhere says so.
"""

from __future__ import annotations

from typing import Any

from cloob.training.config import TrainConfig

_CLOOB: dict[str, Any] = {"objective": "cloob", "inv_tau": 30.0, "beta": 8.0, "scale": "paper"}
_CLIP: dict[str, Any] = {"objective": "clip", "inv_tau": 1 / 0.07, "learnable_inv_tau": True, "scale": "unit"}


def _cc3m(**overrides: Any) -> TrainConfig:
    """Conceptual Captions: RN50, batch 512, 70 epochs, ten cosine cycles; the authors' table is tab-separated.

    The authors trained in float16 mixed precision; here bfloat16 takes its place, on a GPU that has it.
    """
    start = TrainConfig().override(
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
        precision="auto",
    )
    return start.override(**overrides)


def cc3m_cloob() -> TrainConfig:
    """The paper's CLOOB on Conceptual Captions: RN50, τ⁻¹ = 30, β = 8."""
    return _cc3m(**_CLOOB, out="runs/cc3m-cloob")


def cc3m_clip() -> TrainConfig:
    """The paper's CLIP on Conceptual Captions: RN50, τ⁻¹ learned from 1/0.07, at most 100."""
    return _cc3m(**_CLIP, out="runs/cc3m-clip")


def cc3m_infoloob() -> TrainConfig:
    """The ablation on Conceptual Captions: InfoLOOB without retrieval.

    The ablation's own settings are not published; these are CLOOB's.
    """
    return _cc3m(**{**_CLOOB, "objective": "infoloob", "beta": None}, out="runs/cc3m-infoloob")


def cc3m_infonce_hopfield() -> TrainConfig:
    """The ablation on Conceptual Captions: InfoNCE with Hopfield retrieval.

    The ablation's own settings are not published; these are CLOOB's, τ⁻¹ and β included.
    """
    return _cc3m(**{**_CLOOB, "objective": "infonce-hopfield"}, out="runs/cc3m-infonce-hopfield")


def _yfcc(model: str, **overrides: Any) -> TrainConfig:
    """CLIP's YFCC subset as WebDataset tars with their sizes.json, at the model's own image size.

    Of the authors' YFCC command only τ⁻¹ = 30 is known, from the notebook for their checkpoint. Everything else here
    (learning rate, schedule, batch, epochs, β) is our choice: Conceptual Captions' settings.
    """
    return _cc3m(data=("yfcc15m",), model=model, image_size=None, **overrides)


def yfcc_rn50_cloob() -> TrainConfig:
    """CLOOB on YFCC15M with RN50; τ⁻¹ = 30 is the authors', the rest CC3M's settings (our choice)."""
    return _yfcc("RN50", **_CLOOB, out="runs/yfcc-rn50-cloob")


def yfcc_rn50_clip() -> TrainConfig:
    """CLIP on YFCC15M with RN50; CC3M's settings (our choice)."""
    return _yfcc("RN50", **_CLIP, out="runs/yfcc-rn50-clip")


def yfcc_rn101_cloob() -> TrainConfig:
    """CLOOB on YFCC15M with RN101; CC3M's settings (our choice)."""
    return _yfcc("RN101", **_CLOOB, out="runs/yfcc-rn101-cloob")


def yfcc_rn101_clip() -> TrainConfig:
    """CLIP on YFCC15M with RN101; CC3M's settings (our choice)."""
    return _yfcc("RN101", **_CLIP, out="runs/yfcc-rn101-clip")


def yfcc_rn50x4_cloob() -> TrainConfig:
    """CLOOB on YFCC15M with RN50x4 at 288 pixels; CC3M's settings (our choice)."""
    return _yfcc("RN50x4", **_CLOOB, out="runs/yfcc-rn50x4-cloob")


def yfcc_rn50x4_clip() -> TrainConfig:
    """CLIP on YFCC15M with RN50x4 at 288 pixels; CC3M's settings (our choice)."""
    return _yfcc("RN50x4", **_CLIP, out="runs/yfcc-rn50x4-clip")


def _vit(model: str, **overrides: Any) -> TrainConfig:
    """A vision transformer on YFCC15M; not in the paper, all our choice.

    AdamW's settings are CLIP's for vision transformers (Radford et al. 2021), as open_clip_train has them by default.
    A user of the authors' tracker found such encoders behind the ResNets on YFCC, for CLIP and CLOOB alike.
    """
    return _yfcc(model, lr=5e-4, weight_decay=0.2, beta2=0.98, eps=1e-6, **overrides)


def yfcc_vit_b_32_cloob() -> TrainConfig:
    """CLOOB on YFCC15M with ViT-B/32; not in the paper, CLIP's settings of AdamW."""
    return _vit("ViT-B-32", **_CLOOB, out="runs/yfcc-vit-b-32-cloob")


def yfcc_vit_b_32_clip() -> TrainConfig:
    """CLIP on YFCC15M with ViT-B/32; not in the paper, CLIP's settings of AdamW."""
    return _vit("ViT-B-32", **_CLIP, out="runs/yfcc-vit-b-32-clip")


def yfcc_vit_b_16_cloob() -> TrainConfig:
    """CLOOB on YFCC15M with ViT-B/16; not in the paper, CLIP's settings of AdamW."""
    return _vit("ViT-B-16", **_CLOOB, out="runs/yfcc-vit-b-16-cloob")


def yfcc_vit_b_16_clip() -> TrainConfig:
    """CLIP on YFCC15M with ViT-B/16; not in the paper, CLIP's settings of AdamW."""
    return _vit("ViT-B-16", **_CLIP, out="runs/yfcc-vit-b-16-clip")
