"""What open_clip's configurations hold: the keys that are read, and their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Required, TypedDict

JsonObject = dict[str, Any]
"""What a program wrote as JSON: any value may be missing, or be of another kind."""


class Pixels(TypedDict, total=False):
    """A ``preprocess_cfg``: how a picture becomes pixels; ``interpolation`` may be
    ``"lanczos"`` as well.
    """

    size: int
    mode: str
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    resize_mode: str
    fill_color: int


class TextConfig(TypedDict, total=False):
    """A ``text_cfg``."""

    context_length: int
    vocab_size: int
    width: int
    heads: int
    layers: int
    mlp_ratio: float
    hf_model_name: str
    hf_tokenizer_name: str
    tokenizer_mode: str
    tokenizer_kwargs: dict[str, object]
    act_kwargs: dict[str, object]


class VisionConfig(TypedDict, total=False):
    """A ``vision_cfg``; a ResNet has four numbers of layers."""

    image_size: int
    layers: int | list[int]
    width: int
    patch_size: int | None
    head_width: int
    mlp_ratio: float
    timm_model_name: str
    act_kwargs: dict[str, object]


class ModelConfig(TypedDict, total=False):
    """A ``model_cfg``."""

    embed_dim: Required[int]
    text_cfg: Required[TextConfig]
    vision_cfg: Required[VisionConfig]
    multimodal_cfg: dict[str, object]
    custom_text: bool
    quick_gelu: bool
    init_logit_bias: float | None
