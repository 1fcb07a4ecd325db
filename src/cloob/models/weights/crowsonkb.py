"""crowsonkb/cloob-training: pickles of haiku parameters, and the towers that they belong to.

No norm stands before or after the blocks, the projection has a bias, and the text tower's mask lies on the query axis:
positions after the end token attend to all alike, and the start token, whose row is the embedding, sees the padding.
The model was trained with the tanh form of GELU; the same repository's port to torch has the exact one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.tokenizer import clip_tokenizer
from cloob.models.untrusted import read_json
from cloob.models.weights.containers import array, read_arrays
from cloob.models.weights.keymap import Block, Blocks, Gelu, Patches, Towers, fill, key_map, preprocess, without_memory

FAMILY = "crowsonkb"


class ImageTower(nn.Module):
    def __init__(self, config: dict[str, Any], d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        size, width, normalize = config["image_size"], config["d_model"], config["normalize"]
        self.preprocess_cfg = preprocess(size, normalize["mean"], normalize["std"], "lanczos")
        self.patches = Patches(size, config["patch_size"], width, bias=False)
        self.blocks = _blocks(config, width, gelu)
        self.proj = nn.Linear(width, d_embed)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.proj(self.blocks(self.patches(images))[:, 0]), dim=-1)


class TextTower(nn.Module):
    def __init__(self, config: dict[str, Any], d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        self.end = config["vocab_size"] - 1
        self.token_embedding = nn.Embedding(config["vocab_size"], d_embed)
        self.position_embedding = nn.Parameter(torch.zeros(config["text_size"], d_embed))
        self.blocks = _blocks(config, d_embed, gelu)
        self.proj = nn.Linear(d_embed, d_embed)

    def forward(self, tokens: Tensor) -> Tensor:
        ends = tokens == self.end
        text_tokens = ends.cumsum(1) == ends.long()  # up to the first end token
        x = self.token_embedding(tokens) + self.position_embedding
        return F.normalize(self.proj(self.blocks(x, queries=text_tokens)[:, 0]), dim=-1)


def _blocks(config: dict[str, Any], width: int, gelu: Gelu) -> Blocks:
    heads, hidden = config["n_heads"], 4 * width
    return Blocks(Block(width, heads, hidden, 1e-5, norm_first=True, gelu=gelu) for _ in range(config["n_layers"]))


def load(path: Path, config: dict[str, Any] | None, gelu: Gelu) -> DualEncoder:
    """The encoder of a pickle; its configuration may be a JSON file next to it."""
    configs = [file for file in (path.with_suffix(".json"), path.parent / "config.json") if file.is_file()]
    if config is None and not configs:
        right = f"must lie beside it as {path.with_suffix('.json').name} or config.json (the weights do not hold it)"
        raise InputError(f"{path}: its configuration {right}")
    encoder = build(path.stem, path if config else configs[0], config or read_json(configs[0]), gelu)
    blocks = len(encoder.model.text.blocks), len(encoder.model.visual.blocks)
    fill(encoder.model, path, _tensors(path), key_map(FAMILY, *blocks))
    return encoder


def _tensors(path: Path) -> dict[str, Tensor]:
    """The arrays by ``module path/name``, of which nothing else holds the memory."""
    image, text = read_arrays(path)["params"]
    return {f"{module}/{name}": array(data) for module, part in (image | text).items() for name, data in part.items()}


def build(name: str, where: Path, config: dict[str, Any], gelu: Gelu) -> DualEncoder:
    with without_memory(where, config):
        image, text, d_embed = config["image_encoder"], config["text_encoder"], config["d_embed"]
        towers = Towers(ImageTower(image, d_embed, gelu), TextTower(text, d_embed, gelu), math.log(config["inv_tau"]))
    specials = "<|startoftext|>", "<|endoftext|>"
    tokenizer = clip_tokenizer(where, text["vocab_size"], text["text_size"], specials, "kept")
    settings = {"family": FAMILY, "gelu": gelu, "config": config}
    encoder_config = EncoderConfig("towers", d_embed, text["text_size"], settings)
    objective = cloob_objective(config["inv_tau"], config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, tokenizer, encoder_config, objective)
