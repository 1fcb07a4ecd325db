"""Torch checkpoints of CLIP towers without their sizes: ml-jku/cloob's and OpenAI's,
with QuickGELU and heads of 64.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.importing import read_json
from cloob.models.runs import HUB_WEIGHTS_FILES
from cloob.models.source import known_models
from cloob.models.tokenizer import SPECIALS, Ending, clip_tokenizer
from cloob.models.weights.cloome import is_cloome
from cloob.models.weights.containers import read_torch
from cloob.models.weights.keymap import Origin, build, fill
from cloob.objective import ContrastiveObjective

logger = logging.getLogger(__name__)

_PUBLISHED = (
    "RN50.json",
    "RN50x4.json",
    "RN101.json",
    "ViT-B-32.json",
    "ViT-B-16.json",
)
_SIZES = ("input_resolution", "context_length", "vocab_size")


def load(path: Path, create: Callable[[str], DualEncoder]) -> DualEncoder:
    """The encoder in a file; ``create`` makes open_clip's towers with it, where their
    name is known.
    """
    tensors, checkpoint, scripted = read_torch(path)
    names = {
        key.removeprefix("module."): key for key in tensors
    }  # of training over several GPUs
    if is_cloome(names):
        raise InputError(
            f"{path}: CLOOME's weights, of cells and molecules:"
            " cloob.models.weights.cloome.load_cloome reads them"
        )
    if checkpoint and ("logit_inv_tau" in names or "logit_scale" not in names):
        return _ml_jku(path, tensors, names, checkpoint)
    sizes = scripted or bool(tensors.keys() & set(_SIZES))
    why = (
        ""
        if "text_projection" in tensors
        else "a torch file, but neither ml-jku's (state_dict) nor OpenAI's"
    )
    if checkpoint or (
        not sizes and path.stem in {Path(name).stem for name in HUB_WEIGHTS_FILES}
    ):
        place = path.absolute()
        params = place.parents[1] / "params.txt"  # of open_clip_train
        text = (
            params.read_text(encoding="utf-8")
            if params.is_file()
            else f"model: {place.parent.name}"
        )
        match = re.search(r"^model: (.+)$", text, re.MULTILINE)
        name = (match[1] if match else place.parent.name).replace("/", "-")
        if name in known_models():
            return create(name)
        right = (
            "open_clip_config.json, or from within its folder NAME/FILE"
            f" (ViT-B-32/{path.name})"
        )
        why = (
            "open_clip's weights, which do not say their towers; give the folder with"
            f" {right}"
        )
    if why:
        raise InputError(f"{path}: {why}")
    if not sizes and {tensor.dtype for tensor in tensors.values()} != {
        torch.float16,
        torch.float32,
    }:
        message = (
            "taken for OpenAI's weights: QuickGELU and heads of 64; if they are"
            " open_clip's, give NAME/FILE"
        )
        logger.warning("%s: %s (such as ViT-B-32/%s)", path, message, path.name)
    for key in _SIZES:
        tensors.pop(key, None)
    encoder = _encoder(
        path, _config(tensors), ("<|startoftext|>", "<|endoftext|>"), "kept"
    )
    fill(encoder.model, path, tensors)
    inv_tau = float(encoder.model.logit_scale.double().exp())
    encoder.objective_config = ContrastiveObjective.clip(
        inv_tau=min(inv_tau, 100.0)
    ).config()
    return encoder


def _ml_jku(
    path: Path,
    tensors: dict[str, Tensor],
    names: dict[str, str],
    checkpoint: dict[str, Any],
) -> DualEncoder:
    stored = tensors.pop(names.pop("logit_scale_hopfield", ""), None)
    beta = None if stored is None else float(stored.double().exp())
    ours = {"logit_inv_tau": "logit_scale"}
    keys = {
        ours.get(name, name.removeprefix("transformer.")): key
        for name, key in names.items()
    }
    config = _config({name: tensors[key] for name, key in keys.items()})
    if (
        named := checkpoint.get("model_config_file")
    ) not in _PUBLISHED:  # the file may hold the heads
        files = (
            [named]
            if named is not None
            else [f"{path.stem}.json", f"{checkpoint.get('name')}.json"]
        )
        places = [path.parent / Path(file).name for file in files]
        chosen = next(
            (place for place in places if named is not None or place.is_file()), None
        )
        heads = int(read_json(chosen).get("transformer_heads", 0)) if chosen else 0
        config["text_cfg"]["heads"] = heads or config["text_cfg"]["heads"]
    encoder = _encoder(path, config, SPECIALS, "cut")
    fill(
        encoder.model,
        path,
        tensors,
        {name: Origin((keys.get(name, name),)) for name in encoder.model.state_dict()},
    )
    encoder.objective_config = cloob_objective(
        float(encoder.model.logit_scale.double().exp()), beta, "paper"
    )
    return encoder


def _config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """open_clip's ``model_cfg``, from the shapes of weights under its names."""
    names = "\n".join(tensors)
    vocabulary, width = tensors["token_embedding.weight"].shape
    text = {
        "context_length": len(tensors["positional_embedding"]),
        "vocab_size": vocabulary,
        "width": width,
        "heads": width // 64,
        "layers": len(
            set(re.findall(r"^transformer\.resblocks\.(\d+)\.", names, re.MULTILINE))
        ),
    }
    if "visual.proj" in tensors:
        wide, _, patch, _ = tensors["visual.conv1.weight"].shape
        cells = len(tensors["visual.positional_embedding"])
        layers: Any = len(
            set(
                re.findall(
                    r"^visual\.transformer\.resblocks\.(\d+)\.", names, re.MULTILINE
                )
            )
        )
    else:
        wide, patch = len(tensors["visual.layer1.0.conv1.weight"]), None
        cells = len(tensors["visual.attnpool.positional_embedding"])
        stages = (rf"^visual\.layer{stage}\.(\d+)\." for stage in (1, 2, 3, 4))
        layers = [len(set(re.findall(stage, names, re.MULTILINE))) for stage in stages]
    side = (patch or 32) * math.isqrt(cells - 1)
    vision = {"image_size": side, "layers": layers, "width": wide, "patch_size": patch}
    embed_dim = tensors["text_projection"].shape[1]
    return {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def _encoder(
    path: Path, config: dict[str, Any], specials: tuple[str, str], ending: Ending
) -> DualEncoder:
    text = config["text_cfg"]
    if not text["heads"]:
        right = f"put its configuration next to it as {path.stem}.json"
        raise InputError(
            f"{path}: does not hold the number of heads of its text tower; {right}"
        )
    tokenizer = clip_tokenizer(
        path, text["vocab_size"], text["context_length"], specials, ending
    )
    return DualEncoder(
        path.stem, build(config, {}, path), tokenizer, EncoderConfig.open_clip(config)
    )
