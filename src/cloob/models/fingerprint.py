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
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloob.cache import Cache
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder
from cloob.models.encoding import Encoder, digest
from cloob.models.load import find_model_folder, load_model
from cloob.models.source import Source

_YOUNG_SECONDS = 2.0
_DIGEST = re.compile("[0-9a-f]{32}")
_PACKAGES = ("cloob", "torch", "open_clip_torch", "timm", "transformers")  # they make modules of files


def fingerprint(encoder: Encoder) -> str:
    """A digest of a model's weights, towers and preprocessing; an encoder that is no module says its own."""
    if isinstance(encoder, nn.Module):
        return digest(encoder, _facts(encoder))
    own = getattr(encoder, "fingerprint", None)
    if not isinstance(own, str):
        raise InputError(f"{encoder.name}: is no torch module and has no fingerprint, so nobody can tell it again")
    return own


def _facts(encoder: nn.Module) -> dict[str, Any]:
    """What decides over embeddings of pictures, of which an index has vectors, beside the weights."""
    config = getattr(encoder, "config", None)
    return {"config": getattr(config, "settings", None), "preprocess": getattr(encoder, "preprocess_cfg", None)}


def load_with_fingerprint(
    source: str | Path, device: str | torch.device = "auto", cache: Cache | None = None
) -> tuple[DualEncoder, str]:
    """A model by :func:`cloob.load_model` and its fingerprint, which is computed once for the same files."""
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
    """What the system says of a source's files; None where they are not known, or one was changed a moment ago."""
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
