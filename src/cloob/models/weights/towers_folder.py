"""A model folder for towers that open_clip does not have: ``towers.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.runs import TOWERS_FILE, TOWERS_WEIGHTS_FILE
from cloob.models.weights import crowsonkb, rinna
from cloob.models.weights.containers import read_safetensors
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import fill, same_names
from cloob.models.weights.tokens import RinnaTokenizer

_FORMAT = 1


def towers_files(encoder: DualEncoder, weights: Mapping[str, Tensor]) -> dict[str, bytes | dict[str, Tensor]]:
    """The files of a model folder by their names, but for ``objective.json``; ``save_model`` writes them."""
    content = {"format": _FORMAT, "name": encoder.name, **encoder.config.settings}
    files: dict[str, bytes | dict[str, Tensor]] = {
        TOWERS_FILE: json.dumps(content, indent=2, allow_nan=False).encode(),
        TOWERS_WEIGHTS_FILE: dict(weights),
    }
    if isinstance(encoder.tokenizer, RinnaTokenizer):
        files[RinnaTokenizer.FILE] = encoder.tokenizer.content
    return files


def load(folder: Path, content: dict[str, Any], objective: dict[str, Any]) -> DualEncoder:
    """The encoder of such a folder; InputError where a file is missing, damaged or does not fit the others."""
    where, weights = folder / TOWERS_FILE, folder / TOWERS_WEIGHTS_FILE
    fields = Fields(where, content)
    fields.one_of("format", (_FORMAT,))
    family = fields.one_of("family", (crowsonkb.FAMILY, rinna.FAMILY))
    config = dict(fields.inside("config").values)
    name = str(content.get("name", folder.name))
    if not weights.is_file():
        raise InputError(f"{folder}: no {TOWERS_WEIGHTS_FILE} beside {TOWERS_FILE}")
    if family == crowsonkb.FAMILY:
        gelu = fields.one_of("gelu", ("tanh", "exact"))
        towers = crowsonkb.build(where, config, gelu)
    else:
        towers = rinna.build(where, config)
    fill(towers, weights, read_safetensors(weights), same_names(towers))
    if family == crowsonkb.FAMILY:
        encoder = crowsonkb.encoder(name, where, towers, config, gelu)
    else:
        encoder = rinna.encoder(name, folder, towers, config)
    if objective:
        encoder.objective_config = objective
    return encoder
