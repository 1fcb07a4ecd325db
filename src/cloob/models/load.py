"""``load_model``: a name, folder or file to an encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.models import runs
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder
from cloob.models.folder import read_model
from cloob.models.hub import check_hub_model, fetch_first
from cloob.models.importing import open_clip, translated
from cloob.models.source import Source
from cloob.models.towers import create_model
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
    if parsed.kind != "folder" or folder is None or families.is_foreign(folder):
        return None
    if parsed.variant or ((folder / runs.CHECKPOINTS_FOLDER).is_dir() and not runs.config_file(folder).is_file()):
        return runs.chosen_checkpoint(folder, parsed.variant) / runs.MODEL_FOLDER
    for place in (folder, folder / runs.MODEL_FOLDER):
        if runs.config_file(place).is_file():
            return place
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: a LoRA adapter; merge it (merge_and_unload) and save")
    what = f"no run (checkpoints/), no checkpoint (model/) and no model folder ({runs.CONFIG_FILE})"
    raise InputError(f"{folder}: {what if folder.is_dir() else 'no such folder'}{families.meant_file(folder)}")


def _load(source: str | Path) -> DualEncoder:
    parsed = Source.parse(source)
    folder = find_model_folder(source)
    if folder is not None:
        return read_model(folder, _load)
    if parsed.kind in ("folder", "file", "public"):
        return families.load_foreign(parsed)
    if parsed.kind == "hub" and not parsed.library:
        return _load_hub(parsed)
    if parsed.kind == "towers":
        return _load_towers(parsed)
    raise parsed.unknown()


def _load_hub(source: Source) -> DualEncoder:
    """Towers from the Hugging Face hub, or from its cache, read as a folder's are."""
    name, where, revision = source.name, source.text, source.variant or None
    with translated(where):
        folder = check_hub_model(name, where, HUB_FILE, RinnaTokenizer.FILE, revision=revision)
        kind = runs.config_file(folder)
        if kind.name == runs.ALIGNED_FILE and (here := encoders_here(read_json(kind))):
            raise InputError(f"{where}: asks for {here[0]!r}, a folder of this machine")
        if kind.name != runs.CONFIG_FILE:  # pushed by `cloob push`
            return read_model(fetch_first(name, where, (runs.HEADS_FILE, runs.TOWERS_WEIGHTS_FILE), revision), _load)
        if kind.is_file():
            return read_model(fetch_first(name, where, runs.HUB_WEIGHTS_FILES, revision), _load, of_hub=where)
        families.model_type(folder)
        encoder = families.load_folder(fetch_first(name, where, hf_clip.WEIGHTS, revision))
        encoder.name = where
        return encoder


def _load_towers(source: Source) -> DualEncoder:
    if source.variant:
        return create_model(source.name, pretrained=source.variant, seed=0)
    tags = open_clip().list_pretrained_tags_by_model(source.name)
    right = f"write {source.text}/TAG with one of {', '.join(tags)}" if tags else "give the folder it was trained into"
    raise InputError(f"{source.text}: a model's name without its weights; {right}")
