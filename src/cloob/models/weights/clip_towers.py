"""open_clip's towers from a checked configuration, built without memory and filled from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cloob.errors import InputError
from cloob.models.towers import open_clip, translated
from cloob.models.weights.blocks import preprocess
from cloob.models.weights.keymap import Part, fill

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LAYERS = 256
_SCALING = (Tensor.__truediv__, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.mul, torch.div, torch.mul)
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.triu_)
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\..+")
_STAGE = re.compile(r"visual\.layer([1-4])\.(\d+)\..+")


class Unfilled(TorchFunctionMode):
    """Leaves out what gives fresh weights their values: without memory there are none.

    torch has the shapes of such operations from Python code that brings torch.compile, which takes longer than all
    else here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and "generator" not in kwargs and (empty := torch.empty(*args, **kwargs)).is_meta:
            return empty
        if func in _SCALING and len(args) == 2 and not kwargs:
            tensors = [value for value in args if isinstance(value, Tensor)]
            if len(tensors) == 1 and tensors[0].is_meta and tensors[0].is_floating_point():
                return torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device="meta")
        if func in _IN_PLACE or getattr(func, "__module__", "") == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def infer_config(path: Path, tensors: Mapping[str, Tensor], text_heads: int | None = None) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a CLIP with QuickGELU, from the shapes of its weights.

    Args:
        path: The file, for errors.
        tensors: By open_clip's names.
        text_heads: Of the text tower; None: a head is 64 wide, as in all of OpenAI's models. Heads of the image tower
            always are.

    Raises:
        InputError: A tensor that says a size is missing or has another number of dimensions.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        tensor = tensors.get(key)
        if tensor is None or len(tensor.shape) != dimensions or 0 in tensor.shape:
            state = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise InputError(f"{path}: not a CLIP model's weights: {key} is {state}")
        return tensor.shape

    vocabulary, width = shape("token_embedding.weight", 2)
    heads = text_heads or width // 64
    if not heads or width % heads:
        raise InputError(f"{path}: a text tower {width} wide cannot have {heads} heads")
    text = {
        "context_length": shape("positional_embedding", 2)[0],
        "vocab_size": vocabulary,
        "width": width,
        "heads": heads,
        "layers": _count(path, tensors, text=True),
    }
    return {
        "embed_dim": shape("text_projection", 2)[1],
        "quick_gelu": True,
        "vision_cfg": _infer_vision(path, tensors, shape),
        "text_cfg": text,
    }


def _infer_vision(path: Path, tensors: Mapping[str, Tensor], shape: Any) -> dict[str, Any]:
    if "visual.proj" in tensors:
        width, _, patch, _ = shape("visual.conv1.weight", 4)
        side = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
        if width % 64:
            raise InputError(f"{path}: an image tower {width} wide does not have heads of 64")
        layers = _count(path, tensors, text=False)
        return {"image_size": patch * side, "layers": layers, "width": width, "patch_size": patch}
    stages: list[set[int]] = [set(), set(), set(), set()]
    for key in tensors:
        if match := _STAGE.fullmatch(key):
            stages[int(match[1]) - 1].add(int(match[2]))
    width = shape("visual.layer1.0.conv1.weight", 4)[0]
    side = math.isqrt(shape("visual.attnpool.positional_embedding", 2)[0] - 1)
    if not all(0 < len(stage) <= MAX_LAYERS for stage in stages) or width * 32 % 64 or not side:
        raise InputError(f"{path}: not the image tower of a CLIP model")
    return {"image_size": side * 32, "layers": [len(stage) for stage in stages], "width": width, "patch_size": None}


def _count(path: Path, tensors: Mapping[str, Tensor], *, text: bool) -> int:
    numbers = {match[2] for key in tensors if (match := _BLOCK.fullmatch(key)) and (match[1] is None) == text}
    if not 0 < len(numbers) <= MAX_LAYERS:
        raise InputError(f"{path}: its {'text' if text else 'image'} tower has {len(numbers)} blocks")
    return len(numbers)


def beside_its_name(path: Path) -> str:
    """What to write for a file of open_clip's that does not say its towers, for errors."""
    return f"NAME/FILE from within its folder (such as ViT-B-32/{path.name})"


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether open_clip builds the towers itself, so that they can be built without memory."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    return "timm_model_name" not in vision and "hf_model_name" not in text and "multimodal_cfg" not in config


def build(config: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], where: str) -> Any:
    """open_clip's module on the meta device.

    Args:
        config: A ``model_cfg`` that ``is_plain``.
        preprocess_cfg: What differs from CLIP's own.
        where: What the error names.

    Raises:
        InputError: open_clip cannot build it.
    """
    library = open_clip()
    options = {key: value for key, value in config.items() if key != "custom_text"}
    kind = library.CustomTextCLIP if config.get("custom_text") else library.CLIP
    with translated(where), torch.device("meta"), Unfilled():
        model = kind(**options)
    clip = preprocess(model.visual.image_size, CLIP_MEAN, CLIP_STD, "bicubic")
    model.visual.preprocess_cfg = clip | dict(preprocess_cfg)
    return model


def filled(
    model: Any,
    path: Path,
    tensors: dict[str, Tensor],
    plan: Mapping[str, Part],
    ignored: frozenset[str] = frozenset(),
) -> Any:
    """The module with a file's weights, and with the causal mask that no file holds; errors as of ``fill``."""
    fill(model, path, tensors, plan, ignored)
    for module in model.modules():
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, torch.Tensor) and mask.is_meta:
            module.attn_mask = torch.full(mask.shape, -torch.inf).triu_(1)
    left = [name for name, value in _tensors(model) if value.is_meta]
    assert not left, left
    return model.eval()


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
