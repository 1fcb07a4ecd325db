"""OpenAI's CLIP: a TorchScript archive or a state_dict; QuickGELU, heads of 64, and open_clip's names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import HUB_WEIGHTS_FILES
from cloob.models.weights.clip_towers import beside_its_name, build, filled, infer_config
from cloob.models.weights.containers import TorchFile
from cloob.models.weights.keymap import same_names
from cloob.models.weights.scales import clip_objective, scale_of
from cloob.models.weights.tokens import clip_tokenizer

logger = logging.getLogger(__name__)

_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})
_OPEN_CLIP_STEMS = frozenset(Path(name).stem for name in HUB_WEIGHTS_FILES)
_HALVED = frozenset({torch.float16, torch.float32})


def matches(file: TorchFile) -> bool:
    """Whether a torch file holds a CLIP: an archive, or a dictionary of tensors with OpenAI's names."""
    return file.scripted or (isinstance(file.value, dict) and "text_projection" in file.value)


def load(file: TorchFile) -> DualEncoder:
    """The encoder; InputError where the file's weights are not those of a CLIP."""
    path = file.path
    tensors = file.tensors(file.value, "the archive" if file.scripted else "the file")
    if not file.scripted and not _SIZES & tensors.keys():
        _check_whose(path, tensors)
    config = infer_config(path, tensors)
    _check_sizes(path, tensors, config)
    model = build(config, {}, str(path))
    model = filled(model, path, tensors, same_names(model), _SIZES & tensors.keys())
    text = config["text_cfg"]
    tokenizer = clip_tokenizer(path, text["vocab_size"], text["context_length"], _SPECIALS, "kept")
    objective = clip_objective(scale_of(path, "logit_scale", model.logit_scale))
    return DualEncoder(path.stem, model, tokenizer, EncoderConfig.open_clip(config), objective)


def _check_whose(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses weights that are open_clip's by their file's name, and warns where nothing says that they are OpenAI's.

    Both have the same keys, and neither activation nor heads are in the weights. OpenAI's are part float16.
    """
    if path.stem in _OPEN_CLIP_STEMS:
        raise InputError(
            f"{path}: open_clip's weights, which do not say their towers; give the folder, if open_clip_config.json "
            f"is in it, or {beside_its_name(path)}"
        )
    if {tensor.dtype for tensor in tensors.values()} != _HALVED:
        logger.warning(
            "%s: taken for OpenAI's weights: QuickGELU and heads of 64; if they are open_clip's, give %s",
            path,
            beside_its_name(path),
        )


def _check_sizes(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Holds the archive's three numbers against the shapes of its weights."""
    shapes = {
        "input_resolution": config["vision_cfg"]["image_size"],
        "context_length": config["text_cfg"]["context_length"],
        "vocab_size": config["text_cfg"]["vocab_size"],
    }
    for key in _SIZES & tensors.keys():
        tensor = tensors[key]
        if tensor.shape != () or tensor.dtype != torch.int64:
            raise InputError(f"{path}: {key} is no whole number")
        if int(tensor) != shapes[key]:
            raise InputError(f"{path}: {key} is {int(tensor)}, but its weights are of a model with {shapes[key]}")
