"""rinnakk/japanese-clip: a BERT or RoBERTa and a ViT under Hugging Face's old names.

Positions are 0 … 76 in every row, the padding is masked, and the first row after the
last norm is projected without a bias.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from cloob.models.encoder import (
    DualEncoder,
    EncoderConfig,
    before_padding,
    cloob_objective,
)
from cloob.models.importing import read_json
from cloob.models.settings import JsonObject
from cloob.models.tokenizer import NoTokenizer, RinnaTokenizer, Tokenizer
from cloob.models.weights.blocks import Blocks, ImageTower
from cloob.models.weights.containers import folder_weights
from cloob.models.weights.keymap import (
    CLIP_MEAN,
    CLIP_STD,
    Towers,
    fill_towers,
    on_meta_device,
    pixel_settings,
)

_LENGTH = 77


class BertText(nn.Module):
    def __init__(self, config: JsonObject, embed_dim: int) -> None:
        super().__init__()
        width = config.get("hidden_size", 768)
        eps = config.get(
            "layer_norm_eps", 1e-12 if config.get("model_type") == "bert" else 1e-5
        )
        self.pad = config.get("pad_token_id", RinnaTokenizer.PAD)
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.position_embedding = nn.Embedding(
            config.get("max_position_embeddings", 512), width
        )
        self.type_embedding = nn.Embedding(config.get("type_vocab_size", 2), width)
        self.norm_embedding = nn.LayerNorm(width, eps)
        self.blocks = _blocks(config, width, eps, norm_first=False)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def text_tokens(self, tokens: Tensor) -> Tensor:
        return before_padding(tokens, self.pad)

    def states(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.type_embedding.weight[0]
        x = self.norm_embedding(x + self.position_embedding.weight[: tokens.shape[1]])
        states: Tensor = self.blocks(x, keys=self.text_tokens(tokens))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.proj(self.states(tokens)[:, 0])
        return rows


def _blocks(config: JsonObject, width: int, eps: float, *, norm_first: bool) -> Blocks:
    """Blocks by a tower's configuration, whose defaults are BERT's."""
    return Blocks(
        config.get("num_hidden_layers", 12),
        width,
        config.get("num_attention_heads", 12),
        config.get("intermediate_size", 3072),
        eps,
        norm_first=norm_first,
    )


def _image_tower(config: JsonObject, embed_dim: int) -> ImageTower:
    size = config.get("image_size", 224)
    pixels = pixel_settings(size, CLIP_MEAN, CLIP_STD, "bilinear")
    width = config.get("hidden_size", 768)
    eps = config.get("layer_norm_eps", 1e-12)
    blocks = _blocks(config, width, eps, norm_first=True)
    norm = nn.LayerNorm(width, eps)
    patch = config.get("patch_size", 16)
    return ImageTower(pixels, patch, blocks, width, embed_dim, norm)


def load(folder: Path) -> DualEncoder:
    """The encoder of a folder."""
    where = folder / "config.json"
    settings = {"family": "rinna", "config": read_json(where)}
    encoder = build(folder.name, where, settings)
    weights, tensors = folder_weights(folder)
    fill_towers(encoder.model, "rinna", weights, tensors)
    return encoder


def build(name: str, where: Path, settings: JsonObject) -> DualEncoder:
    """The encoder by the settings of a ``towers.json``, without weights; its tokenizer
    lies in the folder.
    """
    config = settings["config"]
    with on_meta_device(where, config):
        embed_dim = config["projection_dim"]
        inv_tau = config["init_inv_tau"]
        visual = _image_tower(config["vision_config"], embed_dim)
        text = BertText(config["text_config"], embed_dim)
        towers = Towers(visual, text, math.log(inv_tau))
    built = EncoderConfig("towers", embed_dim, _LENGTH, settings)
    objective = cloob_objective(inv_tau, config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, _tokenizer(where.parent), built, objective)


def _tokenizer(folder: Path) -> Tokenizer:
    pieces = folder / RinnaTokenizer.FILE
    if pieces.is_file():
        return RinnaTokenizer(pieces, _LENGTH)
    return NoTokenizer(
        f"{folder}: spiece.model of rinna/japanese-roberta-base must lie here for"
        " texts; give tokens, or copy it"
    )
