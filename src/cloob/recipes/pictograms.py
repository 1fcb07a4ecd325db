"""Small runs on a CPU: 64-pixel pictures of a few ten thousand pairs, the members of the family alike."""

from __future__ import annotations

from cloob.training.config import TrainConfig
from cloob.training.config.model import ObjectiveName


def _pictograms(objective: ObjectiveName) -> TrainConfig:
    """``--data`` is yours to give: a folder of WebDataset tars, or any other pairs; ``--model tiny-vit`` works too.

    Batch, learning rate and decay are those of the first runs in docs/log.md, not tuned.
    """
    return TrainConfig().override(
        data=("pictograms/train",),
        workers=1,
        model="tiny-resnet",
        objective=objective,
        lr=1e-3,
        weight_decay=0.1,
        schedule="cosine",
        epochs=24,
        batch_size=128,
        out=f"runs/pictograms/{objective}",
    )


def pictograms_cloob() -> TrainConfig:
    """CLOOB on small pictures on a CPU: tiny-resnet at 64 pixels, batch 128, 24 epochs."""
    return _pictograms("cloob")


def pictograms_cloob_warm() -> TrainConfig:
    """CLOOB whose retrieval joins after half of the run, alike in everything else (why: docs/log.md)."""
    return _pictograms("cloob").override(retrieval_from=0.5, out="runs/pictograms/cloob-warm")


def pictograms_clip() -> TrainConfig:
    """CLIP on small pictures on a CPU, alike in everything else."""
    return _pictograms("clip")


def pictograms_infoloob() -> TrainConfig:
    """InfoLOOB without retrieval on small pictures on a CPU, alike in everything else."""
    return _pictograms("infoloob")


def pictograms_infonce_hopfield() -> TrainConfig:
    """InfoNCE with Hopfield retrieval on small pictures on a CPU, alike in everything else."""
    return _pictograms("infonce-hopfield")


def pictograms_siglip() -> TrainConfig:
    """SigLIP's sigmoid loss on small pictures on a CPU, alike in everything else."""
    return _pictograms("siglip")
