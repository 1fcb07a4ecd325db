"""Encoders and heads as one ``DualEncoder``, and the folder it is stored in: the heads, and the encoders' names.

``aligned.json`` names both encoders with a fingerprint of their weights and what they give for a picture and a text,
``heads.safetensors`` holds the heads.
open_clip does not read such a folder: its encoders may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.encoders import ImageEncoder, TextEncoder, TowerText
from cloob.models.aligned.heads import Head
from cloob.models.aligned.opening import LoadModel, open_image_encoder, open_text_encoder
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.names import local_place
from cloob.models.runs import ALIGNED_FILE, HEADS_FILE
from cloob.models.weights.containers import read_safetensors
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import fill, same_names

_FORMAT = 1
_SIDES = ("image", "text")
_PROBE_TEXT, _PROBE_WIDTH = "A photo of 2 Dogs & a cat.", 64
_SAME = 0.01
"""How far what an encoder gives may be from what it gave, relative to its length: machines round, pooling does not."""


class AlignedTowers(nn.Module):
    """What a ``DualEncoder`` asks of an open_clip module, made of two frozen encoders and two heads.

    Args:
        image: Pixels to features.
        text: Tokens to features.
        image_head: Features to the shared space.
        text_head: Likewise.
    """

    def __init__(self, image: ImageEncoder, text: TextEncoder | TowerText, image_head: Head, text_head: Head) -> None:
        super().__init__()
        self.visual = image
        self.text = text
        self.image_head = image_head
        self.text_head = text_head
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)), requires_grad=False)

    def encode_image(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        rows: Tensor = self.image_head(self.visual(images))
        return rows

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D)."""
        rows: Tensor = self.text_head(self.text(tokens))
        return rows


class AlignedEncoder(DualEncoder):
    """A ``DualEncoder`` whose encoders are frozen, so that training goes over their features.

    Attributes:
        on_features: Whether ``forward`` takes the features of both encoders in the place of pixels and tokens.
    """

    on_features = False

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As ``DualEncoder.forward``; of an encoder that is ``on_features`` as ``project``."""
        return self.project(images, tokens) if self.on_features else super().forward(images, tokens)

    def project(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """The heads alone: the (n, F) features of both encoders to (n, D) unit rows; differentiable."""
        towers: AlignedTowers = self.model
        return F.normalize(towers.image_head(image_features), dim=1), F.normalize(
            towers.text_head(text_features), dim=1
        )

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``, but for the encoders: training mode would move the statistics of their norms."""
        super().train(mode)
        self.model.visual.eval()
        self.model.text.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The encoders' features.

        Args:
            images: (n, 3, H, W) uint8 raw pixels.
            tokens: (n, L) int64.

        Returns:
            (n, F) float32 of the images and of the texts.
        """
        towers: AlignedTowers = self.model
        pixels = (images.to(self.device).float() / 255 - self._mean) / self._std
        image = towers.visual(pixels.contiguous(memory_format=torch.channels_last))
        return image.float(), towers.text(tokens.to(self.device)).float()

    def fit(self, images: Tensor, texts: Tensor) -> None:
        """Fits the heads' standardisation to the (N, F) features of the training set."""
        self.model.image_head.fit(images)
        self.model.text_head.fit(texts)


def aligned_encoder(
    image: ImageEncoder,
    text: TextEncoder | TowerText,
    image_head: Head,
    text_head: Head,
    names: dict[str, str],
    objective: dict[str, Any] | None = None,
) -> AlignedEncoder:
    """The whole as one encoder.

    Args:
        image: The image encoder.
        text: The text encoder.
        image_head: Its head.
        text_head: Its head.
        names: ``image_encoder`` and ``text_encoder`` as they were opened.
        objective: ``ContrastiveObjective.config()``, if the heads were trained.
    """
    settings = {"format": _FORMAT, **names, "image_size": image.preprocess_cfg["size"]}
    config = EncoderConfig("aligned", image_head.options["embed_dim"], text.context_length, settings)
    name = f"{_short(names['image_encoder'])}+{_short(names['text_encoder'])}"
    return AlignedEncoder(name, AlignedTowers(image, text, image_head, text_head), text.tokenizer, config, objective)


def aligned_files(encoder: DualEncoder) -> dict[str, bytes | dict[str, Tensor]]:
    """The files of a model folder by their names; ``save_model`` writes them."""
    towers: AlignedTowers = encoder.model
    heads = {"image": towers.image_head, "text": towers.text_head}
    content = {
        **encoder.config.settings,
        "image_fingerprint": fingerprint(towers.visual),
        "text_fingerprint": fingerprint(towers.text),
        "probe": {side: [round(value, 6) for value in row.tolist()] for side, row in _probe(encoder).items()},
        "heads": {side: head.options for side, head in heads.items()},
    }
    state = {f"{side}.{key}": value for side, head in heads.items() for key, value in head.state_dict().items()}
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    return {ALIGNED_FILE: json.dumps(content, indent=2).encode(), HEADS_FILE: tensors}


def load_aligned(
    folder: Path, config: dict[str, Any], objective: dict[str, Any], load_model: LoadModel
) -> AlignedEncoder:
    """Opens the encoders by their names and puts the stored heads on them.

    Args:
        folder: The model folder.
        config: What its ``aligned.json`` says.
        objective: What its ``objective.json`` says.
        load_model: Opens encoders that are towers of a model.

    Raises:
        InputError: An encoder is not there or is another one than the heads were trained on, or a file is damaged.
    """
    file = folder / ALIGNED_FILE
    fields = Fields(file, config)
    if config.get("format") != _FORMAT:
        raise InputError(f"{file}: has format {config.get('format')!r}; this version reads format {_FORMAT}")
    names = {key: _text(fields, key) for key in ("image_encoder", "text_encoder")}
    known = {side: _text(fields, f"{side}_fingerprint") for side in _SIDES}
    with torch.device("meta"):  # no memory for a stranger's sizes before the file of weights has them
        heads = {side: _head(fields.inside("heads").inside(side)) for side in known}
    size = fields.integer("image_size")
    try:
        key = "image_encoder"
        image = open_image_encoder(names[key], load_model, size)
        key = "text_encoder"
        text = open_text_encoder(names[key], load_model)
    except InputError as error:
        raise InputError(f"{file}: {key} cannot be opened; {error}") from error
    except RecursionError:
        raise InputError(f"{file}: {key} is {names[key]!r}, which leads back to this folder") from None
    for side, opened in (("image", image), ("text", text)):
        if fingerprint(opened) != known[side] or opened.features != heads[side].options["features"]:
            raise InputError(
                f"{file}: its heads were trained on another {side} encoder than {names[f'{side}_encoder']!r} is now"
            )
    _fill(heads, folder / HEADS_FILE)
    encoder = aligned_encoder(image, text, heads["image"], heads["text"], names, objective)
    if "probe" in config:  # written since 2026
        _check_probe(encoder, fields.inside("probe"))
    return encoder


def _probe(encoder: DualEncoder) -> dict[str, Tensor]:
    """The first of the features of a picture and a text that are always the same; of unit length.

    They tell what a fingerprint of weights does not: another tokenizer, pooling, activation or normalisation of pixels.
    """
    assert isinstance(encoder, AlignedEncoder)
    size = encoder.image_size
    picture = (torch.arange(3 * size * size) % 251).to(torch.uint8).view(1, 3, size, size)
    rows = encoder.features(picture, encoder.tokenizer([_PROBE_TEXT]))
    return {side: F.normalize(row[0, :_PROBE_WIDTH].cpu(), dim=0) for side, row in zip(_SIDES, rows, strict=True)}


def _check_probe(encoder: AlignedEncoder, given: Fields) -> None:
    """Raises InputError where an encoder with the right weights gives other features than the heads were trained on."""
    for side, row in _probe(encoder).items():
        values = given.values.get(side)
        if not isinstance(values, list) or not all(type(value) is float for value in values) or len(values) != len(row):
            raise given.wrong(side, f"{len(row)} numbers")
        if not torch.linalg.vector_norm(row - torch.tensor(values)) <= _SAME:
            name = encoder.config.settings[f"{side}_encoder"]
            raise InputError(
                f"{given.path}: {name!r} has the weights that the {side} head was trained on, but gives other features "
                "(its tokenizer, pooling, layers or normalisation of pixels were changed)"
            )


def _text(fields: Fields, key: str) -> str:
    value = fields.values.get(key)
    if not isinstance(value, str):
        raise fields.wrong(key, "a string")
    return value


def _head(options: Fields) -> Head:
    """A head as the configuration says, with each of its sizes looked at."""
    dropout = options.number("dropout", positive=False)
    if not 0 <= dropout < 1:
        raise options.wrong("dropout", "a number from 0 to below 1")
    kind = options.one_of("kind", ("linear", "mlp"))
    return Head(options.integer("features"), options.integer("embed_dim"), kind, dropout)


def _fill(heads: Mapping[str, Head], weights: Path) -> None:
    """Gives both heads, built on the meta device, their weights."""
    if not weights.is_file():
        raise InputError(f"{weights.parent}: no {weights.name} beside {ALIGNED_FILE}")
    both = nn.ModuleDict(heads)
    fill(both, weights, read_safetensors(weights), same_names(both))
    for side, head in heads.items():
        if not head.scale > 0:
            raise InputError(f"{weights}: {side}.scale is {float(head.scale):g}, and features are divided by it")


def encoders_here(settings: Mapping[str, Any]) -> list[str]:
    """The names of frozen encoders that lie on this machine.

    Args:
        settings: What ``aligned.json`` says.
    """
    names = [str(settings[key]) for key in ("image_encoder", "text_encoder") if settings.get(key)]
    return [name for name in names if "local-dir:" in name or local_place(name)]


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights and buffers: the same weights give the same 16 digits everywhere."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(spec: str) -> str:
    """The last word of an encoder's name."""
    return spec.rpartition(":")[2].rstrip("/").rpartition("/")[2] or spec
