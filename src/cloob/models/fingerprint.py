"""Which model this is: a digest of its weights and of what else decides over its embeddings.

A digest of weights takes a second for each 0.7 GB, so that of a model from files is kept in the cache, by what the
system says of the files: path, size, both times, number. A file that was changed less than two seconds ago is not
trusted, as the next change may leave all of that as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloob.cache import Cache, cache_root
from cloob.data.content import add_part
from cloob.errors import InputError, require
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import Encoder
from cloob.models.load import find_model_folder, load_model
from cloob.models.names import check_path, known_models
from cloob.models.towers import open_clip
from cloob.models.weights import registry
from cloob.models.weights.families import PORT

_BLOCK = 1 << 20
_YOUNG_SECONDS = 2.0
_DIGEST = re.compile("[0-9a-f]{32}")
_PACKAGES = ("cloob", "torch", "open_clip_torch", "timm", "transformers")  # they make modules of files


def add_module(state: Any, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Adds a model's parameters and buffers to a hash.

    Args:
        state: Of hashlib.
        module: The model.
        facts: JSON-able; what else decides over its embeddings, such as the configuration of its towers.
    """
    add_part(state, json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        add_part(state, f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in torch.split(flat, _BLOCK):
            state.update(part.numpy().tobytes())


def fingerprint(encoder: Encoder) -> str:
    """A digest of a model's weights, towers and preprocessing: 32 hex digits, on every machine the same.

    Where the model lies, what it is called and where it runs play no part. An encoder that is no module says its own,
    as ``fingerprint``.

    Raises:
        InputError: It is no module and has none.
    """
    if not isinstance(encoder, nn.Module):
        own = getattr(encoder, "fingerprint", None)
        if not isinstance(own, str):
            raise InputError(f"{encoder.name}: is no torch module and has no fingerprint, so nobody can tell it again")
        return own
    state = hashlib.blake2b(digest_size=16)
    add_module(state, encoder, _facts(encoder))
    return str(state.hexdigest())


def load_with_fingerprint(
    source: str | Path, device: str | torch.device = "auto", cache: Cache | None = None
) -> tuple[DualEncoder, str]:
    """A model and its fingerprint, which is computed once for the same files.

    Args:
        source: As for :func:`cloob.load_model`.
        device: Likewise.
        cache: Where fingerprints are kept; None: ``Cache()``.

    Raises:
        InputError: As :func:`cloob.load_model`.
    """
    before = _stamp(str(source))
    encoder = load_model(source, device=device)
    if before is None or _stamp(str(source)) != before:  # changed while it was read
        return encoder, fingerprint(encoder)
    cache = cache or Cache()
    name = json.dumps([before, package_versions(_PACKAGES), _facts(encoder)], sort_keys=True, default=str)
    name = f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()}.txt"
    found = cache.find("digests", name)
    known = found.read_text(encoding="ascii", errors="replace") if found is not None else ""
    if not _DIGEST.fullmatch(known):
        known = fingerprint(encoder)
        with contextlib.suppress(InputError):  # a cache that cannot be written costs the second again
            cache.put("digests", name, known.encode())
    return encoder, known


def _facts(encoder: nn.Module) -> dict[str, Any]:
    """What decides over embeddings of pictures, of which an index has vectors, beside the weights."""
    config = getattr(encoder, "config", None)
    return {"config": getattr(config, "settings", None), "preprocess": getattr(encoder, "preprocess_cfg", None)}


def _stamp(source: str) -> list[tuple[str | int, ...]] | None:
    """What the system says of a source's files; None where they are not known, or one was changed a moment ago."""
    files: list[tuple[str | int, ...]] = []
    try:
        for path in sorted(set(_files(source))):
            stat = path.stat()
            newest = max(stat.st_mtime_ns, stat.st_ctime_ns)
            if newest > time.time_ns() - _YOUNG_SECONDS * 1e9:
                return None
            files.append((str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    except (OSError, InputError):  # which loading it says in its own words
        return None
    return files or None


def _files(source: str) -> Iterable[Path]:
    """The files that a source's weights lie in; none where it is not on this machine.

    Heads that were trained on frozen encoders name a digest of each, which is compared when they are loaded: their
    folder is all.
    """
    folder = find_model_folder(source)
    if folder is not None:
        return _within(folder)
    name = check_path(source).removesuffix(PORT)
    if Path(name).exists():
        return _within(Path(name))
    if name in registry.MODELS:
        return _within(cache_root() / "weights" / name.replace("/", "--"))
    if source.startswith("hf-hub:"):
        return _of_hub(source.removeprefix("hf-hub:"))
    model, _, tag = source.rpartition("/")
    if model.replace("/", "-") not in known_models():
        return ()
    weights = open_clip().get_pretrained_cfg(model.replace("/", "-"), tag) or {}
    if weights.get("hf_hub"):
        return _of_hub(str(weights["hf_hub"]).rpartition("/")[0])
    kept = Path("~/.cache/clip").expanduser() / str(weights.get("url", "")).rpartition("/")[2]
    return _within(kept) if kept.is_file() else ()


def _of_hub(name: str) -> Iterable[Path]:
    """What the hub's cache has of a model."""
    cache = Path(require("huggingface_hub.constants", "train").HF_HUB_CACHE)
    folder = cache / f"models--{name.replace('/', '--')}"
    return [*_within(folder / "refs"), *_within(folder / "snapshots")]


def _within(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]


def package_versions(packages: Iterable[str]) -> list[str]:
    """The versions of what decides over pixels and towers, without importing it; empty for what is not installed."""
    versions = []
    for package in packages:
        try:
            versions.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            versions.append("")
    return versions
