"""``load_model``: a name, folder or file to an encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder
from cloob.models.folder import open_clip_config, read_model
from cloob.models.hub import check_hub_model, fetch_first
from cloob.models.runs import (
    ALIGNED_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    HEADS_FILE,
    HUB_WEIGHTS_FILES,
    MODEL_FOLDER,
    OBJECTIVE_FILE,
    TOWERS_WEIGHTS_FILE,
    chosen_checkpoint,
    config_file,
)
from cloob.models.source import PORT, Source
from cloob.models.towers import create_model, open_clip, translated
from cloob.models.untrusted import read_json
from cloob.models.weights import families, hf_clip
from cloob.models.weights.tokens import HUB_FILE, RinnaTokenizer


def load_model(source: str | Path, device: str | torch.device = "auto") -> DualEncoder:
    """Loads two towers, in eval mode.

    Args:
        source: A run folder (its best checkpoint if one was validated, else its last; ``"RUN:best"``, ``"RUN:last"``),
            a checkpoint folder, a model folder, or as a string open_clip's ``"NAME/TAG"``, ``"hf-hub:…"``,
            ``"local-dir:…"``; a file, folder or public name of another program (docs/weights.md).
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
    """The model folder of ours, or of open_clip's, that a source of ``load_model`` leads to; None for others.

    Raises:
        InputError: A folder without a model, or ``local-dir:``, ``:best`` or ``:last`` of something that is no folder.
    """
    parsed = Source.parse(source)
    folder = parsed.path
    if parsed.kind != "folder" or folder is None:
        return None
    if parsed.variant:
        return chosen_checkpoint(folder, parsed.variant) / MODEL_FOLDER
    if families.is_foreign(str(folder)):
        return None
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


def _load(source: str | Path) -> DualEncoder:
    """The encoder on the CPU."""
    parsed = Source.parse(source)
    try:
        folder = find_model_folder(source)
        if folder is not None:
            return read_model(folder, _load)
        if parsed.kind in ("folder", "file", "public"):
            return families.load_foreign(parsed.name + PORT * parsed.port)
    except OSError as error:
        raise InputError(f"{error.filename or source}: cannot be read ({error.strerror or error})") from None
    if parsed.kind == "hub" and not parsed.library:
        return _load_hub(parsed)
    if parsed.kind == "towers":
        return _load_towers(parsed)
    raise parsed.unknown()


def _load_hub(source: Source) -> DualEncoder:
    """Towers from the Hugging Face hub, or from its cache, read as a folder's are."""
    name, where, revision = source.name, source.text, source.variant or None
    with translated(where):
        folder = check_hub_model(name, where, revision=revision)
        kind = config_file(folder)
        ours = kind.name != CONFIG_FILE  # pushed by `cloob push`
        if kind.name == ALIGNED_FILE and (here := encoders_here(read_json(kind))):
            raise InputError(f"{where}: asks for {here[0]!r}, a folder of this machine")
        theirs = folder / "config.json"
        more: tuple[str, ...]
        if ours:
            weights: tuple[str, ...] = (HEADS_FILE, TOWERS_WEIGHTS_FILE)
            more = (RinnaTokenizer.FILE, OBJECTIVE_FILE)
        elif kind.is_file():
            open_clip_config(kind, config := read_json(kind))
            weights, more = HUB_WEIGHTS_FILES, (HUB_FILE if "tokenizer" in config else kind.name, kind.name)
        elif theirs.is_file() and hf_clip.matches(read_json(theirs)):  # a CLIPModel of transformers
            weights, more = tuple(hf_clip.WEIGHTS), (HUB_FILE, theirs.name)
        else:
            raise InputError(f"{where}: neither {CONFIG_FILE} in it nor a config.json of CLIPModel (model_type 'clip')")
        folder = fetch_first(name, where, [[file] for file in weights], revision)
        fetch_first(name, where, [[file] for file in more], revision)
        if ours:
            return read_model(folder, _load)
        if kind.is_file():
            return read_model(folder, _load, of_hub=where)
        encoder = hf_clip.load(folder, read_json(theirs))
        encoder.name = where
        return encoder


def _load_towers(source: Source) -> DualEncoder:
    """Towers by open_clip's ``NAME/TAG``."""
    if source.variant:
        return create_model(source.name, pretrained=source.variant, seed=0)
    tags = open_clip().list_pretrained_tags_by_model(source.name)
    right = f"write {source.text}/TAG with one of {', '.join(tags)}" if tags else "give the folder it was trained into"
    raise InputError(f"{source.text}: a model's name without its weights; {right}")
