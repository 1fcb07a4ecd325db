"""open_clip's towers from a configuration or from the shapes of weights, filled from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError, one_line
from cloob.models.importing import open_clip, translated
from cloob.models.weights.blocks import CLIP_MEAN, CLIP_STD, preprocess
from cloob.models.weights.keymap import Part, fill, without_memory


def infer_config(path: Path, tensors: Mapping[str, Tensor], text_heads: int | None = None) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a CLIP with QuickGELU, from the shapes of its weights.

    Heads are 64 wide, as in all of OpenAI's models; those of the text tower may be given.
    """

    def count(numbered: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(numbered, key))})

    try:
        vocabulary, width = tensors["token_embedding.weight"].shape
        text = {
            "context_length": len(tensors["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": width,
            "heads": text_heads or width // 64,
            "layers": count(r"transformer\.resblocks\.(\d+)\."),
        }
        if "visual.proj" in tensors:
            wide, _, patch, _ = tensors["visual.conv1.weight"].shape
            cells = len(tensors["visual.positional_embedding"])
            layers: Any = count(r"visual\.transformer\.resblocks\.(\d+)\.")
        else:
            wide, patch = len(tensors["visual.layer1.0.conv1.weight"]), None
            cells = len(tensors["visual.attnpool.positional_embedding"])
            layers = [count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
        side = (patch or 32) * math.isqrt(cells - 1)
        vision = {"image_size": side, "layers": layers, "width": wide, "patch_size": patch}
        embed_dim = tensors["text_projection"].shape[1]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{path}: not a CLIP model's weights ({one_line(error)})") from None
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def beside_its_name(path: Path) -> str:
    """What to write for a file of open_clip's that does not say its towers, for errors."""
    return f"NAME/FILE from within its folder (such as ViT-B-32/{path.name})"


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether open_clip builds the towers itself, so that they can be built without memory."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return "timm_model_name" not in vision and "hf_model_name" not in text and "multimodal_cfg" not in config


def build(config: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], where: str) -> Any:
    """open_clip's module of a config that ``is_plain``, on the meta device; InputError where it cannot be built."""
    library = open_clip()
    options = {key: value for key, value in config.items() if key != "custom_text"}
    kind = library.CustomTextCLIP if config.get("custom_text") else library.CLIP
    with translated(where), without_memory():
        model = kind(**options)
    clip = preprocess(model.visual.image_size, CLIP_MEAN, CLIP_STD, "bicubic")
    model.visual.preprocess_cfg = clip | dict(preprocess_cfg)
    return model


def filled(
    model: Any, path: Path, tensors: dict[str, Tensor], plan: Mapping[str, Part], ignored: Iterable[str] = ()
) -> Any:
    """The module with a file's weights, and with the causal mask that no file holds; arguments as of ``fill``."""
    fill(model, path, tensors, plan, ignored)
    for module in model.modules():
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor) and mask.is_meta:
            module.attn_mask = torch.full(mask.shape, -torch.inf).triu_(1)
    return model.eval()
