"""Writes model folders (:mod:`cloob.models.runs`), so that open_clip's ``local-dir:`` reads them."""

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
    folder: Path, encoder: DualEncoder, objective: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming the folder.

    The ``inv_tau`` and ``bias`` of ``objective``, a ``ContrastiveObjective.config()``, become open_clip's
    ``logit_scale`` and ``logit_bias`` too. ``weights``: the ``state_dict`` where the encoder holds only shards of it.
    """
    encoder.check_weights()
    folder.mkdir(parents=True, exist_ok=True)
    if encoder.heads is not None:
        files = heads_files(encoder)
    elif encoder.config.kind == "module":
        files = runs.MODULE_FILE, encoder.config.settings, runs.TOWERS_WEIGHTS_FILE, encoder.model.state_dict()
    else:
        files = _towers_files(encoder, encoder.state_dict() if weights is None else weights, objective)
    config_name, config, weights_name, tensors = files
    for name, content in ((config_name, config), (runs.OBJECTIVE_FILE, objective)):
        (folder / name).write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")
    write_safetensors(folder / weights_name, tensors)
    if encoder.config.kind == "towers" and isinstance(encoder.tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(encoder.tokenizer.content)
    named = encoder.config.settings.get("text_cfg", {}).get("hf_tokenizer_name")
    if named and not isinstance(encoder.tokenizer, NoTokenizer):
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    flush(folder)


def _towers_files(encoder: DualEncoder, weights: Mapping[str, Tensor], objective: Mapping[str, Any]) -> ModelFiles:
    settings = encoder.config.settings
    state = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    if "inv_tau" in objective:
        state["logit_scale"] = torch.full_like(state["logit_scale"].cpu(), math.log(objective["inv_tau"]))
    if encoder.config.kind == "towers":
        return runs.TOWERS_FILE, {"name": encoder.name, **settings}, runs.TOWERS_WEIGHTS_FILE, state
    if "bias" in objective:
        bias = float(objective["bias"])
        settings = settings | {"init_logit_bias": bias}
        state = state | {"logit_bias": torch.full_like(state["logit_scale"], bias)}
    config = {"model_cfg": settings, "preprocess_cfg": encoder.preprocess_cfg, "name": encoder.name}
    tokenizer = getattr(encoder.tokenizer, "settings", None)  # of other programs; open_clip passes over the key
    if tokenizer is not None:
        config["tokenizer"] = tokenizer
    return runs.CONFIG_FILE, config, runs.WEIGHTS_FILE, state
