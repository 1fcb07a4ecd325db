"""rinnakk/japanese-clip's CLOOB: a BERT or RoBERTa and a ViT of Hugging Face's, under their names of 2022.

Positions are 0 … 76 in every row, whatever RoBERTa does by itself; the padding is masked; the first row after the last
norm is projected without a bias.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.tokenizer import NoTokenizer, RinnaTokenizer
from cloob.models.weights.containers import folder_weights
from cloob.models.weights.keymap import (
    CLIP_MEAN,
    CLIP_STD,
    Block,
    Blocks,
    Patches,
    Towers,
    fill,
    key_map,
    preprocess,
    without_memory,
)

FAMILY = "rinna"
CONTEXT_LENGTH = 77


class ImageTower(nn.Module):
    def __init__(self, config: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        width, size = config.get("hidden_size", 768), config.get("image_size", 224)
        eps = config.get("layer_norm_eps", 1e-12)
        self.preprocess_cfg = preprocess(size, CLIP_MEAN, CLIP_STD, "bilinear")
        self.patches = Patches(size, config.get("patch_size", 16), width, bias=True)
        self.blocks = _blocks(config, width, eps, norm_first=True)
        self.norm = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.proj(self.norm(self.blocks(self.patches(images))[:, 0]))
        return rows


class TextTower(nn.Module):
    def __init__(self, config: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        width = config.get("hidden_size", 768)
        eps = config.get("layer_norm_eps", 1e-12 if config.get("model_type") == "bert" else 1e-5)
        self.pad = config.get("pad_token_id", RinnaTokenizer.PAD)
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.position_embedding = nn.Embedding(config.get("max_position_embeddings", 512), width)
        self.type_embedding = nn.Embedding(config.get("type_vocab_size", 2), width)
        self.norm_embedding = nn.LayerNorm(width, eps)
        self.blocks = _blocks(config, width, eps, norm_first=False)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        text_tokens = (tokens != self.pad).flip(1).cumsum(1).flip(1) > 0  # all but the padding at a row's end
        x = self.token_embedding(tokens) + self.type_embedding.weight[0]
        x = self.norm_embedding(x + self.position_embedding.weight[: tokens.shape[1]])
        rows: Tensor = self.proj(self.blocks(x, keys=text_tokens)[:, 0])
        return rows


def _blocks(config: dict[str, Any], width: int, eps: float, *, norm_first: bool) -> Blocks:
    heads, hidden = config.get("num_attention_heads", 12), config.get("intermediate_size", 3072)
    layers = range(config.get("num_hidden_layers", 12))
    return Blocks(Block(width, heads, hidden, eps, norm_first=norm_first, gelu="exact") for _ in layers)


def load(folder: Path, config: dict[str, Any]) -> DualEncoder:
    weights, tensors = folder_weights(folder)
    encoder = build(folder.name, folder / "config.json", config)
    blocks = len(encoder.model.text.blocks), len(encoder.model.visual.blocks)
    fill(encoder.model, weights, tensors, key_map(FAMILY, *blocks))
    return encoder


def build(name: str, where: Path, config: dict[str, Any]) -> DualEncoder:
    """The encoder of a configuration, without weights; with the tokenizer in its folder where there is one."""
    text, image = config["text_config"], config["vision_config"]
    with without_memory(where, config):
        embed_dim, inv_tau = config["projection_dim"], config["init_inv_tau"]
        towers = Towers(ImageTower(image, embed_dim), TextTower(text, embed_dim), math.log(inv_tau))
    pieces = where.parent / RinnaTokenizer.FILE
    right = "spiece.model of rinna/japanese-roberta-base must lie here for texts; give tokens, or copy it"
    tokenizer = RinnaTokenizer(pieces, CONTEXT_LENGTH) if pieces.is_file() else NoTokenizer(f"{where.parent}: {right}")
    encoder_config = EncoderConfig("towers", embed_dim, CONTEXT_LENGTH, {"family": FAMILY, "config": config})
    objective = cloob_objective(inv_tau, config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, tokenizer, encoder_config, objective)
