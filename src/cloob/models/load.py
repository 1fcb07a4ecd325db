"""``load_model``: a name, folder or file to an encoder; and which model this is, by a
digest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from cloob.distributed import resolve_device
from cloob.errors import InputError, one_line
from cloob.models import runs
from cloob.models.aligned.model import load_aligned
from cloob.models.encoder import DualEncoder, EncoderConfig, Model, weights_digest
from cloob.models.importing import (
    check_folder,
    check_hub_model,
    check_model_cfg,
    fetch_first,
    read_json,
    translated,
)
from cloob.models.onnx import Graph, PlainEncoder
from cloob.models.settings import JsonObject, ModelConfig, Pixels
from cloob.models.source import (
    PUBLIC,
    ModelSource,
    PublicFile,
    fetch_public,
    find_model_folder,
    public_folder,
)
from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    HUB_FILE,
    RinnaTokenizer,
    read_tokenizer,
)
from cloob.models.towers import create_model, filled_towers, load_tokenizer
from cloob.models.vectors import Heads, VectorEncoder, read_heads
from cloob.models.weights import cloome, crowsonkb, hf_clip, rinna, torch_clip
from cloob.models.weights.containers import WEIGHTS_FILES, read_safetensors, read_torch
from cloob.models.weights.keymap import Towers, fill

Module = TypeVar("Module", bound=nn.Module)
_PREPROCESS = {"mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}


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
    target = resolve_device(device)
    encoder = _load(source) if towers is None else _fill_module(source, towers)
    return encoder.to(target).eval()


def _fill_module(source: str | Path, towers: nn.Module) -> nn.Module:
    """A module of Python code with the weights that a run trained."""
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
    return towers


def _load(source: str | Path) -> Model:
    """The encoder of a source: its files are found, then read by their kind."""
    parsed = ModelSource.parse(source)
    if parsed.kind == "hub":
        return _load_hub(parsed)
    if parsed.kind == "towers" and parsed.variant:
        return create_model(parsed.name, pretrained=parsed.variant, seed=0)
    if parsed.kind == "public":
        return _load_public(parsed)
    path = find_model_folder(source) or parsed.path
    if path is None or path.suffix == ".safetensors":
        raise InputError(parsed.refusal())
    return _read_folder(path) if path.is_dir() else _read_file(path, parsed)


def _load_public(source: ModelSource) -> Model:
    """A public model, fetched unless the cache has it."""
    model = PUBLIC[source.name]
    folder = public_folder(source.name)
    files = [fetch_public(PublicFile(**file), folder) for file in model.files]
    if len(files) > 1:
        return _read_folder(folder)
    return _read_file(files[0], source, model.config)


def _read_file(
    path: Path, source: ModelSource, config: JsonObject | None = None
) -> Model:
    """Another program's file; ``config`` of a crowsonkb file."""
    with translated(str(path)):
        if path.suffix == ".pkl":
            return crowsonkb.load(path, config, "exact" if source.is_port else "tanh")
        return _read_torch_file(path)


def _read_torch_file(path: Path) -> Model:
    """A file of CLOOME's, open_clip's, ml-jku's or OpenAI's, as its tensors tell."""
    file = read_torch(path)
    if file.keys.keys() >= cloome.TENSORS:
        cells, molecules, objective = cloome.load(path, file)
        return VectorEncoder(*cast(Heads, (cells, molecules)), objective)
    if torch_clip.is_open_clips(path, file):
        name = torch_clip.name_of_towers(path)
        return create_model(name, pretrained=str(path), seed=0)
    return torch_clip.load(path, file)


def _load_hub(source: ModelSource) -> Model:
    """A model of the hub; its configuration is checked before its weights are
    fetched.
    """
    where = source.text
    with translated(where):
        folder = check_hub_model(source.name, where, HUB_FILE, RinnaTokenizer.FILE)
        file = runs.config_file(folder)
        if not file.is_file():
            read = _transformers_reader(folder)
            fetch_first(source.name, where, WEIGHTS_FILES)
            encoder = read(folder)
            encoder.name = where
            return encoder
        if file.name == runs.CONFIG_FILE:
            fetch_first(source.name, where, runs.HUB_WEIGHTS_FILES)
            return _read_towers(folder, where)
        fetch_first(source.name, where, (runs.HEADS_FILE, runs.TOWERS_WEIGHTS_FILE))
        return _read_folder(folder)


def _transformers_reader(folder: Path) -> Callable[[Path], DualEncoder]:
    """What loads a folder of transformers', by the ``model_type`` of its
    ``config.json``.
    """
    kind = str(read_json(folder / "config.json").get("model_type"))
    families = {"clip": hf_clip.load, "cloob": rinna.load}
    if kind not in families:
        raise InputError(
            f"{folder / 'config.json'}: model_type is {kind[:40]!r}; 'clip' (CLIPModel)"
            " or 'cloob' (rinna) is expected"
        )
    return families[kind]


def _read_folder(folder: Path) -> Model:
    file = runs.config_file(folder)
    is_ours = file.is_file()
    with translated(str(file if is_ours else folder)):
        check_folder(folder)
        read = _READERS[file.name] if is_ours else _transformers_reader(folder)
        return read(folder)


def _read_aligned(folder: Path) -> DualEncoder:
    config = read_json(folder / runs.ALIGNED_FILE)
    return load_aligned(folder, config, _objective(folder), load_model)


def _read_vectors(folder: Path) -> VectorEncoder:
    config = read_json(folder / runs.VECTORS_FILE)
    heads = read_heads(folder, config, ("a", "b"))
    if "tables" not in config:
        return VectorEncoder(*heads, _objective(folder))
    from cloob.data.table import read_encodings

    encodings = read_encodings(config["tables"])
    return VectorEncoder(*heads, _objective(folder), encodings)


def _read_other_towers(folder: Path) -> DualEncoder:
    """The encoder of a folder with towers that open_clip does not know."""
    file = folder / runs.TOWERS_FILE
    config = read_json(file)
    build = crowsonkb.build if config["family"] == "crowsonkb" else rinna.build
    encoder = build(config["name"], file, config)
    weights = folder / runs.TOWERS_WEIGHTS_FILE
    fill(encoder.model, weights, read_safetensors(weights))
    encoder.objective_config = _objective(folder) or encoder.objective_config
    encoder.weights_file = weights
    return encoder


def _read_module(folder: Path) -> Model:
    name = read_json(folder / runs.MODULE_FILE)["class"]
    raise InputError(
        f"{folder}: {name}, to which its weights belong, is Python code;"
        " cloob.load_model(…, towers=module) fills one"
    )


def _read_graphs(folder: Path) -> DualEncoder:
    """The encoder of a folder with ONNX graphs."""
    plain = PlainEncoder(folder)
    images = _GraphTower(plain.image_graph, torch.float32, plain.preprocess_cfg)
    texts = _GraphTower(plain.text_graph, torch.int64)
    towers = Towers(images, texts, plain.logit_scale)
    config = EncoderConfig(
        "onnx", plain.embed_dim, plain.context_length, plain.settings
    )
    encoder = DualEncoder(
        plain.name, towers, plain.tokenizer, config, _objective(folder)
    )
    encoder.fingerprint = plain.fingerprint
    return encoder


def _read_towers(folder: Path, hub: str = "") -> DualEncoder:
    """open_clip's towers; ``hub`` is the name there of what was fetched into a folder,
    from where open_clip takes the tokenizer then.
    """
    file = folder / runs.CONFIG_FILE
    config = read_json(file)
    model_cfg: ModelConfig = config["model_cfg"]
    check_model_cfg(model_cfg, str(file))
    text_cfg = model_cfg["text_cfg"]
    text_tower = text_cfg.get("hf_model_name")
    if text_tower:  # whose configuration open_clip takes from the hub: checked first
        asks = f"{file}: text_cfg.hf_model_name asks for {text_tower!r}"
        check_hub_model(text_tower, asks)
    preprocess_cfg = config.get("preprocess_cfg", {})
    pixels = {key: value for key, value in preprocess_cfg.items() if key in _PREPROCESS}
    weights = runs.weights_file(folder) or folder / runs.WEIGHTS_FILE
    source = f"local-dir:{folder}"
    towers = filled_towers(model_cfg, cast(Pixels, pixels), weights, source, str(file))
    built = EncoderConfig.open_clip(model_cfg)
    if "tokenizer" in config:
        vocabulary = text_cfg.get("vocab_size", CLIP_VOCABULARY)
        tokenizer = read_tokenizer(
            file, config["tokenizer"], built.context_length, vocabulary
        )
    else:
        tokenizer_folder = None if hub else folder
        tokenizer = load_tokenizer(source, text_cfg, hub or str(file), tokenizer_folder)
    name = hub or str(config.get("name", folder.name))
    objective = _objective(folder) or towers.objective
    encoder = DualEncoder(name, towers.model, tokenizer, built, objective)
    encoder.weights_file = weights
    return encoder


def _objective(folder: Path) -> dict[str, object]:
    file = folder / runs.OBJECTIVE_FILE
    return runs.check_objective(read_json(file), str(file)) if file.is_file() else {}


_READERS: dict[str, Callable[[Path], Model]] = {
    runs.CONFIG_FILE: _read_towers,
    runs.TOWERS_FILE: _read_other_towers,
    runs.ALIGNED_FILE: _read_aligned,
    runs.VECTORS_FILE: _read_vectors,
    runs.ONNX_FILE: _read_graphs,
    runs.MODULE_FILE: _read_module,
}
"""What reads a model folder, by its configuration file."""


class _GraphTower(nn.Module):
    """A graph in the place of a tower: (n, 3, H, W) normalised pixels or (n, L) tokens
    to (n, D).
    """

    def __init__(
        self,
        graph: Graph,
        dtype: torch.dtype,
        preprocess_cfg: Pixels | None = None,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.dtype = dtype
        self.preprocess_cfg = preprocess_cfg

    def forward(self, items: Tensor) -> Tensor:
        array = items.detach().to("cpu", self.dtype).numpy()
        return torch.from_numpy(self.graph(array)).to(items.device)


def fingerprint(encoder: Any) -> str:
    """A digest of a model's weights, towers and preprocessing, which an ONNX export
    brings along.
    """
    stored = getattr(encoder, "fingerprint", "")
    if stored:
        return str(stored)
    settings = getattr(getattr(encoder, "config", None), "settings", None)
    pixels = getattr(encoder, "preprocess_cfg", None)
    return weights_digest(encoder, {"config": settings, "preprocess": pixels})
