"""Writes model folders (:mod:`cloob.models.runs`), so that open_clip's ``local-dir:``
reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.files import flush
from cloob.models import runs
from cloob.models.aligned.model import ModelFiles, heads_files
from cloob.models.encoder import DualEncoder
from cloob.models.tokenizer import NoTokenizer, RinnaTokenizer
from cloob.models.weights.containers import write_safetensors


def save_model(
    folder: Path,
    encoder: DualEncoder,
    objective: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming
    the folder.

    The ``inv_tau`` and ``bias`` of ``objective``, a ``ContrastiveObjective.config()``,
    become open_clip's ``logit_scale`` and ``logit_bias`` too. ``weights``: the
    ``state_dict`` where the encoder holds only shards of it.
    """
    encoder.check_weights()
    state = encoder.state_dict() if weights is None else weights
    tensors = {
        key.removeprefix("model."): value
        for key, value in state.items()
        if key.startswith("model.")
    }
    config_name, config, weights_name, tensors = _files_of(encoder, objective, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((config_name, config), (runs.OBJECTIVE_FILE, objective)):
        (folder / name).write_text(
            json.dumps(content, indent=2, allow_nan=False), encoding="utf-8"
        )
    write_safetensors(folder / weights_name, tensors)
    is_towers = encoder.config.kind == "towers"
    if is_towers and isinstance(encoder.tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(encoder.tokenizer.content)
    text_cfg = encoder.config.settings.get("text_cfg")
    named = isinstance(text_cfg, dict) and text_cfg.get("hf_tokenizer_name")
    if named and not isinstance(encoder.tokenizer, NoTokenizer):
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    flush(folder)


def _files_of(
    encoder: DualEncoder, objective: dict[str, Any], tensors: dict[str, Tensor]
) -> ModelFiles:
    """The configuration and the weights of a model folder, by the encoder's kind."""
    settings = encoder.config.settings
    if encoder.heads is not None:
        return heads_files(encoder)
    if encoder.config.kind == "module":
        return runs.MODULE_FILE, settings, runs.TOWERS_WEIGHTS_FILE, tensors
    if objective.get("inv_tau") is not None:
        tensors["logit_scale"] = torch.full_like(
            tensors["logit_scale"].cpu(), math.log(objective["inv_tau"])
        )
    if encoder.config.kind == "towers":
        config = {"name": encoder.name, **settings}
        return runs.TOWERS_FILE, config, runs.TOWERS_WEIGHTS_FILE, tensors
    if objective.get("bias") is not None:
        bias = float(objective["bias"])
        settings = settings | {"init_logit_bias": bias}
        tensors["logit_bias"] = torch.full_like(tensors["logit_scale"], bias)
    config = {
        "model_cfg": settings,
        "preprocess_cfg": encoder.preprocess_cfg,
        "name": encoder.name,
    }
    # of other programs; open_clip ignores the key
    tokenizer = getattr(encoder.tokenizer, "settings", None)
    if tokenizer is not None:
        config["tokenizer"] = tokenizer
    return runs.CONFIG_FILE, config, runs.WEIGHTS_FILE, tensors
