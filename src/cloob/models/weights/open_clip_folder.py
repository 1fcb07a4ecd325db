"""open_clip's ``local-dir:`` folders, ours among them: towers by open_clip, the weights read and compared here.

open_clip's own loader lets tensors be resized, broadcast or left out, and looks at no value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cloob.models.importing import open_clip, translated
from cloob.models.weights.clip_towers import build, filled, is_plain
from cloob.models.weights.fields import RESIZE_MODES, Fields
from cloob.models.weights.folders import file_tensors
from cloob.models.weights.keymap import fill, same_names, surplus

_PREPROCESS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def load(file: Path, config: dict[str, Any], weights: Path) -> Any:
    """open_clip's module with the weights of a folder."""
    model_cfg = Fields(file, config).inside("model_cfg").values
    preprocess = Fields(file, {"preprocess_cfg": {}} | config).inside("preprocess_cfg")
    for key in {"mean", "std"} & preprocess.values.keys():
        preprocess.channels(key, positive=key == "std")
    preprocess.one_of("resize_mode", RESIZE_MODES, "shortest")
    tensors = file_tensors(weights)
    if is_plain(model_cfg):
        known = {key: value for key, value in preprocess.values.items() if key in _PREPROCESS}
        model = build(model_cfg, known, str(file))
        return filled(model, weights, tensors, same_names(model))
    with translated(str(file)), torch.random.fork_rng(devices=[]):
        model = open_clip().create_model(f"local-dir:{file.parent}", load_weights=False, pretrained_text=False)
    plan = same_names(model)
    fill(model, weights, tensors, plan, surplus(tensors, plan))
    return model
