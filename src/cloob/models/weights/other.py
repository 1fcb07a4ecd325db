"""Towers that open_clip does not have, by n items, L positions, width d and h heads.

- crowsonkb/cloob-training, pickles of haiku parameters: no norm before or after the
  blocks, a bias in the projection. The text mask lies on the query axis: positions
  after the end token attend to all alike, and the start token, whose row is the
  embedding, sees the padding. Trained with tanh GELU; the same repository's port to
  torch has the exact one.
- rinnakk/japanese-clip, a BERT or RoBERTa and a ViT under Hugging Face's names of 2022:
  positions are 0 … 76 in every row, the padding is masked, and the first row after the
  last norm is projected without a bias.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig, cloob_objective
from cloob.models.importing import read_json
from cloob.models.settings import Pixels
from cloob.models.tokenizer import (
    NoTokenizer,
    RinnaTokenizer,
    Tokenizer,
    clip_tokenizer,
)
from cloob.models.weights.containers import array, folder_weights, read_arrays
from cloob.models.weights.keymap import (
    CLIP_MEAN,
    CLIP_STD,
    Towers,
    fill,
    key_map,
    pixel_settings,
    without_memory,
)

Gelu = Literal["tanh", "exact"]
_RINNA_LENGTH = 77


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # an error where the heads do not divide it
        torch.empty(width, device="meta").view(heads, -1)
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Where ``queries`` (n, L) is False, a position attends to all alike; where
        ``keys`` is, none attends to it.
        """
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if queries is not None:
            query = query * queries[:, None, :, None]  # all logits 0: a uniform softmax
        mask = None if keys is None else keys[:, None, None, :]
        rows = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended: Tensor = self.out(rows.transpose(1, 2).reshape(n, length, width))
        return attended


class Block(nn.Module):
    """Attention and a feed-forward layer with residuals; norms before both as in ViT,
    else after as in BERT.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        eps: float,
        *,
        norm_first: bool,
        gelu: Gelu,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.attention = Attention(width, heads)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.expand, self.shrink = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        attended = x + self.attention(
            self.norm_1(x) if self.norm_first else x, queries, keys
        )
        x = attended if self.norm_first else self.norm_1(attended)
        hidden = self.expand(self.norm_2(x) if self.norm_first else x)
        out = x + self.shrink(F.gelu(hidden, approximate=self.approximate))
        rows: Tensor = out if self.norm_first else self.norm_2(out)
        return rows


class Blocks(nn.ModuleList):
    def forward(
        self, x: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        for block in self:
            x = block(x, queries, keys)
        return x


def make_blocks(
    config: dict[str, Any], width: int, eps: float, *, norm_first: bool, gelu: Gelu
) -> Blocks:
    """Blocks by a tower's configuration: crowsonkb's (``n_layers``), or Hugging Face's,
    whose defaults are BERT's.
    """
    if "n_layers" in config:
        layers, heads, hidden = config["n_layers"], config["n_heads"], 4 * width
    else:
        layers = config.get("num_hidden_layers", 12)
        heads = config.get("num_attention_heads", 12)
        hidden = config.get("intermediate_size", 3072)
    return Blocks(
        Block(width, heads, hidden, eps, norm_first=norm_first, gelu=gelu)
        for _ in range(layers)
    )


class Patches(nn.Module):
    def __init__(
        self, image_size: int, patch_size: int, width: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch_size, patch_size, bias=bias)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.position_embedding = nn.Parameter(
            torch.zeros(1 + (image_size // patch_size) ** 2, width)
        )

    def forward(self, images: Tensor) -> Tensor:
        rows = self.conv(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(rows.shape[0], 1, -1)
        return torch.cat([first, rows], 1) + self.position_embedding


class ImageTower(nn.Module):
    """A ViT: with a last norm and a bias of the patches, or with a bias of the
    projection and unit rows.
    """

    def __init__(
        self,
        pixels: Pixels,
        patch: int,
        blocks: Blocks,
        width: int,
        embed_dim: int,
        norm: nn.Module | None,
    ) -> None:
        super().__init__()
        self.preprocess_cfg = pixels
        self.patches = Patches(pixels["size"], patch, width, bias=norm is not None)
        self.blocks = blocks
        self.norm = norm or nn.Identity()
        self.proj = nn.Linear(width, embed_dim, bias=norm is None)

    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.proj(self.norm(self.blocks(self.patches(images))[:, 0]))
        return rows if self.proj.bias is None else F.normalize(rows, dim=-1)


class HaikuText(nn.Module):
    def __init__(self, config: dict[str, Any], width: int, gelu: Gelu) -> None:
        super().__init__()
        self.end = config["vocab_size"] - 1
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.position_embedding = nn.Parameter(torch.zeros(config["text_size"], width))
        self.blocks = make_blocks(config, width, 1e-5, norm_first=True, gelu=gelu)
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


class BertText(nn.Module):
    def __init__(self, config: dict[str, Any], embed_dim: int) -> None:
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
        self.blocks = make_blocks(config, width, eps, norm_first=False, gelu="exact")
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def text_tokens(self, tokens: Tensor) -> Tensor:
        """(n, L) bool, True for all but the padding at a row's end."""
        real: Tensor = (tokens != self.pad).flip(1).cumsum(1).flip(1) > 0
        return real

    def states(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.type_embedding.weight[0]
        x = self.norm_embedding(x + self.position_embedding.weight[: tokens.shape[1]])
        states: Tensor = self.blocks(x, keys=self.text_tokens(tokens))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.proj(self.states(tokens)[:, 0])
        return rows


def load_crowsonkb(
    path: Path, config: dict[str, Any] | None, gelu: Gelu
) -> DualEncoder:
    """The encoder of crowsonkb's pickle; its configuration is given or a JSON file next
    to it.
    """
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
    _fill(encoder, "crowsonkb", path, _haiku_tensors(path))
    return encoder


def _haiku_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a Haiku checkpoint, by module and name."""
    image, text = read_arrays(path)["params"]
    tensors = {}
    for module, parts in (image | text).items():
        for name, data in parts.items():
            tensors[f"{module}/{name}"] = array(data)
    return tensors


def load_rinna(folder: Path) -> DualEncoder:
    """The encoder of rinna's folder."""
    where = folder / "config.json"
    settings = {"family": "rinna", "config": read_json(where)}
    encoder = build(folder.name, where, settings)
    weights, tensors = folder_weights(folder)
    _fill(encoder, "rinna", weights, tensors)
    return encoder


def _fill(
    encoder: DualEncoder, family: str, weights: Path, tensors: dict[str, Tensor]
) -> None:
    towers = encoder.model
    plan = key_map(family, len(towers.text.blocks), len(towers.visual.blocks))
    fill(towers, weights, tensors, plan)


def build(name: str, where: Path, settings: dict[str, Any]) -> DualEncoder:
    """The encoder by the settings of a ``towers.json``, without weights; rinna's
    tokenizer lies in the folder.
    """
    config = settings["config"]
    with without_memory(where, config):
        if settings["family"] == "crowsonkb":
            text = config["text_encoder"]
            embed_dim = config["d_embed"]
            length = text["text_size"]
            inv_tau = config["inv_tau"]
            visual = _haiku_image(config["image_encoder"], embed_dim, settings["gelu"])
            words: nn.Module = HaikuText(text, embed_dim, settings["gelu"])
        else:
            text = config["text_config"]
            embed_dim = config["projection_dim"]
            length = _RINNA_LENGTH
            inv_tau = config["init_inv_tau"]
            visual = _rinna_image(config["vision_config"], embed_dim)
            words = BertText(text, embed_dim)
        towers = Towers(visual, words, math.log(inv_tau))
    if settings["family"] == "crowsonkb":
        specials = ("<|startoftext|>", "<|endoftext|>")
        vocabulary = text["vocab_size"]
        tokenizer = clip_tokenizer(where, vocabulary, length, specials, "kept")
    else:
        tokenizer = _rinna_tokenizer(where.parent)
    built = EncoderConfig("towers", embed_dim, length, settings)
    objective = cloob_objective(inv_tau, config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, tokenizer, built, objective)


def _haiku_image(config: dict[str, Any], embed_dim: int, gelu: Gelu) -> ImageTower:
    """The image tower of a Haiku checkpoint's configuration."""
    colours = config["normalize"]
    size = config["image_size"]
    pixels = pixel_settings(size, colours["mean"], colours["std"], "lanczos")
    width = config["d_model"]
    blocks = make_blocks(config, width, 1e-5, norm_first=True, gelu=gelu)
    return ImageTower(pixels, config["patch_size"], blocks, width, embed_dim, None)


def _rinna_image(config: dict[str, Any], embed_dim: int) -> ImageTower:
    """The image tower of a rinna configuration."""
    size = config.get("image_size", 224)
    pixels = pixel_settings(size, CLIP_MEAN, CLIP_STD, "bilinear")
    width = config.get("hidden_size", 768)
    eps = config.get("layer_norm_eps", 1e-12)
    patch = config.get("patch_size", 16)
    blocks = make_blocks(config, width, eps, norm_first=True, gelu="exact")
    norm = nn.LayerNorm(width, eps)
    return ImageTower(pixels, patch, blocks, width, embed_dim, norm)


def _rinna_tokenizer(folder: Path) -> Tokenizer:
    pieces = folder / RinnaTokenizer.FILE
    if pieces.is_file():
        return RinnaTokenizer(pieces, _RINNA_LENGTH)
    return NoTokenizer(
        f"{folder}: spiece.model of rinna/japanese-roberta-base must lie here for"
        " texts; give tokens, or copy it"
    )
