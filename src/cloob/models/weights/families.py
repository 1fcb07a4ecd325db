"""Which family of other programs a file, a folder or a public name belongs to, and its encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.importing import translated
from cloob.models.runs import CHECKPOINTS_FOLDER, MODEL_FOLDER, config_file
from cloob.models.source import PUBLIC, WEIGHTS_ENDINGS, Source
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import crowsonkb, hf_clip, rinna, torch_clip
from cloob.models.weights.containers import INDEX, WEIGHTS_FILES
from cloob.models.weights.fetch import fetch_model


def is_foreign(folder: Path) -> bool:
    ours = config_file(folder).exists() or any((folder / name).exists() for name in (CHECKPOINTS_FOLDER, MODEL_FOLDER))
    names = ["config.json", *WEIGHTS_FILES, *(f"{name}{INDEX}" for name in WEIGHTS_FILES)]
    return not ours and any((folder / name).is_file() for name in names)


def has_towers(folder: Path) -> bool:
    """Whether a folder with a ``config.json`` holds both towers, ours or another program's."""
    return config_file(folder).is_file() or read_json(folder / "config.json").get("model_type") in ("clip", "cloob")


def meant_file(folder: Path) -> str:
    """A clause that names a file of weights in a folder which is no model; empty where there is none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS_ENDINGS[:3] and path.is_file())
    return f"; did you mean {files[0]}?" if files else ""


def load_foreign(source: Source) -> DualEncoder:
    """The encoder of another program's file or folder, or of a public name."""
    path, config = source.path, None
    if path is None:
        path, config = fetch_model(source.name), PUBLIC[source.name].config
    with translated(str(path)):
        if path.is_dir():
            return load_folder(path)
        return _load_file(path, config, "exact" if source.port else "tanh")


def model_type(folder: Path) -> str:
    """``"clip"`` (CLIPModel) or ``"cloob"`` (rinna), what the ``config.json`` of another program's folder says."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "cloob"):
        wanted = "'clip' (CLIPModel) or 'cloob' (rinna) is wanted"
        raise InputError(f"{folder / 'config.json'}: model_type is {str(kind)[:40]!r}; {wanted}{meant_file(folder)}")
    return str(kind)


def load_folder(folder: Path) -> DualEncoder:
    check_folder(folder)
    load = rinna.load if model_type(folder) == "cloob" else hf_clip.load
    return load(folder, read_json(folder / "config.json"))


def _load_file(path: Path, config: dict[str, Any] | None, gelu: Any) -> DualEncoder:
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: of safetensors give the folder that they lie in with their configuration")
    return crowsonkb.load(path, config, gelu) if path.suffix == ".pkl" else torch_clip.load(path)
