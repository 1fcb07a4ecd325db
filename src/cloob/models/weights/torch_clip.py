"""Torch checkpoints of CLIP towers without their sizes: ml-jku/cloob's and OpenAI's,
with QuickGELU and heads of 64.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.importing import read_json
from cloob.models.runs import HUB_WEIGHTS_FILES
from cloob.models.settings import ModelConfig, TextConfig, VisionConfig
from cloob.models.source import known_models
from cloob.models.tokenizer import OPENAI_SPECIALS, SPECIALS, Ending, clip_tokenizer
from cloob.models.weights.containers import TorchFile
from cloob.models.weights.keymap import Origin, build_open_clip, fill
from cloob.objective import ContrastiveObjective

logger = logging.getLogger(__name__)

# ml-jku's own configurations, whose heads are 64 wide
_PUBLISHED = (
    "RN50.json",
    "RN50x4.json",
    "RN101.json",
    "ViT-B-32.json",
    "ViT-B-16.json",
)
_STEMS_OF_OPEN_CLIP = {Path(name).stem for name in HUB_WEIGHTS_FILES}
_SIZES = {"input_resolution", "context_length", "vocab_size"}
_HALF = {torch.float16, torch.float32}  # as OpenAI's convert_weights leaves them


def load(path: Path, file: TorchFile) -> DualEncoder:
    """The encoder in a file of ml-jku's or OpenAI's."""
    return _read_ml_jku(path, file) if _is_ml_jkus(file) else _read_openai(path, file)


def is_open_clips(path: Path, file: TorchFile) -> bool:
    """Whether open_clip wrote a file, whose weights do not say their sizes either."""
    if file.checkpoint:
        return not _is_ml_jkus(file)
    return path.stem in _STEMS_OF_OPEN_CLIP and not _has_sizes(file)


def _is_ml_jkus(file: TorchFile) -> bool:
    """Whether ml-jku's program wrote a file: its scale has another name, or is a weight
    of the text tower.
    """
    has_own_scale = "logit_inv_tau" in file.keys or "logit_scale" not in file.keys
    return bool(file.checkpoint) and has_own_scale


def _has_sizes(file: TorchFile) -> bool:
    """Whether OpenAI's program wrote the file."""
    return file.is_script or not _SIZES.isdisjoint(file.tensors)


def name_of_towers(path: Path) -> str:
    """The name of a checkpoint's towers, by open_clip_train's params.txt."""
    params = path.absolute().parents[1] / "params.txt"
    text = params.read_text(encoding="utf-8") if params.is_file() else ""
    found = re.search(r"^model: (.+)$", text, re.MULTILINE)
    name = found[1].replace("/", "-") if found else ""
    if name not in known_models():
        raise InputError(
            f"{path}: open_clip's weights, which do not say their towers; give the"
            " folder with open_clip_config.json, or from within its folder NAME/FILE"
            f" (ViT-B-32/{path.name})"
        )
    return name


def _read_openai(path: Path, file: TorchFile) -> DualEncoder:
    """The encoder of a file of OpenAI's; its scale as trained, at most 100."""
    tensors = file.tensors
    if "text_projection" not in tensors:
        raise InputError(
            f"{path}: a torch file, but neither ml-jku's (state_dict) nor OpenAI's"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if dtypes != _HALF and not _has_sizes(file):
        logger.warning(
            "%s: taken for OpenAI's weights: QuickGELU and heads of 64; if they are"
            " open_clip's, give NAME/FILE (such as ViT-B-32/%s)",
            path,
            path.name,
        )
    weights = {key: value for key, value in tensors.items() if key not in _SIZES}
    encoder = _empty_encoder(path, _model_cfg(weights), OPENAI_SPECIALS, "kept")
    fill(encoder.model, path, weights)
    inv_tau = min(float(encoder.model.logit_scale.double().exp()), 100.0)
    encoder.objective_config = ContrastiveObjective.clip(inv_tau=inv_tau).config()
    return encoder


def _read_ml_jku(path: Path, file: TorchFile) -> DualEncoder:
    tensors = file.tensors
    keys = file.keys
    log_beta = tensors.pop(keys.pop("logit_scale_hopfield", ""), None)
    beta = None if log_beta is None else float(log_beta.double().exp())
    origins = {name.removeprefix("transformer."): key for name, key in keys.items()}
    if "logit_inv_tau" in origins:
        origins["logit_scale"] = origins.pop("logit_inv_tau")
    config = _model_cfg({name: tensors[key] for name, key in origins.items()})
    heads = _stored_heads(path, file.checkpoint)
    if heads:
        config["text_cfg"]["heads"] = heads
    encoder = _empty_encoder(path, config, SPECIALS, "cut")
    names = encoder.model.state_dict()
    plan = {name: Origin((origins.get(name, name),)) for name in names}
    fill(encoder.model, path, tensors, plan)
    inv_tau = float(encoder.model.logit_scale.double().exp())
    encoder.objective_config = cloob_objective(inv_tau, beta, "paper")
    return encoder


def _stored_heads(path: Path, checkpoint: Mapping[str, object]) -> int:
    """The heads of the text tower, by the configuration that a checkpoint names or that
    has a name of it; 0 for none.
    """
    named = checkpoint.get("model_config_file")
    if named in _PUBLISHED:
        return 0
    if named is not None:
        return _heads_in(path.with_name(Path(str(named)).name))
    for name in (f"{path.stem}.json", f"{checkpoint.get('name')}.json"):
        file = path.with_name(Path(name).name)
        if file.is_file():
            return _heads_in(file)
    return 0


def _heads_in(file: Path) -> int:
    return int(read_json(file).get("transformer_heads", 0))


def _model_cfg(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """open_clip's ``model_cfg``, from the shapes of weights under its names."""

    def count(blocks: str) -> int:
        matches = (re.match(rf"{blocks}\.(\d+)\.", name) for name in tensors)
        return len({match[1] for match in matches if match})

    vocabulary, width = tensors["token_embedding.weight"].shape
    text: TextConfig = {
        "context_length": len(tensors["positional_embedding"]),
        "vocab_size": vocabulary,
        "width": width,
        "heads": width // 64,
        "layers": count(r"transformer\.resblocks"),
    }
    vision: VisionConfig
    if "visual.proj" in tensors:
        wide, _, patch, _ = tensors["visual.conv1.weight"].shape
        cells = len(tensors["visual.positional_embedding"])
        layers = count(r"visual\.transformer\.resblocks")
        vision = {"layers": layers, "width": wide, "patch_size": patch}
    else:
        wide = len(tensors["visual.layer1.0.conv1.weight"])
        cells = len(tensors["visual.attnpool.positional_embedding"])
        stages = [count(rf"visual\.layer{stage}") for stage in (1, 2, 3, 4)]
        vision = {"layers": stages, "width": wide, "patch_size": None}
    side = (vision["patch_size"] or 32) * math.isqrt(cells - 1)
    return {
        "embed_dim": tensors["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {"image_size": side, **vision},
        "text_cfg": text,
    }


def _empty_encoder(
    path: Path, config: ModelConfig, specials: tuple[str, str], ending: Ending
) -> DualEncoder:
    """The encoder without its weights."""
    text = config["text_cfg"]
    if not text["heads"]:
        raise InputError(
            f"{path}: does not hold the number of heads of its text tower; put its"
            f" configuration next to it as {path.stem}.json"
        )
    vocabulary = text["vocab_size"]
    length = text["context_length"]
    tokenizer = clip_tokenizer(path, vocabulary, length, specials, ending)
    built = EncoderConfig.open_clip(config)
    return DualEncoder(path.stem, build_open_clip(config, {}, path), tokenizer, built)
