"""The demo: the four members of the family on the pairs inside the package, alike in everything but the objective."""

from __future__ import annotations

from cloob.train.config import TrainConfig
from cloob.train.config.components import ObjectiveName


def _demo(objective: ObjectiveName) -> TrainConfig:
    """Sized for under two minutes on two CPU cores: 6,110 pairs of 64 pixels, six passes."""
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
        out=f"runs/demo/{objective}",
    )


def demo_cloob() -> TrainConfig:
    """CLOOB on the demo pairs: InfoLOOB with Hopfield retrieval, fixed τ⁻¹ and β."""
    return _demo("cloob")


def demo_clip() -> TrainConfig:
    """CLIP on the demo pairs: InfoNCE, learnable τ⁻¹."""
    return _demo("clip")


def demo_infoloob() -> TrainConfig:
    """InfoLOOB without retrieval on the demo pairs."""
    return _demo("infoloob")


def demo_infonce_hopfield() -> TrainConfig:
    """InfoNCE with Hopfield retrieval on the demo pairs."""
    return _demo("infonce-hopfield")
