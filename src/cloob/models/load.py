"""``load_model``: a name, folder or file to an encoder; and which model this is, by a
digest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from cloob.cache import Cache, cache_root
from cloob.distributed import resolve_device
from cloob.errors import InputError, one_line
from cloob.models import runs
from cloob.models.aligned.model import (
    VectorEncoder,
    encoders_here,
    load_aligned,
    read_heads,
)
from cloob.models.encoder import DualEncoder, EncoderConfig, weights_digest
from cloob.models.importing import (
    check_folder,
    check_hub_model,
    check_model_cfg,
    fetch_first,
    read_json,
    translated,
)
from cloob.models.onnx import Graph, PlainEncoder
from cloob.models.source import (
    PUBLIC,
    WEIGHTS_ENDINGS,
    ModelSource,
    PublicFile,
    fetch_public,
    file_stamp,
    kept_digest,
)
from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    HUB_FILE,
    RinnaTokenizer,
    read_tokenizer,
)
from cloob.models.towers import create_model, filled_towers, load_tokenizer
from cloob.models.weights import hf_clip, other, torch_clip
from cloob.models.weights.containers import INDEX, WEIGHTS_FILES, read_safetensors
from cloob.models.weights.keymap import Towers, fill

Module = TypeVar("Module", bound=nn.Module)
_PREPROCESS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
FAMILIES: dict[str, Callable[[Path, dict[str, Any]], DualEncoder]] = {
    "clip": hf_clip.load,
    "cloob": other.load,
}
"""What loads another program's folder, by the ``model_type`` of its ``config.json``."""
_PACKAGES = (
    "cloob",
    "torch",
    "open_clip_torch",
    "timm",
    "transformers",
)  # they make modules of files


@overload
def load_model(
    source: str | Path, device: str | torch.device = "auto", *, towers: None = None
) -> DualEncoder: ...


@overload
def load_model(
    source: str | Path, device: str | torch.device = "auto", *, towers: Module
) -> Module: ...


def load_model(
    source: str | Path,
    device: str | torch.device = "auto",
    *,
    towers: nn.Module | None = None,
) -> nn.Module:
    """Loads two towers, in eval mode.

    Args:
        source: A run folder (its best checkpoint if one was validated, else its last;
            ``"RUN:best"``, ``"RUN:last"``), a checkpoint folder, a model folder, or as
            a string open_clip's ``"NAME/TAG"``, ``"hf-hub:…"``, ``"local-dir:…"``; a
            file, folder or public name of another program (the page “Weights of other
            programs”).
        device: Where the towers go; ``"auto"`` is CUDA where there is one, else the
            CPU.
        towers: For a run that trained a module of yours (``train(…, towers=module)``):
            such a module, whose weights are replaced.

    Returns:
        The encoder, whose ``make_objective()`` gives the objective that it was trained
        with; or ``towers``.

    Raises:
        InputError: Nothing there, not a model, weights that are missing, damaged or of
            another architecture, an unknown name or tag, or weights that cannot be
            fetched.

    Example:
        >>> import cloob
        >>> config = cloob.get_recipe("demo-scratch")
        >>> config = config.override(steps=2, batch_size=8, out="runs/example")
        >>> config = config.override(device="cpu")
        >>> model = cloob.load_model(cloob.train(config).run)
        >>> model.encode_text(["a red heart", "an elephant"]).shape
        torch.Size([2, 256])
    """
    place = resolve_device(device)
    if towers is None:
        return _load(source).to(place).eval()
    folder = find_model_folder(source)
    if folder is None or not (folder / runs.MODULE_FILE).is_file():
        raise InputError(
            f"{folder or source}: holds no weights of a module of Python code; load it"
            " without towers="
        )
    try:
        towers.load_state_dict(read_safetensors(folder / runs.TOWERS_WEIGHTS_FILE))
    except RuntimeError as error:
        raise InputError(
            f"{folder}: does not fit {type(towers).__qualname__} ({one_line(error)})"
        ) from error
    return towers.to(place).eval()


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder of ours, or of open_clip's, that a source leads to; None for
    others, InputError for no model.
    """
    parsed = ModelSource.parse(source)
    folder = parsed.path
    if parsed.kind != "folder" or folder is None:
        return None
    ours = (
        runs.config_file(folder),
        folder / runs.CHECKPOINTS_FOLDER,
        folder / runs.MODEL_FOLDER,
    )
    theirs = [
        "config.json",
        *WEIGHTS_FILES,
        *(f"{name}{INDEX}" for name in WEIGHTS_FILES),
    ]
    if not any(path.exists() for path in ours) and any(
        (folder / name).is_file() for name in theirs
    ):
        return None
    if parsed.variant or (
        (folder / runs.CHECKPOINTS_FOLDER).is_dir()
        and not runs.config_file(folder).is_file()
    ):
        return runs.chosen_checkpoint(folder, parsed.variant) / runs.MODEL_FOLDER
    for place in (folder, folder / runs.MODEL_FOLDER):
        if runs.config_file(place).is_file():
            return place
    what = (
        "no run (checkpoints/), no checkpoint (model/) and no model folder"
        f" ({runs.CONFIG_FILE})"
    )
    if (folder / "adapter_config.json").is_file():
        what = "a LoRA adapter; merge it (merge_and_unload) and save"
    raise InputError(
        f"{folder}:"
        f" {what if folder.is_dir() else 'no such folder'}{_meant_file(folder)}"
    )


def _load(source: str | Path) -> DualEncoder:
    parsed = ModelSource.parse(source)
    if not parsed.library and (folder := find_model_folder(source)) is not None:
        return _read_folder(folder)
    if parsed.kind == "hub" and not parsed.library:
        return _load_hub(parsed)
    if parsed.kind == "towers" and parsed.variant:
        return create_model(parsed.name, pretrained=parsed.variant, seed=0)
    path, config = parsed.path, None
    if parsed.kind == "public":
        model, folder = (
            PUBLIC[parsed.name],
            cache_root() / "weights" / parsed.name.replace("/", "--"),
        )
        files = [fetch_public(PublicFile(**file), folder) for file in model["files"]]
        path, config = folder if len(files) > 1 else files[0], model.get("config")
    if path is None or parsed.library or path.suffix == ".safetensors":
        raise InputError(parsed.refusal())
    with translated(str(path)):
        if path.is_dir():
            return _read_foreign(path)
        if path.suffix == ".pkl":
            return other.load(path, config, "exact" if parsed.port else "tanh")
        return torch_clip.load(
            path, lambda name: create_model(name, pretrained=str(path), seed=0)
        )


def _load_hub(source: ModelSource) -> DualEncoder:
    name, where, revision = source.name, source.text, source.variant or None
    with translated(where):
        folder = check_hub_model(
            name, where, HUB_FILE, RinnaTokenizer.FILE, revision=revision
        )
        kind = runs.config_file(folder)
        if kind.name == runs.ALIGNED_FILE and (here := encoders_here(read_json(kind))):
            raise InputError(f"{where}: asks for {here[0]!r}, a folder of this machine")
        if kind.name != runs.CONFIG_FILE:  # a model folder of ours
            return _read_folder(
                fetch_first(
                    name, where, (runs.HEADS_FILE, runs.TOWERS_WEIGHTS_FILE), revision
                )
            )
        if kind.is_file():
            return _read_folder(
                fetch_first(name, where, runs.HUB_WEIGHTS_FILES, revision), where
            )
        encoder = _read_foreign(folder, source)
        encoder.name = where
        return encoder


def _read_foreign(folder: Path, hub: ModelSource | None = None) -> DualEncoder:
    """Another program's folder; of the hub its weights are fetched when its
    configuration is known.
    """
    check_folder(folder)
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        right = "'clip' (CLIPModel) or 'cloob' (rinna) is expected"
        raise InputError(
            f"{folder / 'config.json'}: model_type is {kind[:40]!r};"
            f" {right}{_meant_file(folder)}"
        )
    weights = (
        fetch_first(hub.name, hub.text, hf_clip.WEIGHTS, hub.variant or None)
        if hub
        else folder
    )
    return FAMILIES[kind](weights, config)


def _read_folder(folder: Path, of_hub: str = "") -> DualEncoder:
    """Towers from a model folder; ``of_hub`` is its name on the hub, from where
    open_clip takes the tokenizer then.
    """
    file = runs.config_file(folder)
    with translated(str(file)):
        check_folder(folder)
        config = read_json(file)
        written = folder / runs.OBJECTIVE_FILE
        objective = runs.check_objective(
            read_json(written) if written.is_file() else {}, str(written)
        )
        if file.name == runs.ALIGNED_FILE:
            return load_aligned(folder, config, objective, _load)
        if file.name == runs.VECTORS_FILE:
            return VectorEncoder(*read_heads(folder, config, ("a", "b")), objective)
        if file.name == runs.TOWERS_FILE:
            encoder, weights = (
                other.build(config["name"], file, config),
                folder / runs.TOWERS_WEIGHTS_FILE,
            )
            fill(encoder.model, weights, read_safetensors(weights))
            encoder.objective_config = objective or encoder.objective_config
            return encoder
        if file.name == runs.MODULE_FILE:
            fills = (
                "to which its weights belong, is Python code; cloob.load_model(…,"
                " towers=module) fills one"
            )
            raise InputError(f"{folder}: {config['class']}, {fills}")
        if file.name == runs.ONNX_FILE:
            plain = PlainEncoder(folder)
            images = _GraphTower(plain.image_graph, torch.float32, plain.preprocess_cfg)
            towers = Towers(
                images, _GraphTower(plain.text_graph, torch.int64), plain.logit_scale
            )
            built = EncoderConfig(
                "onnx", plain.embed_dim, plain.context_length, plain.settings
            )
            encoder = DualEncoder(plain.name, towers, plain.tokenizer, built, objective)
            encoder.fingerprint = plain.fingerprint
            return encoder
        model_cfg = config["model_cfg"]
        check_model_cfg(model_cfg, str(file))
        text_cfg, weights = (
            model_cfg["text_cfg"],
            runs.weights_file(folder) or folder / runs.WEIGHTS_FILE,
        )
        if tower := text_cfg.get(
            "hf_model_name"
        ):  # whose configuration open_clip takes from the hub: checked first
            check_hub_model(tower, f"{file}: text_cfg.hf_model_name asks for {tower!r}")
        preprocess = {
            key: value
            for key, value in config.get("preprocess_cfg", {}).items()
            if key in _PREPROCESS
        }
        model, trained = filled_towers(
            model_cfg, preprocess, weights, f"local-dir:{folder}", str(file)
        )
        if "tokenizer" in config:
            length, vocabulary = (
                text_cfg.get("context_length", 77),
                text_cfg.get("vocab_size", CLIP_VOCABULARY),
            )
            tokenizer = read_tokenizer(file, config["tokenizer"], length, vocabulary)
        else:
            local = None if of_hub else folder
            tokenizer = load_tokenizer(
                f"local-dir:{folder}", text_cfg, of_hub or str(file), local
            )
        name = of_hub or str(config.get("name", folder.name))
        return DualEncoder(
            name,
            model,
            tokenizer,
            EncoderConfig.open_clip(model_cfg),
            objective or trained,
        )


class _GraphTower(nn.Module):
    """A graph in the place of a tower: (n, 3, H, W) normalised pixels or (n, L) tokens
    to (n, D).
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        preprocess_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.graph, self.dtype, self.preprocess_cfg = graph, dtype, preprocess_cfg

    def forward(self, items: Tensor) -> Tensor:
        array = items.detach().to("cpu", self.dtype).contiguous().numpy()
        return torch.from_numpy(self.graph(array)).to(items.device)


def _meant_file(folder: Path) -> str:
    files = sorted(
        path
        for path in folder.glob("*")
        if path.suffix in WEIGHTS_ENDINGS[:3] and path.is_file()
    )
    return f"; did you mean {files[0]}?" if files else ""


def fingerprint(encoder: Any) -> str:
    """A digest of a model's weights, towers and preprocessing, which an ONNX export
    brings along.
    """
    settings = getattr(getattr(encoder, "config", None), "settings", None)
    facts = {"config": settings, "preprocess": getattr(encoder, "preprocess_cfg", None)}
    return getattr(encoder, "fingerprint", "") or weights_digest(encoder, facts)


def load_with_fingerprint(
    source: str | Path, device: str | torch.device = "auto", cache: Cache | None = None
) -> tuple[DualEncoder, str]:
    """A model by :func:`cloob.load_model` and its fingerprint, which is computed once
    for the same files.
    """
    before = _stamp(source)
    encoder = load_model(source, device=device)
    if before is None or _stamp(source) != before:  # changed while it was read
        return encoder, fingerprint(encoder)
    facts = [before, package_versions(_PACKAGES), str(source)]
    return encoder, kept_digest(facts, lambda: fingerprint(encoder), cache)


def _stamp(source: str | Path) -> list[tuple[str | int, ...]] | None:
    """The stamp of a source's files, of a run those of its checkpoint; None where they
    are not known.
    """
    with contextlib.suppress(OSError, InputError):  # loading it reports that better
        return file_stamp(
            ModelSource.parse(find_model_folder(source) or source).files()
        )
    return None


def package_versions(packages: Iterable[str]) -> list[str]:
    """The versions of what decides over pixels and towers, without importing it; empty
    for what is not installed.
    """
    return [
        next((result.version for result in metadata.distributions(name=name)), "")
        for name in packages
    ]
