"""Model folders (:mod:`cloob.models.runs`), written so that open_clip's ``local-dir:`` reads them, and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import InputError
from cloob.files import flush
from cloob.models import runs
from cloob.models.aligned.encoders import LoadModel
from cloob.models.aligned.model import ModelFiles, aligned_files, load_aligned, load_vectors, vector_files
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import check_hub_model, translated
from cloob.models.onnx import Graph, PlainEncoder
from cloob.models.tokenizer import CLIP_VOCABULARY, RinnaTokenizer, read_tokenizer
from cloob.models.towers import filled_towers, load_tokenizer
from cloob.models.untrusted import check_folder, check_model_cfg, read_json
from cloob.models.weights import crowsonkb, rinna
from cloob.models.weights.containers import read_safetensors, write_safetensors
from cloob.models.weights.keymap import Towers, fill

_PREPROCESS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def save_model(
    folder: Path, encoder: DualEncoder, objective: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a model folder, synced to the disk; the caller makes it atomic by renaming the folder.

    The ``inv_tau`` and ``bias`` of ``objective``, a ``ContrastiveObjective.config()``, become open_clip's
    ``logit_scale`` and ``logit_bias`` too. ``weights``: the ``state_dict`` where the encoder holds only shards of it.
    """
    encoder.check_weights()
    folder.mkdir(parents=True, exist_ok=True)
    if encoder.config.kind == "aligned":  # heads on frozen encoders: the encoders by name alone
        files = aligned_files(encoder)
    elif encoder.config.kind == "vectors":
        files = vector_files(encoder)
    elif encoder.config.kind == "module":
        files = runs.MODULE_FILE, encoder.config.settings, runs.TOWERS_WEIGHTS_FILE, encoder.model.state_dict()
    else:
        files = _towers_files(encoder, encoder.state_dict() if weights is None else weights, objective)
    config_name, config, weights_name, tensors = files
    for name, content in ((config_name, config), (runs.OBJECTIVE_FILE, objective)):
        (folder / name).write_text(json.dumps(content, indent=2, allow_nan=False), encoding="utf-8")
    write_safetensors(folder / weights_name, tensors)
    if encoder.config.kind == "towers" and isinstance(encoder.tokenizer, RinnaTokenizer):
        (folder / RinnaTokenizer.FILE).write_bytes(encoder.tokenizer.content)
    if encoder.config.settings.get("text_cfg", {}).get("hf_tokenizer_name"):
        encoder.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    flush(folder)


def _towers_files(encoder: DualEncoder, weights: Mapping[str, Tensor], objective: Mapping[str, Any]) -> ModelFiles:
    settings = encoder.config.settings
    state = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    if "inv_tau" in objective:
        state["logit_scale"] = torch.full_like(state["logit_scale"].cpu(), math.log(objective["inv_tau"]))
    if encoder.config.kind == "towers":
        return runs.TOWERS_FILE, {"name": encoder.name, **settings}, runs.TOWERS_WEIGHTS_FILE, state
    if "bias" in objective:
        bias = float(objective["bias"])
        settings = settings | {"init_logit_bias": bias}
        state = state | {"logit_bias": torch.full_like(state["logit_scale"], bias)}
    config = {"model_cfg": settings, "preprocess_cfg": encoder.preprocess_cfg, "name": encoder.name}
    tokenizer = getattr(encoder.tokenizer, "settings", None)  # of other programs; open_clip passes over the key
    if tokenizer is not None:
        config["tokenizer"] = tokenizer
    return runs.CONFIG_FILE, config, runs.WEIGHTS_FILE, state


def read_model(folder: Path, load_model: LoadModel, of_hub: str = "") -> DualEncoder:
    """Towers from a model folder; ``of_hub`` is its name on the hub, from where open_clip takes the tokenizer then."""
    file = runs.config_file(folder)
    with translated(str(file)):
        check_folder(folder)
        config = read_json(file)
        written = folder / runs.OBJECTIVE_FILE
        objective = runs.check_objective(read_json(written) if written.is_file() else {}, str(written))
        if file.name == runs.ALIGNED_FILE:
            return load_aligned(folder, config, objective, load_model)
        if file.name == runs.VECTORS_FILE:
            return load_vectors(folder, config, objective)
        if file.name == runs.TOWERS_FILE:
            return _other_towers(file, config, objective)
        if file.name == runs.MODULE_FILE:
            fills = "is Python code; cloob.load_model(…, towers=module) fills one"
            raise InputError(f"{folder}: {config['class']}, to which its weights belong, {fills}")
        if file.name == runs.ONNX_FILE:
            return OnnxEncoder(PlainEncoder(folder), objective)
        return _open_clip_towers(file, config, objective, of_hub)


def _other_towers(file: Path, content: dict[str, Any], objective: dict[str, Any]) -> DualEncoder:
    name, config = content["name"], content["config"]
    if content["family"] == crowsonkb.FAMILY:
        encoder = crowsonkb.build(name, file, config, content["gelu"])
    else:
        encoder = rinna.build(name, file, config)
    weights = file.parent / runs.TOWERS_WEIGHTS_FILE
    fill(encoder.model, weights, read_safetensors(weights))
    encoder.objective_config = objective or encoder.objective_config
    return encoder


def _open_clip_towers(file: Path, config: dict[str, Any], objective: dict[str, Any], of_hub: str) -> DualEncoder:
    folder, model_cfg = file.parent, config["model_cfg"]
    check_model_cfg(model_cfg, str(file))
    text_cfg, weights = model_cfg["text_cfg"], runs.weights_file(folder) or folder / runs.WEIGHTS_FILE
    if tower := text_cfg.get("hf_model_name"):  # whose configuration open_clip takes from the hub: looked at first
        check_hub_model(tower, f"{file}: text_cfg.hf_model_name asks for {tower!r}")
    preprocess = {key: value for key, value in config.get("preprocess_cfg", {}).items() if key in _PREPROCESS}
    model, trained = filled_towers(model_cfg, preprocess, weights, f"local-dir:{folder}", str(file))
    if "tokenizer" in config:
        length, vocabulary = text_cfg.get("context_length", 77), text_cfg.get("vocab_size", CLIP_VOCABULARY)
        tokenizer = read_tokenizer(file, config["tokenizer"], length, vocabulary)
    else:
        tokenizer = load_tokenizer(f"local-dir:{folder}", text_cfg, of_hub or str(file), None if of_hub else folder)
    name = of_hub or str(config.get("name", folder.name))
    return DualEncoder(name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective or trained)


class OnnxEncoder(DualEncoder):
    """A ``DualEncoder`` whose towers are graphs on onnxruntime: it embeds and does not train."""

    def __init__(self, plain: PlainEncoder, objective: dict[str, Any]) -> None:
        images = _GraphTower(plain.image_graph, torch.float32, plain.preprocess_cfg)
        towers = Towers(images, _GraphTower(plain.text_graph, torch.int64), plain.logit_scale)
        config = EncoderConfig("onnx", plain.embed_dim, plain.context_length, plain.settings)
        super().__init__(plain.name, towers, plain.tokenizer, config, objective)

    def check_weights(self) -> None:
        raise InputError(f"{self.name}: an ONNX export embeds and does no more; give the model that it was made of")

    def _dtype(self) -> torch.dtype:
        return torch.float32


class _GraphTower(nn.Module):
    """A graph in the place of a tower: (n, 3, H, W) normalised pixels or (n, L) tokens to (n, D)."""

    def __init__(self, graph: Graph, dtype: torch.dtype, preprocess_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.graph, self.dtype, self.preprocess_cfg = graph, dtype, preprocess_cfg

    def forward(self, items: Tensor) -> Tensor:
        array = items.detach().to("cpu", self.dtype).contiguous().numpy()
        return torch.from_numpy(self.graph(array)).to(items.device)
