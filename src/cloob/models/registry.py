"""Public checkpoints by name: where each lies, and what is published of its hash."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.errors import nearest


@dataclass(frozen=True)
class PublicFile:
    """One file: where it lies, its name in the cache, and the SHA-256 that its publisher gives, if any."""

    url: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class PublicModel:
    """One model.

    Attributes:
        about: What it is, in a line.
        files: What has to be there.
        folder: Whether the folder is the model; else the first file is.
        config: The configuration of a crowsonkb file.
    """

    about: str
    files: tuple[PublicFile, ...]
    folder: bool = False
    config: dict[str, Any] | None = field(default=None, hash=False)


_LISTED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
MODELS = {
    name: PublicModel(**model | {"files": tuple(PublicFile(**file) for file in model["files"])})
    for name, model in _LISTED.items()
}
"""The models by their names."""


def suggestion(source: str) -> str | None:
    """What was meant by a name that has a publisher of ours in front and is none of the models; None for others."""
    publisher = source.partition("/")[0]
    if source in MODELS or publisher not in {name.partition("/")[0] for name in MODELS}:
        return None
    return nearest(source, MODELS)
