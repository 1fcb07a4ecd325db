"""Which family a file, a folder or a name belongs to, and its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models import registry
from cloob.models.encoder import DualEncoder
from cloob.models.runs import (
    ALIGNED_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    ONNX_FILE,
    TOWERS_FILE,
    VECTORS_FILE,
    config_file,
)
from cloob.models.source import WEIGHTS_ENDINGS
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import crowsonkb, hf_clip, mljku, openai, rinna
from cloob.models.weights.containers import is_torch, read_torch
from cloob.models.weights.fetch import fetch_model, show_progress
from cloob.models.weights.folders import INDEX, WEIGHTS_FILES

_OURS = (CONFIG_FILE, TOWERS_FILE, ALIGNED_FILE, VECTORS_FILE, ONNX_FILE, CHECKPOINTS_FOLDER, MODEL_FOLDER)
PORT = ":port"
"""Ends the name of a crowsonkb file that is to compute as that repository's port to torch does."""


def is_foreign(source: str) -> bool:
    """Whether a source of ``load_model`` is a file, a folder that another program wrote, or a public name."""
    name = source.removesuffix(PORT)
    path = Path(name)
    if not path.exists():
        return name in registry.MODELS or registry.suggestion(name) is not None
    return path.is_file() or _folder_config(path) is not None


def has_towers(folder: Path) -> bool:
    """Whether a folder with a ``config.json`` holds both towers, ours or another program's."""
    config = read_json(folder / "config.json")
    return config_file(folder).is_file() or hf_clip.matches(config) or rinna.matches(config)


def meant_file(folder: Path) -> str:
    """A clause that names a file of weights in a folder which is no model; empty where there is none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS_ENDINGS[:3] and path.is_file())
    return f"; did you mean {files[0]}?" if files else ""


def load_foreign(source: str) -> DualEncoder:
    """The encoder of a file, folder or name for which ``is_foreign`` holds."""
    name, port = source.removesuffix(PORT), source.endswith(PORT)
    path, config = Path(name), None
    if not path.exists():
        if (meant := registry.suggestion(name)) is not None:
            raise InputError(f"{name}: no such public model; {meant}")
        model = registry.MODELS[name]
        path, config = fetch_model(name, model, show_progress), model.config
    encoder = _load_folder(path) if path.is_dir() else _load_file(path, config, port=port)
    if port and encoder.config.settings.get("family") != crowsonkb.FAMILY:
        raise InputError(f"{path}: {PORT} is for files of crowsonkb/cloob-training alone")
    return encoder


def _folder_config(folder: Path) -> Path | None:
    """The file that says what another program's folder holds; None for a folder of ours or of open_clip's."""
    if any((folder / name).exists() for name in _OURS):
        return None
    config = folder / "config.json"
    names = [name for weights in WEIGHTS_FILES for name in (weights, f"{weights}{INDEX}")]
    return config if any((folder / name).is_file() for name in (config.name, *names)) else None


def _load_folder(folder: Path) -> DualEncoder:
    file = folder / "config.json"
    check_folder(folder)
    config = read_json(file)
    if rinna.matches(config):
        return rinna.load(folder, config)
    if hf_clip.matches(config):
        return hf_clip.load(folder, config)
    kind = f"model_type is {str(config['model_type'])[:40]!r}" if "model_type" in config else "no model_type"
    raise InputError(f"{file}: {kind}; 'clip' (CLIPModel) or 'cloob' (rinna) is wanted{meant_file(folder)}")


def _load_file(path: Path, config: dict[str, Any] | None, *, port: bool) -> DualEncoder:
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: weights alone; give the folder that they lie in with their configuration")
    if path.suffix in (".json", ".npz", ".npy"):
        raise InputError(f"{path}: not a file of weights; .pt, .pkl or a folder is wanted")
    if is_torch(path):
        content = read_torch(path)
        if mljku.matches(content):
            return mljku.load(content)
        if openai.matches(content):
            return openai.load(content)
        raise InputError(f"{path}: a torch file, but neither ml-jku's (state_dict) nor OpenAI's (text_projection)")
    if crowsonkb.matches(path):
        return crowsonkb.load(path, config, "exact" if port else "tanh")
    raise InputError(f"{path}: neither a file of torch's nor a pickle of arrays, so not weights that are known")
