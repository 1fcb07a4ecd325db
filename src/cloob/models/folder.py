"""Writes model folders (:mod:`cloob.models.runs`), so that open_clip's ``local-dir:``
reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.files import flush
from cloob.models import runs
from cloob.models.encoder import Model
from cloob.models.tokenizer import FileTokenizer, NoTokenizer, RinnaTokenizer
from cloob.models.weights.containers import write_safetensors


def save_model(
    folder: Path,
    encoder: Model,
    objective: dict[str, object],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming
    the folder.

    ``objective`` is a ``ContrastiveObjective.config()``. ``weights``: the
    ``state_dict`` where the encoder holds only shards of it.
    """
    encoder.check_weights()
    state = encoder.state_dict() if weights is None else weights
    tensors = {
        key.removeprefix("model."): value
        for key, value in state.items()
        if key.startswith("model.")
    }
    files = encoder.files(objective, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {files.config_name: files.config, runs.OBJECTIVE_FILE: objective}
    for name, content in contents.items():
        text = json.dumps(content, indent=2, allow_nan=False)
        (folder / name).write_text(text, encoding="utf-8")
    write_safetensors(folder / files.weights_name, files.weights)
    if encoder.config.kind in ("open_clip", "towers"):
        _write_tokenizer(encoder, folder)
    flush(folder)


def _write_tokenizer(encoder: Model, folder: Path) -> None:
    """Writes a tokenizer that a model folder holds, and open_clip does not bring."""
    tokenizer: Any = encoder.tokenizer
    text_cfg = encoder.config.settings.get("text_cfg")
    is_named = isinstance(text_cfg, dict) and text_cfg.get("hf_tokenizer_name")
    if isinstance(tokenizer, RinnaTokenizer | FileTokenizer):
        tokenizer.store(folder)
    elif is_named and not isinstance(tokenizer, NoTokenizer):
        tokenizer.save_pretrained(folder)  # open_clip's, around one of transformers
