"""Model folders: written so that open_clip's ``local-dir:`` reads them wherever the towers are its own, and read back.

Which files there are says :mod:`cloob.models.runs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.files import flush
from cloob.models.aligned.model import aligned_files, load_aligned
from cloob.models.aligned.opening import LoadModel
from cloob.models.aligned.vectors import load_vectors, vector_files
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.hub import check_hub_model
from cloob.models.onnx import folder as onnx_folder
from cloob.models.runs import (
    ALIGNED_FILE,
    CONFIG_FILE,
    OBJECTIVE_FILE,
    ONNX_FILE,
    TOWERS_FILE,
    VECTORS_FILE,
    WEIGHTS_FILE,
    config_file,
    damage,
    read_objective,
    weights_file,
)
from cloob.models.towers import load_tokenizer
from cloob.models.untrusted import check_folder, check_model_cfg, read_json
from cloob.models.weights import open_clip_folder, towers_folder
from cloob.models.weights.containers import write_safetensors
from cloob.models.weights.scales import sigmoid_objective
from cloob.models.weights.tokens import stored_tokenizer


def save_model(
    folder: Path, encoder: DualEncoder, objective: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming the folder.

    The ``inv_tau`` of ``objective``, a ``ContrastiveObjective.config()``, is stored as open_clip's ``logit_scale`` as
    well, so that open_clip's logits have the trained temperature, and a ``bias`` as ``logit_bias``. ``weights``: the
    encoder's ``state_dict`` where the encoder itself holds only shards of it.
    """
    encoder.check_weights()
    folder.mkdir(parents=True, exist_ok=True)
    if encoder.config.kind == "aligned":  # heads on frozen encoders: the encoders by name alone
        files = aligned_files(encoder)
    elif encoder.config.kind == "vectors":
        files = vector_files(encoder)
    else:
        state = _stored_state(encoder.state_dict() if weights is None else weights, objective)
        others = encoder.config.kind == "towers"
        files = towers_folder.towers_files(encoder, state) if others else _open_clip_files(encoder, state, objective)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_safetensors(folder / name, content)
    (folder / OBJECTIVE_FILE).write_bytes(json.dumps(objective, indent=2, allow_nan=False).encode())
    if encoder.config.settings.get("text_cfg", {}).get("hf_tokenizer_name"):
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    flush(folder)


def _stored_state(weights: Mapping[str, Tensor], objective: Mapping[str, Any]) -> dict[str, Tensor]:
    """The towers' weights as they are stored: copies only of what shares memory or is in channels_last."""
    state: dict[str, Tensor] = {}
    shared: set[int] = set()
    for key, value in weights.items():
        if key.startswith("model."):
            tensor = value.detach().cpu().contiguous()
            storage = tensor.untyped_storage().data_ptr()
            state[key.removeprefix("model.")] = tensor.clone() if storage in shared else tensor
            shared.add(storage)
    if "inv_tau" in objective:
        state["logit_scale"] = torch.full_like(state["logit_scale"], math.log(objective["inv_tau"]))
    return state


def _open_clip_files(
    encoder: DualEncoder, state: dict[str, Tensor], objective: Mapping[str, Any]
) -> dict[str, bytes | dict[str, Tensor]]:
    """The files of a folder of open_clip's towers by their names."""
    model_cfg = encoder.config.settings
    if "bias" in objective:
        bias = float(objective["bias"])
        model_cfg = model_cfg | {"init_logit_bias": bias}
        state = state | {"logit_bias": torch.full_like(state["logit_scale"], bias)}
    config = {"model_cfg": model_cfg, "preprocess_cfg": encoder.preprocess_cfg, "name": encoder.name}
    settings = getattr(encoder.tokenizer, "settings", None)  # of other programs; open_clip passes over the key
    if settings is not None:
        config["tokenizer"] = settings
    return {
        CONFIG_FILE: json.dumps(config, indent=2, allow_nan=False).encode(),
        WEIGHTS_FILE: state,
    }


def read_model(folder: Path, load_model: LoadModel, of_hub: str = "") -> DualEncoder:
    """Towers from a model folder, ours or any that open_clip's ``local-dir:`` reads.

    ``of_hub``: its name on the hub, from where open_clip takes the tokenizer then.
    """
    check_folder(folder)
    file = config_file(folder)
    config = read_json(file)
    objective = read_objective(folder)
    if file.name == ALIGNED_FILE:
        return load_aligned(folder, config, objective, load_model)
    if file.name == VECTORS_FILE:
        return load_vectors(folder, config, objective)
    if file.name == TOWERS_FILE:
        return towers_folder.load(folder, config, objective)
    if file.name == ONNX_FILE:
        return onnx_folder.load(folder, objective)
    model_cfg = open_clip_config(file, config)
    weights = weights_file(folder)
    if weights is None:
        raise InputError(f"{folder}: no weights found beside {CONFIG_FILE}; {WEIGHTS_FILE} would be right")
    problem = damage(folder)
    if problem is not None:
        raise InputError(problem)
    text_cfg = model_cfg["text_cfg"]
    if tower := text_cfg.get("hf_model_name"):  # whose configuration open_clip takes from the hub: looked at first
        check_hub_model(tower, f"{file}: text_cfg.hf_model_name asks for {tower!r}")
    model = open_clip_folder.load(file, config, weights)
    if "tokenizer" in config:
        tokenizer = stored_tokenizer(file, config["tokenizer"], text_cfg)
    else:
        tokenizer = load_tokenizer(f"local-dir:{folder}", text_cfg, of_hub or str(file), None if of_hub else folder)
    name = of_hub or str(config.get("name", folder.name))
    objective = objective or sigmoid_objective(weights, model)
    return DualEncoder(name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def open_clip_config(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The ``model_cfg`` of an ``open_clip_config.json``; InputError where it lacks a part or asks for more."""
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise InputError(f"{file}: 'model_cfg' with embed_dim, vision_cfg and text_cfg wanted, not found")
    check_model_cfg(model_cfg, str(file))
    return model_cfg
