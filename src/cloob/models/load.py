"""``load_model``: a name, folder or file to an encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.folder import read_model, readied_text_tower
from cloob.models.hub import check_hub_model, fetch_first
from cloob.models.names import check_path, known_models, no_such_model
from cloob.models.runs import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    HEADS_FILE,
    HUB_WEIGHTS_FILES,
    MODEL_FOLDER,
    OBJECTIVE_FILE,
    TOWERS_WEIGHTS_FILE,
    chosen_checkpoint,
    config_file,
    read_objective,
    split_checkpoint,
    weights_file,
)
from cloob.models.towers import create_model, load_tokenizer, open_clip, translated
from cloob.models.untrusted import check_model_cfg, read_json
from cloob.models.weights import families, hf_clip, open_clip_folder
from cloob.models.weights.scales import sigmoid_objective
from cloob.models.weights.tokens import HUB_FILE, RinnaTokenizer, stored_tokenizer


def load_model(source: str | Path, device: str | torch.device = "auto") -> DualEncoder:
    """Loads two towers, in eval mode.

    Args:
        source: A run folder (its best checkpoint if one was validated, else its last; ``"RUN:best"``, ``"RUN:last"``),
            a checkpoint folder, a model folder, or as a string open_clip's ``"NAME/TAG"``, ``"hf-hub:…"``,
            ``"local-dir:…"``; a file, folder or public name of another program (docs/weights.md). Of a run with ``ema``
            these are the averaged weights.
        device: Where the towers go; ``"auto"`` is CUDA where there is one, else the CPU.

    Returns:
        The encoder; ``make_objective()`` gives the objective that it was trained with.

    Raises:
        InputError: Nothing there, not a model, weights that are missing, damaged or of another architecture, an unknown
            name or tag, or weights that cannot be fetched.

    Example:
        >>> import cloob
        >>> config = cloob.get_recipe("demo-scratch").override(steps=2, device="cpu", out="runs/example")
        >>> model = cloob.load_model(cloob.train(config).run)
        >>> model.encode_text(["a red heart", "an elephant"]).shape
        torch.Size([2, 256])
    """
    place = resolve_device(device)
    return _load(source).to(place).eval()


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder that a source of ``load_model`` leads to; None when it is no folder.

    Raises:
        InputError: A folder without a model, or ``local-dir:``, ``:best`` or ``:last`` of something that is no folder.
    """
    text = str(source)
    if text.startswith("hf-hub:"):
        return None
    local = text.startswith("local-dir:")
    text = check_path(text.removeprefix("local-dir:"))
    if not local and families.is_foreign(text):
        return None
    place, which = split_checkpoint(text)
    if which:
        return chosen_checkpoint(Path(place), which) / MODEL_FOLDER
    return _model_folder(Path(text)) if local or Path(text).is_dir() else None


def _load(source: str | Path) -> DualEncoder:
    """The encoder on the CPU."""
    text = check_path(str(source))
    folder = find_model_folder(text)
    try:
        if folder is not None:
            return read_model(folder, _load)
        if families.is_foreign(text):
            return families.load_foreign(text)
    except OSError as error:
        raise InputError(f"{error.filename or source}: cannot be read ({error.strerror or error})") from None
    return _load_hub(text) if text.startswith("hf-hub:") else _load_tag(text)


def _model_folder(folder: Path) -> Path:
    """The model folder in a run folder, a checkpoint folder or a model folder."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if config_file(folder).is_file():
        return folder
    if (folder / MODEL_FOLDER).is_dir():
        return folder / MODEL_FOLDER
    if (folder / CHECKPOINTS_FOLDER).is_dir():
        return chosen_checkpoint(folder) / MODEL_FOLDER
    raise InputError(
        f"{folder}: neither a run folder (checkpoints/), nor a checkpoint (model/), nor a model folder ({CONFIG_FILE})"
        f"{families.meant_file(folder)}"
    )


def _load_hub(source: str) -> DualEncoder:
    """Towers from the Hugging Face hub, or from its cache, read as a folder's are."""
    name = source.removeprefix("hf-hub:")
    with translated(source):
        folder = check_hub_model(name, source)
        if config_file(folder).name != CONFIG_FILE:  # ours, pushed by `cloob push`
            if here := encoders_here(read_json(config_file(folder))):
                raise InputError(f"{source}: asks for {here[0]!r}, a folder of this machine")
            folder = fetch_first(name, source, [[file] for file in (HEADS_FILE, TOWERS_WEIGHTS_FILE)])
            fetch_first(name, source, [[RinnaTokenizer.FILE], [OBJECTIVE_FILE]])
            return read_model(folder, _load)
        if not (folder / CONFIG_FILE).is_file():
            return _load_hub_clip(name, source, folder)
        config = read_json(folder / CONFIG_FILE)
        model_cfg = config.get("model_cfg")
        if not isinstance(model_cfg, dict):
            raise InputError(f"{source}: {CONFIG_FILE} has no 'model_cfg'")
        check_model_cfg(model_cfg, f"{source}: {CONFIG_FILE}")
        folder = fetch_first(name, source, [[file] for file in HUB_WEIGHTS_FILES])
        if "tokenizer" in config:
            fetch_first(name, source, [[HUB_FILE], [CONFIG_FILE]])
    objective = read_objective(folder)
    with readied_text_tower(model_cfg):
        weights = weights_file(folder)
        assert weights is not None, folder
        model = open_clip_folder.load(folder / CONFIG_FILE, config, weights)
    if "tokenizer" in config:
        tokenizer = stored_tokenizer(folder / CONFIG_FILE, config["tokenizer"], model_cfg["text_cfg"])
    else:
        tokenizer = load_tokenizer(source, model_cfg, source)
    objective = objective or sigmoid_objective(weights, model)
    return DualEncoder(source, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def _load_hub_clip(name: str, source: str, folder: Path) -> DualEncoder:
    """A ``CLIPModel`` of transformers on the hub without open_clip's files, read as a folder's is."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if not hf_clip.matches(config):
        raise InputError(f"{source}: neither {CONFIG_FILE} in it nor a config.json of CLIPModel (model_type 'clip')")
    folder = fetch_first(name, source, [[file] for file in hf_clip.WEIGHTS])
    fetch_first(name, source, [[HUB_FILE], [file.name]])
    encoder = hf_clip.load(folder, config)
    encoder.name = source
    return encoder


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
    raise InputError(no_such_model(source))
