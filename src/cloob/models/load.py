"""``load_model``: a name, folder or file to an encoder; and which model this is, by a digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloob.cache import Cache
from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.models import runs
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder, digest
from cloob.models.folder import read_model
from cloob.models.hub import check_hub_model, fetch_first
from cloob.models.importing import open_clip, translated
from cloob.models.source import PUBLIC, WEIGHTS_ENDINGS, Source
from cloob.models.towers import create_model
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import crowsonkb, hf_clip, rinna, torch_clip
from cloob.models.weights.containers import INDEX, WEIGHTS_FILES
from cloob.models.weights.fetch import fetch_model
from cloob.models.weights.tokens import HUB_FILE, RinnaTokenizer

_YOUNG_SECONDS = 2.0
_DIGEST = re.compile("[0-9a-f]{32}")
_PACKAGES = ("cloob", "torch", "open_clip_torch", "timm", "transformers")  # they make modules of files


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
    if parsed.kind != "folder" or folder is None or _is_foreign(folder):
        return None
    if parsed.variant or ((folder / runs.CHECKPOINTS_FOLDER).is_dir() and not runs.config_file(folder).is_file()):
        return runs.chosen_checkpoint(folder, parsed.variant) / runs.MODEL_FOLDER
    for place in (folder, folder / runs.MODEL_FOLDER):
        if runs.config_file(place).is_file():
            return place
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: a LoRA adapter; merge it (merge_and_unload) and save")
    what = f"no run (checkpoints/), no checkpoint (model/) and no model folder ({runs.CONFIG_FILE})"
    raise InputError(f"{folder}: {what if folder.is_dir() else 'no such folder'}{_meant_file(folder)}")


def _load(source: str | Path) -> DualEncoder:
    parsed = Source.parse(source)
    folder = find_model_folder(source)
    if folder is not None:
        return read_model(folder, _load)
    if parsed.kind in ("folder", "file", "public"):
        return _load_foreign(parsed)
    if parsed.kind == "hub" and not parsed.library:
        return _load_hub(parsed)
    if parsed.kind == "towers":
        return _load_towers(parsed)
    raise parsed.unknown()


def _load_hub(source: Source) -> DualEncoder:
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
        _model_type(folder)
        encoder = _load_folder(fetch_first(name, where, hf_clip.WEIGHTS, revision))
        encoder.name = where
        return encoder


def _is_foreign(folder: Path) -> bool:
    parts = (runs.CHECKPOINTS_FOLDER, runs.MODEL_FOLDER)
    ours = runs.config_file(folder).exists() or any((folder / name).exists() for name in parts)
    names = ["config.json", *WEIGHTS_FILES, *(f"{name}{INDEX}" for name in WEIGHTS_FILES)]
    return not ours and any((folder / name).is_file() for name in names)


def _meant_file(folder: Path) -> str:
    """A clause that names a file of weights in a folder which is no model; empty where there is none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS_ENDINGS[:3] and path.is_file())
    return f"; did you mean {files[0]}?" if files else ""


def _load_foreign(source: Source) -> DualEncoder:
    """The encoder of another program's file or folder, or of a public name."""
    path, config = source.path, None
    if path is None:
        path, config = fetch_model(source.name), PUBLIC[source.name].config
    with translated(str(path)):
        if path.is_dir():
            return _load_folder(path)
        return _load_file(path, config, "exact" if source.port else "tanh")


def _model_type(folder: Path) -> str:
    """``"clip"`` (CLIPModel) or ``"cloob"`` (rinna), what the ``config.json`` of another program's folder says."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "cloob"):
        wanted = "'clip' (CLIPModel) or 'cloob' (rinna) is wanted"
        raise InputError(f"{folder / 'config.json'}: model_type is {str(kind)[:40]!r}; {wanted}{_meant_file(folder)}")
    return str(kind)


def _load_folder(folder: Path) -> DualEncoder:
    check_folder(folder)
    load = rinna.load if _model_type(folder) == "cloob" else hf_clip.load
    return load(folder, read_json(folder / "config.json"))


def _load_file(path: Path, config: dict[str, Any] | None, gelu: Any) -> DualEncoder:
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: of safetensors give the folder that they lie in with their configuration")
    return crowsonkb.load(path, config, gelu) if path.suffix == ".pkl" else torch_clip.load(path)


def _load_towers(source: Source) -> DualEncoder:
    if source.variant:
        return create_model(source.name, pretrained=source.variant, seed=0)
    tags = open_clip().list_pretrained_tags_by_model(source.name)
    right = f"write {source.text}/TAG with one of {', '.join(tags)}" if tags else "give the folder it was trained into"
    raise InputError(f"{source.text}: a model's name without its weights; {right}")


def fingerprint(encoder: Any) -> str:
    """A digest of a model's weights, towers and preprocessing; an encoder that is no module says its own."""
    return digest(encoder, _facts(encoder)) if isinstance(encoder, nn.Module) else str(encoder.fingerprint)


def _facts(encoder: nn.Module) -> dict[str, Any]:
    """What decides over embeddings of pictures, of which an index has vectors, beside the weights."""
    config = getattr(encoder, "config", None)
    return {"config": getattr(config, "settings", None), "preprocess": getattr(encoder, "preprocess_cfg", None)}


def load_with_fingerprint(
    source: str | Path, device: str | torch.device = "auto", cache: Cache | None = None
) -> tuple[DualEncoder, str]:
    """A model by :func:`cloob.load_model` and its fingerprint, which is computed once for the same files.

    A digest of weights takes a second for each 0.7 GB, so it is kept in the cache by what the system says of the files.
    """
    before = _stamp(source)
    encoder = load_model(source, device=device)
    if before is None or _stamp(source) != before:  # changed while it was read
        return encoder, fingerprint(encoder)
    cache = cache or Cache()
    facts = json.dumps([before, package_versions(_PACKAGES), _facts(encoder)], sort_keys=True, default=str)
    name = f"{hashlib.sha256(facts.encode('utf-8', 'surrogatepass')).hexdigest()}.txt"
    found = cache.find("digests", name)
    known = found.read_text(encoding="ascii", errors="replace") if found is not None else ""
    if not _DIGEST.fullmatch(known):
        known = fingerprint(encoder)
        with contextlib.suppress(InputError):  # a cache that cannot be written costs the second again
            cache.put("digests", name, known.encode())
    return encoder, known


def _stamp(source: str | Path) -> list[tuple[str | int, ...]] | None:
    """Path, size, times and number of a source's files; None where they are not known.

    Nor of a file that was changed a moment ago: the next change may leave all of that as it is.
    """
    with contextlib.suppress(OSError, InputError):  # which loading it says in its own words
        files = Source.parse(find_model_folder(source) or source).files()  # of a run the checkpoint alone
        stats = [(str(path.absolute()), path.stat()) for path in sorted(files)]
        newest = max((max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in stats), default=time.time_ns())
        if newest <= time.time_ns() - _YOUNG_SECONDS * 1e9:
            return [(path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats]
    return None


def package_versions(packages: Iterable[str]) -> list[str]:
    """The versions of what decides over pixels and towers, without importing it; empty for what is not installed."""
    installed = dict.fromkeys(packages, "")
    for name in installed:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return list(installed.values())
