"""open_clip's ``local-dir:`` folders, ours among them: the weights read and held against the configuration here.

open_clip's own loader lets tensors be resized, broadcast or left out, and looks at no value. Towers are first built
without memory and held against the weights, as their sizes are a stranger's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloob.errors import InputError
from cloob.models.towers import open_clip, translated
from cloob.models.weights.clip_towers import MAX_LAYERS, build, filled, is_plain
from cloob.models.weights.fields import RESIZE_MODES, Fields
from cloob.models.weights.folders import file_tensors
from cloob.models.weights.keymap import check_fit, fill, same_names, surplus

_MOST = 1 << 16
_PREPROCESS = frozenset({"mode", "mean", "std", "interpolation", "resize_mode", "fill_color"})


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
    tensors = file_tensors(weights)
    _check(model_cfg, len(tensors), weights.stat().st_size)
    preprocess = fields.inside("preprocess_cfg").values if "preprocess_cfg" in config else {}
    _check_pixels(file, preprocess)
    if is_plain(model_cfg.values):
        known = {key: value for key, value in preprocess.items() if key in _PREPROCESS}
        model = build(model_cfg.values, known, str(file))
        return filled(model, weights, tensors, same_names(model))
    with translated(str(file)), torch.device("meta"):
        skeleton = _towers(model_cfg.values)
    plan = same_names(skeleton)
    ignored = surplus(tensors, plan)
    check_fit(skeleton, weights, tensors, plan, ignored)
    with translated(str(file)), torch.random.fork_rng(devices=[]):
        model = open_clip().create_model(f"local-dir:{file.parent}", load_weights=False, pretrained_text=False)
    fill(model, weights, tensors, plan, ignored)
    return model


def _towers(model_cfg: Mapping[str, Any]) -> nn.Module:
    """open_clip's module of towers from timm or Hugging Face, without any weights fetched."""
    library = open_clip()
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in model_cfg.items()}
    if "timm_model_name" in options["vision_cfg"]:
        options["vision_cfg"]["timm_model_pretrained"] = False
    from_hub = "hf_model_name" in options["text_cfg"]
    if from_hub:
        options["text_cfg"]["hf_model_pretrained"] = False
    kind = library.CLIP
    if options.pop("custom_text", False) or from_hub:
        kind = library.CoCa if "multimodal_cfg" in options else library.CustomTextCLIP
    module: nn.Module = kind(**options)
    return module


def _sides(vision: Fields) -> list[int]:
    """Height and width of the pictures."""
    sides = vision.values.get("image_size", 224)
    if not isinstance(sides, list):
        return [vision.integer("image_size", 224, most=_MOST)] * 2
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= _MOST for side in sides):
        raise vision.wrong("image_size", f"a whole number from 1 to {_MOST}, or two,")
    return sides


def _check_pixels(file: Path, preprocess: Mapping[str, Any]) -> None:
    fields = Fields(file, preprocess, "preprocess_cfg.")
    for key in ("mean", "std"):
        if key in preprocess:
            fields.channels(key, positive=key == "std")
    fields.one_of("mode", ("RGB",), "RGB")
    fields.one_of("interpolation", ("bicubic", "bilinear", "random"), "bicubic")
    fields.one_of("resize_mode", RESIZE_MODES, "shortest")
    fields.integer("fill_color", 0, least=0, most=255)


def _check(config: Fields, known: int, size: int) -> None:
    """Refuses sizes that no model has or ``known`` tensors of ``size`` bytes cannot be, before anything is built."""
    config.integer("embed_dim", most=_MOST)
    for side in (config.inside("vision_cfg"), config.inside("text_cfg")):
        layers = side.values.get("layers", 12)
        for count in layers if isinstance(layers, list) else [layers]:
            if type(count) is not int or not 0 < count <= MAX_LAYERS:
                raise side.wrong("layers", f"1 to {MAX_LAYERS} blocks")
            if "hf_model_name" not in side.values and "timm_model_name" not in side.values and count > known:
                raise side.wrong("layers", f"what the {known} tensors of the weights can be")
        for key in ("width", "heads", "head_width", "patch_size", "context_length", "vocab_size"):
            if side.values.get(key) is not None:
                side.integer(key, most=1 << 24 if key == "vocab_size" else _MOST)
        if side.values.get("output_tokens") and "multimodal_cfg" not in config.values:
            raise side.wrong("output_tokens", "false")
    vision, text = config.inside("vision_cfg"), config.inside("text_cfg")
    if not text.values.get("hf_model_name"):
        width = text.integer("width", 512)
        if width % text.integer("heads", 8):
            raise text.wrong("heads", f"a divisor of {width}")
    sides = _sides(vision)
    if not vision.values.get("timm_model_name"):
        width, head = vision.integer("width", 768), vision.integer("head_width", 64)
        if not isinstance(vision.values.get("layers"), list):
            if width % head:
                raise vision.wrong("head_width", f"a divisor of {width}")
            patch = vision.integer("patch_size", 16)
            if math.prod(side // patch for side in sides) * width > size:  # a computed table has memory at once
                raise vision.wrong("image_size", f"a picture that weights of {size} bytes are for")
    if not isinstance(config.values.get("quick_gelu", False), bool):
        raise InputError(f"{config.path}: model_cfg.quick_gelu is neither true nor false")
