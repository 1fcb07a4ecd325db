"""open_clip's ``local-dir:`` folders, ours among them: the weights read and held against the configuration here.

open_clip's own loader lets tensors be resized, broadcast or left out, and looks at no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError
from cloob.models.towers import open_clip, translated
from cloob.models.weights.clip_towers import MAX_LAYERS, build, filled, is_plain
from cloob.models.weights.folders import file_tensors
from cloob.models.weights.formats.fields import Fields
from cloob.models.weights.keymap import fill, same_names

_MOST = 1 << 16
_PREPROCESS = frozenset({"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"})


def load(file: Path, config: dict[str, Any], weights: Path) -> Any:
    """open_clip's module with the weights of a folder.

    Args:
        file: ``open_clip_config.json``.
        config: What it says.
        weights: The file of weights.

    Raises:
        InputError: The configuration is none that a model can have, or the weights are not its own.
    """
    fields = Fields(file, config)
    model_cfg = fields.inside("model_cfg")
    _check(model_cfg)
    tensors = file_tensors(weights)
    preprocess = fields.inside("preprocess_cfg").values if "preprocess_cfg" in config else {}
    _check_pixels(file, preprocess)
    if is_plain(model_cfg.values):
        model = build(model_cfg.values, _known(preprocess), str(file))
        return filled(model, weights, tensors, same_names(model))
    with translated(str(file)), torch.random.fork_rng(devices=[]):
        model = open_clip().create_model(f"local-dir:{file.parent}", load_weights=False, pretrained_text=False)
    ignored = frozenset({"text.transformer.embeddings.position_ids"} & tensors.keys())
    fill(model, weights, tensors, same_names(model), ignored - model.state_dict().keys())
    return model


def _known(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in preprocess.items() if key in _PREPROCESS and key != "size"}


def _check_pixels(file: Path, preprocess: Mapping[str, Any]) -> None:
    fields = Fields(file, preprocess, "preprocess_cfg.")
    for key in ("mean", "std"):
        if key in preprocess:
            fields.channels(key, positive=key == "std")
    if "interpolation" in preprocess:
        fields.one_of("interpolation", ("bicubic", "bilinear", "random"))


def _check(config: Fields) -> None:
    """Refuses sizes that no model has, before anything is built."""
    config.whole("embed_dim", most=_MOST)
    for side in (config.inside("vision_cfg"), config.inside("text_cfg")):
        layers = side.values.get("layers", 12)
        for count in layers if isinstance(layers, list) else [layers]:
            if type(count) is not int or not 0 < count <= MAX_LAYERS:
                raise side.wrong("layers", f"1 to {MAX_LAYERS} blocks")
        for key in ("width", "heads", "head_width", "image_size", "context_length", "vocab_size"):
            if side.values.get(key) is not None and not isinstance(side.values[key], list):
                side.whole(key, most=1 << 24 if key == "vocab_size" else _MOST)
        if side.values.get("patch_size") is not None:
            side.whole("patch_size", most=_MOST)
    text, vision = config.inside("text_cfg").values, config.inside("vision_cfg").values
    if text.get("width", 512) % text.get("heads", 8):
        raise config.inside("text_cfg").wrong("heads", f"a divisor of {text.get('width', 512)}")
    if "timm_model_name" not in vision and not isinstance(vision.get("layers"), list):
        width, head = vision.get("width", 768), vision.get("head_width", 64)
        if width % head:
            raise config.inside("vision_cfg").wrong("head_width", f"a divisor of {width}")
    if not isinstance(config.values.get("quick_gelu", False), bool):
        raise InputError(f"{config.path}: model_cfg.quick_gelu is neither true nor false")
