"""crowsonkb/cloob-training's pickles of haiku parameters.

There is no norm before or after the blocks, and a bias in the projection. The text mask
lies on the query axis: positions after the end token attend to all alike, and the start
token, whose row is the embedding, sees the padding. Trained with tanh GELU; the same
repository's port to torch has the exact one.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.importing import read_json
from cloob.models.settings import JsonObject
from cloob.models.tokenizer import OPENAI_SPECIALS, clip_tokenizer
from cloob.models.weights.blocks import Blocks, Gelu, ImageTower
from cloob.models.weights.containers import array, read_arrays
from cloob.models.weights.keymap import (
    Towers,
    fill_towers,
    on_meta_device,
    pixel_settings,
)

_EPS = 1e-5


class HaikuText(nn.Module):
    def __init__(self, config: JsonObject, width: int, gelu: Gelu) -> None:
        super().__init__()
        self.end = config["vocab_size"] - 1
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.position_embedding = nn.Parameter(torch.zeros(config["text_size"], width))
        self.blocks = _blocks(config, width, gelu)
        self.proj = nn.Linear(width, width)

    def text_tokens(self, tokens: Tensor) -> Tensor:
        """(n, L) bool, True up to the first end token."""
        ends = tokens == self.end
        before: Tensor = ends.cumsum(1) == ends.long()
        return before

    def states(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding
        states: Tensor = self.blocks(x, queries=self.text_tokens(tokens))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.proj(self.states(tokens)[:, 0]), dim=-1)


def _blocks(config: JsonObject, width: int, gelu: Gelu) -> Blocks:
    """Blocks by a tower's configuration."""
    layers, heads = config["n_layers"], config["n_heads"]
    return Blocks(layers, width, heads, 4 * width, _EPS, gelu=gelu)


def _image_tower(config: JsonObject, embed_dim: int, gelu: Gelu) -> ImageTower:
    colours = config["normalize"]
    size = config["image_size"]
    pixels = pixel_settings(size, colours["mean"], colours["std"], "lanczos")
    width = config["d_model"]
    blocks = _blocks(config, width, gelu)
    return ImageTower(pixels, config["patch_size"], blocks, width, embed_dim, None)


def load(path: Path, config: JsonObject | None, gelu: Gelu) -> DualEncoder:
    """The encoder of a pickle; its configuration is given or a JSON file next to it."""
    where = path
    if config is None:
        beside = path.with_suffix(".json")
        where = beside if beside.is_file() else path.with_name("config.json")
        if not where.is_file():
            raise InputError(
                f"{path}: its configuration must lie next to it as {beside.name} or"
                " config.json (the weights do not hold it)"
            )
        config = read_json(where)
    settings = {"family": "crowsonkb", "gelu": gelu, "config": config}
    encoder = build(path.stem, where, settings)
    # Nothing else may hold the memory of the arrays.
    fill_towers(encoder.model, "crowsonkb", path, _tensors(path))
    return encoder


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by module and name."""
    image, text = read_arrays(path)["params"]
    tensors = {}
    for module, parts in (image | text).items():
        for name, data in parts.items():
            tensors[f"{module}/{name}"] = array(data)
    return tensors


def build(name: str, where: Path, settings: JsonObject) -> DualEncoder:
    """The encoder by the settings of a ``towers.json``, without weights."""
    config = settings["config"]
    gelu = settings["gelu"]
    with on_meta_device(where, config):
        text_config = config["text_encoder"]
        embed_dim = config["d_embed"]
        visual = _image_tower(config["image_encoder"], embed_dim, gelu)
        text = HaikuText(text_config, embed_dim, gelu)
        towers = Towers(visual, text, math.log(config["inv_tau"]))
        length = text_config["text_size"]
        vocabulary = text_config["vocab_size"]
    tokenizer = clip_tokenizer(where, vocabulary, length, OPENAI_SPECIALS, "kept")
    built = EncoderConfig("towers", embed_dim, length, settings)
    objective = cloob_objective(config["inv_tau"], config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, tokenizer, built, objective)
