"""Model folders: written so that open_clip's ``local-dir:`` reads them, and read from wherever a model may be.

A run folder holds ``checkpoints/step-00000100/model/``; the innermost is the model folder, with
``open_clip_config.json``, ``open_clip_model.safetensors`` and ``objective.json``. Beside it ``validation.json`` says
how good a checkpoint is, where the run had held-out pairs.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.distributed import resolve_device
from cloob.errors import InputError, one_line, require
from cloob.models.aligned.model import ALIGNED_FILE, aligned_files, load_aligned
from cloob.models.encoder import DualEncoder
from cloob.models.hub import check_hub_model, reachable_hub
from cloob.models.names import check_path, known_models
from cloob.models.towers import create_model, load_tokenizer, open_clip, translated
from cloob.models.untrusted import check_folder, check_model_cfg, read_json
from cloob.models.weights import load as foreign
from cloob.models.weights import open_clip_folder
from cloob.models.weights.tokens import stored_tokenizer
from cloob.models.weights.towers_folder import TOWERS_FILE, towers_files

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
OBJECTIVE_FILE = "objective.json"
VALIDATION_FILE = "validation.json"
BEST = ":best"
_LESS_IS_BETTER = {"val_loss": True, "val_recall": False}
_STEP = re.compile(r"step-(\d+)")
_WEIGHTS = re.compile(r".+\.(safetensors|bin|pth)")
_PREFERRED = (
    WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def save_model(
    folder: Path, encoder: DualEncoder, objective: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming the folder.

    Args:
        folder: Made when it is not there.
        encoder: The towers.
        objective: JSON-able ``ContrastiveObjective.config()``; its ``inv_tau`` is stored as open_clip's
            ``logit_scale``, ln(inv_tau), so that open_clip's logits have the trained temperature.
        weights: The encoder's ``state_dict`` where the encoder itself holds only a part of it (shards).

    Raises:
        ValueError: ``objective`` is not JSON-able or its ``inv_tau`` is not positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "aligned" in encoder.config:  # heads on frozen encoders: the encoders by name alone
        for name, content in aligned_files(encoder).items():
            _write(folder / name, content)
        _write(folder / OBJECTIVE_FILE, json.dumps(objective, indent=2, allow_nan=False).encode())
        _sync(folder)
        return
    # A copy: what shares memory (tied weights) or is in channels_last cannot be stored as it is.
    own = encoder.state_dict() if weights is None else weights
    state = {
        key.removeprefix("model."): value.detach().to("cpu", copy=True)
        for key, value in own.items()
        if key.startswith("model.")
    }
    state = {key: value.contiguous() for key, value in state.items()}
    if "inv_tau" in objective:
        state["logit_scale"].fill_(math.log(objective["inv_tau"]))
    if "towers" in encoder.config:  # towers that open_clip does not have
        for name, content in towers_files(encoder, state).items():
            _write(folder / name, content)
        _write(folder / OBJECTIVE_FILE, json.dumps(objective, indent=2, allow_nan=False).encode())
        _sync(folder)
        return
    config = {"model_cfg": encoder.config, "preprocess_cfg": encoder.preprocess_cfg, "name": encoder.name}
    settings = getattr(encoder.tokenizer, "settings", None)  # of other programs; open_clip passes over the key
    if settings is not None:
        config["tokenizer"] = settings
    _write(folder / CONFIG_FILE, json.dumps(config, indent=2, allow_nan=False).encode())
    _write(folder / OBJECTIVE_FILE, json.dumps(objective, indent=2, allow_nan=False).encode())
    _write(folder / WEIGHTS_FILE, require("safetensors.torch", "train").save(state, metadata={"format": "pt"}))
    if encoder.config["text_cfg"].get("hf_tokenizer_name"):
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    _sync(folder)


def load_model(source: str | Path, device: str | torch.device = "cpu") -> DualEncoder:
    """Loads two towers, in eval mode.

    Args:
        source: A run folder (its newest complete checkpoint; ``"RUN:best"`` its best), a checkpoint folder, a model
            folder, or as a string open_clip's ``"NAME/TAG"``, ``"hf-hub:…"``, ``"local-dir:…"``. Of a run with
            ``ema`` these are the averaged weights.
        device: Where the towers go.

    Returns:
        The encoder; its ``objective`` is what ``objective.json`` says.

    Raises:
        InputError: Nothing there, not a model, weights that are missing, damaged or of another architecture, an unknown
            name or tag, or weights that cannot be fetched.
    """
    place = resolve_device(device)
    text = str(source)
    folder = find_model_folder(source)
    if folder is not None and (folder / TOWERS_FILE).is_file():
        encoder = foreign.load_foreign(str(folder))
    elif folder is not None:
        encoder = _load_folder(folder)
    elif foreign.is_foreign(text):
        encoder = foreign.load_foreign(text)
    else:
        encoder = _load_hub(text) if text.startswith("hf-hub:") else _load_tag(text)
    return encoder.to(place).eval()


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder that a source of ``load_model`` leads to; None when it is no folder.

    Raises:
        InputError: A folder without a model, or ``local-dir:`` or ``:best`` of something that is no folder.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        return None
    local = text.startswith("local-dir:")
    text = check_path(text.removeprefix("local-dir:"))
    if local:
        return _model_folder(Path(text))
    if foreign.is_foreign(text) and not (Path(text) / TOWERS_FILE).is_file():
        return None
    if text.endswith(BEST) and not Path(text).exists():
        return best_checkpoint(Path(text.removesuffix(BEST))) / "model"
    return _model_folder(Path(text)) if Path(text).is_dir() else None


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, by ascending step.

    Complete is a folder ``checkpoints/step-N`` whose ``model/`` has a configuration and weights; what is still
    being written has another name (``.tmp-…``). Whether the weights are whole is not looked at.
    """
    found = []
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        step = _STEP.fullmatch(path.name)
        if step and _config_file(path / "model").is_file() and _weights(path / "model") is not None:
            found.append((int(step[1]), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run folder whose weights are whole; warns about each newer one that it passes over.

    Raises:
        InputError: There is none.
    """
    checkpoints = list_checkpoints(run)
    for path in reversed(checkpoints):
        damage = _damage(path / "model")
        if damage is None:
            return path
        warnings.warn(f"{damage}; looking for an earlier checkpoint", stacklevel=2)
    if checkpoints:
        raise InputError(f"{run}: none of its {len(checkpoints)} checkpoints is readable")
    raise InputError(
        f"{run}: no complete checkpoint found in {run / 'checkpoints'} (step-N/model/{CONFIG_FILE} and weights)"
    )


def read_validation(checkpoint: Path) -> dict[str, Any] | None:
    """What ``validation.json`` of a checkpoint says: ``metric``, ``val_loss``, ``val_recall``; None without."""
    try:
        told: dict[str, Any] = read_json(checkpoint / VALIDATION_FILE)
        return told
    except InputError:  # none, as most checkpoints; one that was cut short makes its checkpoint no candidate either
        return None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a value of ``"val_loss"`` or ``"val_recall"`` is better than another."""
    return value < than if _LESS_IS_BETTER[metric] else value > than


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run folder that is best by the run's ``best`` metric; of equal ones the earliest.

    Raises:
        InputError: No checkpoint there says how good it is.
    """
    best = find_best(run)
    if best is None:
        raise InputError(
            f"{run}: no checkpoint with a {VALIDATION_FILE} found in {run / 'checkpoints'}; "
            f"training with --val-data writes it"
        )
    return best[0]


def find_best(run: Path, metric: str | None = None) -> tuple[Path, float] | None:
    """The best readable checkpoint and its value, None without any; by default by the newest one's metric."""
    judged = [(path, told) for path in list_checkpoints(run) if (told := read_validation(path)) is not None]
    if not judged:
        return None
    metric = metric or str(judged[-1][1].get("metric"))
    best: tuple[Path, float] | None = None
    for path, told in judged:
        value = told.get(metric)
        if metric not in _LESS_IS_BETTER or not isinstance(value, int | float) or _damage(path / "model"):
            continue
        if best is None or is_better(metric, value, best[1]):
            best = path, float(value)
    return best


def _model_folder(folder: Path) -> Path:
    """The model folder in a run folder, a checkpoint folder or a model folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if _config_file(folder).is_file():
        return folder
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "checkpoints").is_dir():
        return latest_checkpoint(folder) / "model"
    raise InputError(
        f"{folder}: neither a run folder (checkpoints/), nor a checkpoint (model/), nor a model folder ({CONFIG_FILE})"
    )


def _load_folder(folder: Path) -> DualEncoder:
    """Towers from a model folder, ours or any that open_clip's ``local-dir:`` reads."""
    check_folder(folder)
    config = read_json(_config_file(folder))
    if (folder / ALIGNED_FILE).is_file():
        return load_aligned(folder, config, _objective(folder))
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= model_cfg.keys():
        raise InputError(
            f"{folder / CONFIG_FILE}: 'model_cfg' with embed_dim, vision_cfg and text_cfg wanted, not found"
        )
    check_model_cfg(model_cfg, str(folder / CONFIG_FILE))
    weights = _weights(folder)
    if weights is None:
        raise InputError(f"{folder}: no weights found beside {CONFIG_FILE}; {WEIGHTS_FILE} would be right")
    damage = _damage(folder)
    if damage is not None:
        raise InputError(damage)
    with _text_tower(model_cfg):
        model = open_clip_folder.load(folder / CONFIG_FILE, config, weights)
    if "tokenizer" in config:
        tokenizer = stored_tokenizer(folder / CONFIG_FILE, config["tokenizer"], model_cfg["text_cfg"])
    else:
        tokenizer = load_tokenizer(f"local-dir:{folder}", model_cfg, str(folder / CONFIG_FILE))
    return DualEncoder(str(config.get("name", folder.name)), model, tokenizer, model_cfg, _objective(folder))


def _config_file(folder: Path) -> Path:
    """The file that says what a model folder holds: open_clip's, of heads on frozen encoders, or of other towers."""
    return next(
        (folder / name for name in (ALIGNED_FILE, TOWERS_FILE) if (folder / name).is_file()), folder / CONFIG_FILE
    )


def _objective(folder: Path) -> dict[str, Any]:
    """What the model was trained with; nothing when the folder does not say."""
    return dict(read_json(folder / OBJECTIVE_FILE)) if (folder / OBJECTIVE_FILE).is_file() else {}


def _load_hub(source: str) -> DualEncoder:
    """Towers from the Hugging Face hub, or from its cache."""
    with translated(source):
        config = read_json(check_hub_model(source.removeprefix("hf-hub:"), source) / CONFIG_FILE).get("model_cfg")
        if not isinstance(config, dict):
            raise InputError(f"{source}: {CONFIG_FILE} has no 'model_cfg'")
        check_model_cfg(config, f"{source}: {CONFIG_FILE}")
    tokenizer = load_tokenizer(source, config, source)
    with translated(source), _text_tower(config), reachable_hub(source), torch.random.fork_rng(devices=[]):
        model = open_clip().create_model(source, require_pretrained=True)
    return DualEncoder(source, model, tokenizer, config)


@contextmanager
def _text_tower(model_cfg: dict[str, Any]) -> Iterator[None]:
    """Readies what ``hf_model_name`` names on the hub, if it does: its configuration, looked at first."""
    name = model_cfg["text_cfg"].get("hf_model_name")
    if not name:
        yield
        return
    where = f"text_cfg.hf_model_name asks for {name!r}"
    check_hub_model(name, where)
    with reachable_hub(where):
        yield


def _load_tag(source: str) -> DualEncoder:
    """Towers by open_clip's ``NAME/TAG``."""
    name, _, tag = source.rpartition("/")
    names = known_models()
    if name.replace("/", "-") in names:
        return create_model(name, pretrained=tag, seed=0)
    if source.replace("/", "-") in names:
        tags = open_clip().list_pretrained_tags_by_model(source.replace("/", "-"))
        right = f"write {source}/TAG with one of {', '.join(tags)}" if tags else "give the folder it was trained into"
        raise InputError(f"{source}: a model's name without its weights; {right}")
    near = difflib.get_close_matches(name or source, names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "such as RN50/openai"
    raise InputError(f"{source}: no such folder, and no NAME/TAG of open_clip ({hint})")


def _weights(folder: Path) -> Path | None:
    """The weights file that open_clip's ``local-dir:`` would read."""
    files = [path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name) and path.is_file()]

    def rank(path: Path) -> tuple[int, bool, str]:
        known = _PREFERRED.index(path.name) if path.name in _PREFERRED else len(_PREFERRED)
        return known, path.suffix != ".safetensors", path.name

    return min(files, key=rank, default=None)


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a model folder, or None; reads the headers only."""
    try:
        read_json(_config_file(folder))
    except InputError as error:
        return str(error)
    weights = _weights(folder)
    if weights is None or weights.suffix != ".safetensors":
        return None
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(weights, framework="pt"):
            return None
    except (safetensors.SafetensorError, OSError) as error:
        return f"{weights}: cut short or damaged ({one_line(error)})"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Syncs a folder's entries, where the system can (not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
