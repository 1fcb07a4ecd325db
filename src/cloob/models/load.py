"""``load_model``: a name, folder or file to an encoder; and which model this is, by a digest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from cloob.cache import Cache
from cloob.distributed import resolve_device
from cloob.errors import InputError, one_line
from cloob.models import runs
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder, digest
from cloob.models.folder import read_model
from cloob.models.importing import check_hub_model, fetch_first, fetch_model, translated
from cloob.models.source import PUBLIC, WEIGHTS_ENDINGS, Source, file_stamp, kept_digest
from cloob.models.tokenizer import HUB_FILE, RinnaTokenizer
from cloob.models.towers import create_model
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import crowsonkb, hf_clip, rinna, torch_clip
from cloob.models.weights.containers import INDEX, WEIGHTS_FILES, read_safetensors

Module = TypeVar("Module", bound=nn.Module)
FAMILIES = {"clip": hf_clip.load, "cloob": rinna.load}
"""What loads another program's folder, by the ``model_type`` of its ``config.json``."""
_PACKAGES = ("cloob", "torch", "open_clip_torch", "timm", "transformers")  # they make modules of files


@overload
def load_model(source: str | Path, device: str | torch.device = "auto", *, towers: None = None) -> DualEncoder: ...


@overload
def load_model(source: str | Path, device: str | torch.device = "auto", *, towers: Module) -> Module: ...


def load_model(
    source: str | Path, device: str | torch.device = "auto", *, towers: nn.Module | None = None
) -> nn.Module:
    """Loads two towers, in eval mode.

    Args:
        source: A run folder (its best checkpoint if one was validated, else its last; ``"RUN:best"``, ``"RUN:last"``),
            a checkpoint folder, a model folder, or as a string open_clip's ``"NAME/TAG"``, ``"hf-hub:…"``,
            ``"local-dir:…"``; a file, folder or public name of another program (docs/weights.md).
        device: Where the towers go; ``"auto"`` is CUDA where there is one, else the CPU.
        towers: For a run that trained a module of yours (``train(…, towers=module)``): such a module, whose weights
            are replaced.

    Returns:
        The encoder, whose ``make_objective()`` gives the objective that it was trained with; or ``towers``.

    Raises:
        InputError: Nothing there, not a model, weights that are missing, damaged or of another architecture, an unknown
            name or tag, or weights that cannot be fetched.

    Example:
        >>> import cloob
        >>> config = cloob.get_recipe("demo-scratch").override(steps=2, batch_size=8, device="cpu", out="runs/example")
        >>> model = cloob.load_model(cloob.train(config).run)
        >>> model.encode_text(["a red heart", "an elephant"]).shape
        torch.Size([2, 256])
    """
    place = resolve_device(device)
    if towers is None:
        return _load(source).to(place).eval()
    folder = find_model_folder(source)
    if folder is None:
        raise InputError(f"{source}: is no run or model folder of cloob, whose weights could go into towers=")
    _fill_module(towers, folder)
    return towers.to(place).eval()


def _fill_module(module: nn.Module, folder: Path) -> None:
    if not (folder / runs.MODULE_FILE).is_file():
        raise InputError(f"{folder}: holds no weights of a module of Python code; load it without towers=")
    try:
        module.load_state_dict(read_safetensors(folder / runs.TOWERS_WEIGHTS_FILE))
    except RuntimeError as error:
        raise InputError(f"{folder}: does not fit {type(module).__qualname__} ({one_line(error)})") from error


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder of ours, or of open_clip's, that a source leads to; None for others, InputError for no model."""
    parsed = Source.parse(source)
    folder = parsed.path
    if parsed.kind != "folder" or folder is None:
        return None
    ours = (runs.config_file(folder), folder / runs.CHECKPOINTS_FOLDER, folder / runs.MODEL_FOLDER)
    theirs = ["config.json", *WEIGHTS_FILES, *(f"{name}{INDEX}" for name in WEIGHTS_FILES)]
    if not any(path.exists() for path in ours) and any((folder / name).is_file() for name in theirs):
        return None
    if parsed.variant or ((folder / runs.CHECKPOINTS_FOLDER).is_dir() and not runs.config_file(folder).is_file()):
        return runs.chosen_checkpoint(folder, parsed.variant) / runs.MODEL_FOLDER
    for place in (folder, folder / runs.MODEL_FOLDER):
        if runs.config_file(place).is_file():
            return place
    what = f"no run (checkpoints/), no checkpoint (model/) and no model folder ({runs.CONFIG_FILE})"
    if (folder / "adapter_config.json").is_file():
        what = "a LoRA adapter; merge it (merge_and_unload) and save"
    raise InputError(f"{folder}: {what if folder.is_dir() else 'no such folder'}{_meant_file(folder)}")


def _load(source: str | Path) -> DualEncoder:
    parsed = Source.parse(source)
    if not parsed.library and (folder := find_model_folder(source)) is not None:
        return read_model(folder, _load)
    if parsed.kind == "hub" and not parsed.library:
        return _load_hub(parsed)
    if parsed.kind == "towers" and parsed.variant:
        return create_model(parsed.name, pretrained=parsed.variant, seed=0)
    path, config = parsed.path, None
    if parsed.kind == "public":
        path, config = fetch_model(parsed.name), PUBLIC[parsed.name].get("config")
    if path is None or parsed.library or path.suffix == ".safetensors":
        raise InputError(parsed.refusal())
    with translated(str(path)):
        if path.is_dir():
            return _family(path)(path)
        if path.suffix == ".pkl":
            return crowsonkb.load(path, config, "exact" if parsed.port else "tanh")
        return torch_clip.load(path, lambda name: create_model(name, pretrained=str(path), seed=0))


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
        encoder = _family(folder)(fetch_first(name, where, hf_clip.WEIGHTS, revision))
        encoder.name = where
        return encoder


def _meant_file(folder: Path) -> str:
    """A clause that names a file of weights in a folder which is no model; empty where there is none."""
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS_ENDINGS[:3] and path.is_file())
    return f"; did you mean {files[0]}?" if files else ""


def _family(folder: Path) -> Callable[[Path], DualEncoder]:
    """What loads another program's folder, by its ``config.json``."""
    check_folder(folder)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        right = "'clip' (CLIPModel) or 'cloob' (rinna) is wanted"
        raise InputError(f"{folder / 'config.json'}: model_type is {kind[:40]!r}; {right}{_meant_file(folder)}")
    return lambda weights: FAMILIES[kind](weights, config)


def fingerprint(encoder: Any) -> str:
    """A digest of a model's weights, towers and preprocessing; an encoder that is no module brings one."""
    return digest(encoder, _facts(encoder)) if isinstance(encoder, nn.Module) else str(encoder.fingerprint)


def _facts(encoder: nn.Module) -> dict[str, Any]:
    """What else than the weights decides the embeddings of pictures."""
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
    facts = [before, package_versions(_PACKAGES), _facts(encoder)]
    return encoder, kept_digest(facts, lambda: fingerprint(encoder), cache)


def _stamp(source: str | Path) -> list[tuple[str | int, ...]] | None:
    """The stamp of a source's files, of a run those of its checkpoint; None where they are not known."""
    with contextlib.suppress(OSError, InputError):  # loading it reports that better
        return file_stamp(Source.parse(find_model_folder(source) or source).files())
    return None


def package_versions(packages: Iterable[str]) -> list[str]:
    """The versions of what decides over pixels and towers, without importing it; empty for what is not installed."""
    return [next((found.version for found in metadata.distributions(name=name)), "") for name in packages]
