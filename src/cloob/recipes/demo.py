"""The demo: the members of the family on the pairs inside the package, on frozen encoders or from scratch."""

from __future__ import annotations

from typing import Any

from cloob.recipes.trained import align
from cloob.training.config import TrainConfig
from cloob.training.config.model import ObjectiveName


def _demo(objective: ObjectiveName, **own: Any) -> TrainConfig:
    """Heads on two small frozen encoders whose weights come inside packages (the extra ``align``).

    The settings are those that benchmarks/demo_search.py found, each method with the same effort, on held-out pairs of
    the demo's training set.
    """
    start = align().override(
        val_data=(),
        patience=0,
        best="val_loss",
        image_size=160,  # of pictures of 64: half the time of the encoder's own 224
        objective=objective,
        head="mlp",
        epochs=15,
        batch_size=128,
        log_every=10,
        workers=0,
        out=f"runs/demo/{objective}",
    )
    return start.override(**own)


def demo_cloob() -> TrainConfig:
    """CLOOB on the demo pairs, heads on frozen encoders: InfoLOOB with Hopfield retrieval, fixed τ⁻¹ and β."""
    return _demo("cloob", inv_tau=10.0, beta=8.0, lr=1e-3, head_dropout=0.5)


def demo_clip() -> TrainConfig:
    """CLIP on the demo pairs, heads on frozen encoders: InfoNCE."""
    return _demo("clip", inv_tau=14.0, learnable_inv_tau=False, lr=1e-3, head_dropout=0.3)


def demo_infoloob() -> TrainConfig:
    """InfoLOOB without retrieval on the demo pairs, heads on frozen encoders."""
    return _demo("infoloob", inv_tau=14.0, lr=5e-4, head_dropout=0.3)


def demo_infonce_hopfield() -> TrainConfig:
    """InfoNCE with Hopfield retrieval on the demo pairs, heads on frozen encoders; CLOOB's settings, not tuned."""
    return _demo("infonce-hopfield", inv_tau=10.0, beta=8.0, lr=1e-3, head_dropout=0.5)


def demo_siglip() -> TrainConfig:
    """SigLIP's sigmoid loss on the demo pairs, heads on frozen encoders; CLIP's settings, not tuned."""
    return _demo("siglip", lr=1e-3, head_dropout=0.3)


def demo_siglip_hopfield() -> TrainConfig:
    """SigLIP's sigmoid loss on retrieved embeddings, heads on frozen encoders; CLOOB's settings, not tuned."""
    return _demo("siglip-hopfield", beta=8.0, lr=1e-3, head_dropout=0.5)


def _scratch(objective: ObjectiveName) -> TrainConfig:
    """Both towers from random weights, sized for under two minutes on two CPU cores; alike but for the objective."""
    return TrainConfig().override(
        data=("demo",),
        workers=0,  # decoding 64-pixel images costs little, and two cores have none to spare
        model="tiny-resnet",
        objective=objective,
        lr=1e-3,
        weight_decay=0.1,
        warmup=40,
        schedule="cosine",
        epochs=6,
        batch_size=128,
        log_every=10,
        out=f"runs/demo-scratch/{objective}",
    )


def demo_scratch_cloob() -> TrainConfig:
    """CLOOB on the demo pairs from random weights: InfoLOOB with Hopfield retrieval, fixed τ⁻¹ and β."""
    return _scratch("cloob")


def demo_scratch_clip() -> TrainConfig:
    """CLIP on the demo pairs from random weights: InfoNCE, learnable τ⁻¹."""
    return _scratch("clip")


def demo_scratch_infoloob() -> TrainConfig:
    """InfoLOOB without retrieval on the demo pairs from random weights."""
    return _scratch("infoloob")


def demo_scratch_infonce_hopfield() -> TrainConfig:
    """InfoNCE with Hopfield retrieval on the demo pairs from random weights."""
    return _scratch("infonce-hopfield")


def demo_scratch_siglip() -> TrainConfig:
    """SigLIP's sigmoid loss on the demo pairs from random weights, learnable τ⁻¹ and bias."""
    return _scratch("siglip")


def demo_scratch_siglip_hopfield() -> TrainConfig:
    """SigLIP's sigmoid loss with Hopfield retrieval on the demo pairs from random weights."""
    return _scratch("siglip-hopfield")
