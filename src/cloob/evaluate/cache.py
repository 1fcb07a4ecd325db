"""Embeddings on the disk, found again by what the model's weights and the data's bytes are.

A file appears under its name only when it is whole, so that any number of runs may share a folder. A file that cannot
be read counts as absent and is written anew.

The folder is bounded (:data:`DEFAULT_LIMIT`, 20 GB, or CLOOB_CACHE_BYTES): whoever stores something above it removes
what was used longest ago, never what is younger than an hour, which another run may be about to read. It may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloob.data.content import add_part
from cloob.errors import InputError, require
from cloob.files import write_whole

DEFAULT_LIMIT = 20_000_000_000
"""Bytes that a folder of embeddings may hold (a million images at D = 512 take 2 GB)."""

_LIMIT_VARIABLE = "CLOOB_CACHE_BYTES"
_YOUNG = 3600.0  # seconds since its last use for which no file is removed
_VERSION = "3"  # of what is stored and how it is computed; a new number makes all files of the old one unused
_BLOCK = 1 << 20
_OWN = re.compile(r"[0-9a-f]{32}/([^/]+-[0-9a-f]{32}\.safetensors|\.tmp-[^/]+)")


class Stored(NamedTuple):
    """What one file holds.

    Attributes:
        tensors: By name.
        facts: JSON-able values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class DiskCache:
    """A folder of embeddings, ``<model key>/<kind>-<data key>.safetensors``.

    Args:
        folder: It is made when something is first stored.
        limit: Bytes that it may hold; None takes CLOOB_CACHE_BYTES of the environment, else :data:`DEFAULT_LIMIT`.

    Raises:
        InputError: CLOOB_CACHE_BYTES is no number of bytes.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder = Path(folder)
        self.limit = _limit() if limit is None else limit

    def load(self, model: str, kind: str, data: str) -> Stored | None:
        """What is stored under the keys; None if nothing is, or it cannot be read."""
        path = self._path(model, kind, data)
        if not path.is_file():
            return None
        library = require("safetensors", "train")
        try:
            with library.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                found = Stored(tensors, json.loads((file.metadata() or {})["facts"]))
            with contextlib.suppress(OSError):  # a folder that can only be read
                os.utime(path)  # the time of its last use, by which evict() chooses
            return found
        except (library.SafetensorError, OSError, KeyError, ValueError):
            return None

    def save(self, model: str, kind: str, data: str, stored: Stored) -> None:
        """Stores under the keys, whole or not at all.

        Raises:
            InputError: The folder cannot be written.
        """
        path = self._path(model, kind, data)
        tensors = {name: value.contiguous() for name, value in stored.tensors.items()}
        facts = json.dumps(stored.facts)  # escaped: a key may come from a file name that is not UTF-8
        content = require("safetensors.torch", "train").save(tensors, metadata={"facts": facts})
        write_whole(path, content, f"{self.folder}: embeddings cannot be kept here")
        self.evict(keep=path)

    def evict(self, keep: Path | None = None) -> list[Path]:
        """Removes what was used longest ago until the folder holds no more than its limit.

        Several runs may do so at once: a file that is gone already is nobody's loss, and whoever looks for it
        computes it anew. What a run that was killed left half written is removed too; what is not of this cache stays.

        Args:
            keep: A file that stays in any case.

        Returns:
            What was removed, in order.
        """
        files: list[tuple[float, int, Path]] = []
        for path in (*self.folder.glob("*/*.safetensors"), *self.folder.glob("*/.tmp-*")):
            if not _OWN.fullmatch(path.relative_to(self.folder).as_posix()):
                continue
            with contextlib.suppress(OSError):  # another run has removed it, or given it its name
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.limit
        removed: list[Path] = []
        oldest = time.time() - _YOUNG
        for used, size, path in sorted(files):
            if excess <= 0 or used > oldest:
                break
            if path == keep:
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
            excess -= size
        return removed

    def _path(self, model: str, kind: str, data: str) -> Path:
        return self.folder / model / f"{kind}-{data}.safetensors"


def _limit() -> int:
    text = os.environ.get(_LIMIT_VARIABLE, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"{_LIMIT_VARIABLE} is {text!r}; a number of bytes is wanted, such as {DEFAULT_LIMIT}")
    return int(text) if text else DEFAULT_LIMIT


def fingerprint(*parts: str) -> str:
    """A short name for a list of strings, equal for equal lists only."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        add_part(state, part.encode("utf-8", "surrogatepass"))
    return str(state.hexdigest())


def folder_key(folder: Path, device: str | torch.device) -> str:
    """The key of a model folder: the bytes of its files (weights, configuration, tokeniser), without loading it.

    Args:
        folder: A model folder.
        device: Where it will run; kinds of devices round differently.

    Raises:
        InputError: A file cannot be read.
    """
    state = _model_state(device)
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            add_part(state, path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                add_part(state, hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return str(state.hexdigest())


def module_key(module: nn.Module, facts: Mapping[str, Any], device: str | torch.device) -> str:
    """The key of a loaded model: its parameters and buffers, and what else decides over its embeddings.

    Args:
        module: The model.
        facts: JSON-able, such as the configuration of its towers.
        device: Where it runs.
    """
    state = _model_state(device)
    add_part(state, json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        add_part(state, f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for part in torch.split(flat, _BLOCK):
            state.update(part.numpy().tobytes())
    return str(state.hexdigest())


def _model_state(device: str | torch.device) -> Any:
    state = hashlib.blake2b(digest_size=16)
    for part in (_VERSION, torch.device(device).type, *_versions(("torch", "open_clip_torch", "timm", "pillow"))):
        add_part(state, part.encode())
    return state


def _versions(packages: Iterable[str]) -> list[str]:
    """Versions of what decides over pixels and towers, without importing it."""
    found = []
    for package in packages:
        try:
            found.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            found.append("")
    return found
