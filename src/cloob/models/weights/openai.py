"""OpenAI's CLIP: a TorchScript archive or a state_dict; QuickGELU, heads of 64, and open_clip's names."""

from __future__ import annotations

import logging
from pathlib import Path

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

_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})


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
    model = build(config, {}, str(path))
    model = filled(model, path, tensors, same_names(model), _SIZES)
    text = config["text_cfg"]
    specials = "<|startoftext|>", "<|endoftext|>"
    tokenizer = clip_tokenizer(path, text["vocab_size"], text["context_length"], specials, "kept")
    objective = clip_objective(scale_of(path, "logit_scale", model.logit_scale))
    return DualEncoder(path.stem, model, tokenizer, EncoderConfig.open_clip(config), objective)


def _check_whose(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses weights that are open_clip's by their file's name, and warns where nothing says that they are OpenAI's.

    Both have the same keys, and neither activation nor heads are in the weights. OpenAI's are part float16.
    """
    if path.stem in {Path(name).stem for name in HUB_WEIGHTS_FILES}:
        raise InputError(
            f"{path}: open_clip's weights, which do not say their towers; give the folder, if open_clip_config.json "
            f"is in it, or {beside_its_name(path)}"
        )
    if {tensor.dtype for tensor in tensors.values()} != {torch.float16, torch.float32}:
        logger.warning(
            "%s: taken for OpenAI's weights: QuickGELU and heads of 64; if they are open_clip's, give %s",
            path,
            beside_its_name(path),
        )
