"""OpenAI's CLIP: a TorchScript archive or a state_dict; QuickGELU, heads of 64, and open_clip's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.weights.clip_towers import build, filled, infer_config
from cloob.models.weights.formats.stored import Stored
from cloob.models.weights.formats.torchfile import TorchFile
from cloob.models.weights.keymap import same_names
from cloob.models.weights.scales import clip_objective, scale_of
from cloob.models.weights.tokens import clip_tokenizer

_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})


def matches(file: TorchFile) -> bool:
    """Whether a torch file holds a CLIP: an archive, or a dictionary of tensors with OpenAI's names."""
    return file.scripted or (isinstance(file.value, dict) and "text_projection" in file.value)


def load(file: TorchFile) -> DualEncoder:
    """The encoder; InputError where the file's weights are not those of a CLIP."""
    path = file.path
    tensors = file.scripted_tensors() if file.scripted else file.tensors(file.value, "the file")
    config = infer_config(path, tensors)
    _check_sizes(path, tensors, config)
    model = build(config, {}, str(path))
    model = filled(model, path, tensors, same_names(model), _SIZES & tensors.keys())
    text = config["text_cfg"]
    tokenizer = clip_tokenizer(path, text["vocab_size"], text["context_length"], _SPECIALS, "kept")
    objective = clip_objective(scale_of(path, "logit_scale", model.logit_scale))
    return DualEncoder(path.stem, model, tokenizer, EncoderConfig.open_clip(config), objective)


def _check_sizes(path: Path, tensors: dict[str, Stored], config: dict[str, Any]) -> None:
    """Holds the archive's three numbers against the shapes of its weights."""
    shapes = {
        "input_resolution": config["vision_cfg"]["image_size"],
        "context_length": config["text_cfg"]["context_length"],
        "vocab_size": config["text_cfg"]["vocab_size"],
    }
    with path.open("rb") as file:
        for key in _SIZES & tensors.keys():
            tensor = tensors[key]
            if tensor.shape != () or tensor.dtype != torch.int64:
                raise InputError(f"{path}: {key} is no whole number")
            if (stored_size := int(tensor.read(file))) != shapes[key]:
                raise InputError(f"{path}: {key} is {stored_size}, but its weights are of a model with {shapes[key]}")
