"""Heads on frozen encoders of pictures and texts as one ``DualEncoder``, and their
model folder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.aligned.encoders import (
    VERSION,
    FeatureMemory,
    ImageEncoder,
    LoadModel,
    TextEncoder,
    TowerText,
    open_image_encoder,
    open_text_encoder,
)
from cloob.models.encoder import DualEncoder, EncoderConfig, ModelFiles, weights_digest
from cloob.models.runs import ALIGNED_FILE, HEADS_FILE
from cloob.models.settings import JsonObject
from cloob.models.tokenizer import describe
from cloob.models.vectors import AnyHead, Heads, read_heads
from cloob.models.weights.keymap import Towers

_SIDES = ("image", "text")
_PROBE_TEXT, _PROBE_WIDTH = "A photo of 2 Dogs & a cat.", 64
_SAME = 0.01  # distance of unit features that machines' rounding stays below


class FrozenTowers(Towers):
    """Frozen encoders, and what is trained on them."""

    def __init__(
        self,
        visual: ImageEncoder,
        text: TextEncoder | TowerText,
        image_head: AnyHead,
        text_head: AnyHead,
    ) -> None:
        super().__init__(visual, text, math.log(1 / 0.07))
        self.image_head = image_head
        self.text_head = text_head

    def encode_image(self, images: Tensor) -> Tensor:
        rows: Tensor = self.image_head(super().encode_image(images))
        return rows

    def encode_text(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.text_head(super().encode_text(tokens))
        return rows


class AlignedEncoder(DualEncoder):
    """A ``DualEncoder`` with frozen encoders; ``names`` has ``image_encoder`` and
    ``text_encoder`` as they were typed.
    """

    # features that need not be computed again
    memories: tuple[FeatureMemory, FeatureMemory] | None = None

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder | TowerText,
        heads: Heads,
        names: dict[str, str],
        objective: dict[str, object] | None = None,
    ) -> None:
        self.names = names
        settings = {**names, "image_size": image.preprocess_cfg["size"]}
        width = heads[0].options["embed_dim"]
        config = EncoderConfig("aligned", width, text.context_length, settings)
        name = "+".join(Path(spec.rpartition(":")[2]).name for spec in names.values())
        towers = FrozenTowers(image, text, *heads)
        super().__init__(name, towers, text.tokenizer, config, objective)

    @property
    def heads(self) -> Heads:
        return self.model.image_head, self.model.text_head

    def with_heads(self, heads: Heads, objective: dict[str, object]) -> AlignedEncoder:
        """The same encoders with other heads."""
        towers = self.model
        return AlignedEncoder(towers.visual, towers.text, heads, self.names, objective)

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module.train``, but for the encoders: training mode would move the
        statistics of their norms.
        """
        super().train(mode)
        self.model.visual.eval()
        self.model.text.eval()
        return self

    def encoder_keys(self) -> tuple[str, str]:
        """Names of both encoders by what decides over their features; kinds of devices
        round differently.
        """
        visual = self.model.visual
        text = self.model.text
        kind = (VERSION, self.device.type)
        tokens = (self.context_length, text.settings, describe(text.tokenizer))
        image_key = weights_digest(visual, kind, repr(visual), self.preprocess_cfg)
        text_key = weights_digest(text, kind, repr(text), tokens)
        return image_key[:12], text_key[:12]

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """(n, F) features of uint8 pixels by the frozen encoder."""
        features: Tensor = self.model.visual(self._normalised(images.to(self.device)))
        return features.float()

    @torch.no_grad()
    def text_features(self, tokens: Tensor) -> Tensor:
        """(n, F) features of tokens by the frozen encoder."""
        features: Tensor = self.model.text(tokens.to(self.device))
        return features.float()

    def files(self, *_: object) -> ModelFiles:
        """Encoders go by name alone."""
        first, second = self.heads
        probe = {
            side: [round(number, 6) for number in row.tolist()]
            for side, row in _probe(self).items()
        }
        content = {
            **self.config.settings,
            "heads": {"image": first.options, "text": second.options},
            "probe": probe,
        }
        heads = nn.ModuleDict({"image": first, "text": second})
        return ModelFiles(ALIGNED_FILE, content, HEADS_FILE, heads.state_dict())

    def _image_features(self, images: Tensor) -> Tensor:
        if self.memories is None or images.dtype != torch.uint8:
            return super()._image_features(images)
        features = self.memories[0].features(images, self.image_features)
        return F.normalize(self.model.image_head(features.to(self.device)), dim=1)

    def _text_features(self, tokens: Tensor) -> Tensor:
        if self.memories is None:
            return super()._text_features(tokens)
        features = self.memories[1].features(tokens, self.text_features)
        return F.normalize(self.model.text_head(features.to(self.device)), dim=1)


def load_aligned(
    folder: Path,
    config: JsonObject,
    objective: dict[str, object],
    load_model: LoadModel,
) -> AlignedEncoder:
    """Opens frozen encoders and their trained heads; refuses encoders that give other
    features than in training.
    """
    names = {f"{side}_encoder": str(config[f"{side}_encoder"]) for side in _SIDES}
    image = open_image_encoder(names["image_encoder"], load_model, config["image_size"])
    text = open_text_encoder(names["text_encoder"], load_model)
    heads = read_heads(folder, config["heads"], _SIDES)
    encoder = AlignedEncoder(image, text, heads, names, objective)
    rows = _probe(encoder)
    for side in _SIDES:
        stored = torch.tensor(config["probe"][side])
        if not torch.linalg.vector_norm(rows[side] - stored) <= _SAME:
            raise InputError(
                f"{folder / ALIGNED_FILE}: its {side} head was trained on"
                f" {names[f'{side}_encoder']!r}, which gives other features now: its"
                " weights, tokenizer, pooling, layers or pixels changed"
            )
    return encoder


def _probe(encoder: AlignedEncoder) -> dict[str, Tensor]:
    """Unit features of one picture and one text: they tell other weights, another
    tokenizer, pooling, activation or pixels.
    """
    size = encoder.image_size
    numbers = torch.arange(3 * size * size) % 251
    picture = numbers.to(torch.uint8).view(1, 3, size, size)
    rows = {
        "image": encoder.image_features(picture),
        "text": encoder.text_features(encoder.tokenizer([_PROBE_TEXT])),
    }
    return {
        side: F.normalize(row[0, :_PROBE_WIDTH].cpu(), dim=0)
        for side, row in rows.items()
    }
