"""rinnakk/japanese-clip's CLOOB: a BERT or RoBERTa and a ViT of Hugging Face's, under their names of 2022.

Positions are 0 … 76 in every row, whatever RoBERTa does by itself; the padding is masked; the first row after the last
norm is projected without a bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.weights.blocks import Block, Blocks, Patches, Towers, preprocess
from cloob.models.weights.clip_towers import CLIP_MEAN, CLIP_STD, MAX_LAYERS
from cloob.models.weights.fields import Fields
from cloob.models.weights.folders import folder_weights
from cloob.models.weights.keymap import Part, fill
from cloob.models.weights.scales import cloob_objective
from cloob.models.weights.tokens import NoTokenizer, RinnaTokenizer

FAMILY = "rinna"
CONTEXT_LENGTH = 77
_MOST = 1 << 16
_IGNORED = frozenset({"text_model.embeddings.position_ids"})


class ImageTower(nn.Module):
    """Pixels to features: ViT, the class row after the final norm, projected."""

    def __init__(self, config: Fields, embed_dim: int) -> None:
        super().__init__()
        width, eps = config.integer("hidden_size", 768), config.number("layer_norm_eps", 1e-12)
        size, patch = config.integer("image_size", 224), config.integer("patch_size", 16)
        self.preprocess_cfg: dict[str, Any] = {}
        self.patches = Patches(size, patch, width, bias=True)
        self.blocks = _blocks(config, width, eps, norm_first=True)
        self.norm = nn.LayerNorm(width, eps)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        rows: Tensor = self.proj(self.norm(self.blocks(self.patches(images))[:, 0]))
        return rows


class TextTower(nn.Module):
    """Tokens to features: BERT's blocks, the first row, projected."""

    def __init__(self, config: Fields, embed_dim: int, eps: float) -> None:
        super().__init__()
        width = config.integer("hidden_size", 768)
        self.pad = config.integer("pad_token_id", RinnaTokenizer.PAD, least=0)
        self.token_embedding = nn.Embedding(config.integer("vocab_size"), width)
        self.position_embedding = nn.Embedding(config.integer("max_position_embeddings", 512), width)
        self.type_embedding = nn.Embedding(config.integer("type_vocab_size", 2), width)
        self.norm_embedding = nn.LayerNorm(width, eps)
        self.blocks = _blocks(config, width, eps, norm_first=False)
        self.proj = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D); the padding at a row's end has no part."""
        text_tokens = (tokens != self.pad).flip(1).cumsum(1).flip(1) > 0
        x = self.token_embedding(tokens) + self.type_embedding.weight[0]
        x = self.norm_embedding(x + self.position_embedding.weight[: tokens.shape[1]])
        rows: Tensor = self.proj(self.blocks(x, keys=text_tokens)[:, 0])
        return rows


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` is of this family."""
    return config.get("model_type") == "cloob"


def load(folder: Path, config: dict[str, Any]) -> DualEncoder:
    """The encoder of a folder; InputError where configuration or weights are not those of a published model."""
    where = folder / "config.json"
    weights, tensors = folder_weights(folder)
    towers = build(where, config, len(tensors))
    fill(towers, weights, tensors, _plan(towers), _IGNORED)
    return encoder(folder.name, folder, where, towers, config)


def build(where: Path, config: dict[str, Any], known: int) -> Towers:
    """The towers of a configuration, on the meta device.

    Args:
        where: The configuration's file.
        config: What it says.
        known: Number of tensors that there are: a configuration with more blocks than that is refused.

    Raises:
        InputError: A field is missing or out of its range, or asks for code or towers that no published model has.
    """
    fields = Fields(where, config)
    text, image = fields.inside("text_config"), fields.inside("vision_config")
    if text.values.get("model_type") == "cloob_text_model":
        raise InputError(f"{where}: text_config is a cloob_text_model, which has one embedding for all texts")
    kind = text.one_of("model_type", ("bert", "roberta"))
    image.one_of("model_type", ("vit",))
    for side in (text, image):
        side.one_of("hidden_act", ("gelu",), "gelu")
        width, heads = side.integer("hidden_size", 768, most=_MOST), side.integer("num_attention_heads", 12)
        if width % heads:
            raise side.wrong("num_attention_heads", f"a divisor of {width}")
        if side.integer("num_hidden_layers", 12, most=MAX_LAYERS) > known:
            raise side.wrong("num_hidden_layers", f"what the {known} tensors of the weights can be")
        side.integer("intermediate_size", 3072, most=_MOST)
    text.one_of("position_embedding_type", ("absolute",), "absolute")
    size, patch = image.integer("image_size", 224, most=_MOST), image.integer("patch_size", 16, most=_MOST)
    positions = text.integer("max_position_embeddings", 512, most=_MOST)
    if size % patch or positions < CONTEXT_LENGTH or image.values.get("qkv_bias", True) is not True:
        raise InputError(f"{where}: not the sizes of a published model")
    embed_dim = fields.integer("projection_dim", most=_MOST)
    inv_tau = fields.number("init_inv_tau")
    fields.number("scale_hopfield")
    eps = text.number("layer_norm_eps", 1e-12 if kind == "bert" else 1e-5)
    with torch.device("meta"):
        towers = Towers(ImageTower(image, embed_dim), TextTower(text, embed_dim, eps), math.log(inv_tau))
    towers.visual.preprocess_cfg = preprocess(size, CLIP_MEAN, CLIP_STD, "bilinear")  # type: ignore[assignment]
    return towers


def encoder(name: str, folder: Path, where: Path, towers: Towers, config: dict[str, Any]) -> DualEncoder:
    """Filled towers as an encoder, with the tokenizer in its folder where there is one."""
    inv_tau, beta = float(config["init_inv_tau"]), float(config["scale_hopfield"])
    pieces = folder / RinnaTokenizer.FILE
    tokenizer: Any = NoTokenizer(
        f"{folder}: spiece.model of rinna/japanese-roberta-base must lie here for texts; give tokens, or copy it"
    )
    if pieces.is_file():
        tokenizer = RinnaTokenizer(pieces, CONTEXT_LENGTH)
    settings = {"family": FAMILY, "config": config}
    encoder_config = EncoderConfig("towers", config["projection_dim"], CONTEXT_LENGTH, settings)
    return DualEncoder(name, towers, tokenizer, encoder_config, cloob_objective(inv_tau, beta, "unit"))


def _blocks(config: Fields, width: int, eps: float, *, norm_first: bool) -> Blocks:
    heads, hidden = config.integer("num_attention_heads", 12), config.integer("intermediate_size", 3072)
    layers = config.integer("num_hidden_layers", 12)
    return Blocks(Block(width, heads, hidden, eps, norm_first=norm_first, gelu="exact") for _ in range(layers))


def _plan(towers: Towers) -> dict[str, Part]:
    """Where each weight of the towers comes from."""
    vision, text = "vision_model", "text_model"
    pairs = {
        "text.token_embedding.weight": f"{text}.embeddings.word_embeddings.weight",
        "text.position_embedding.weight": f"{text}.embeddings.position_embeddings.weight",
        "text.type_embedding.weight": f"{text}.embeddings.token_type_embeddings.weight",
        "text.norm_embedding.weight": f"{text}.embeddings.LayerNorm.weight",
        "text.norm_embedding.bias": f"{text}.embeddings.LayerNorm.bias",
        "text.proj.weight": "text_projection.weight",
        "visual.patches.conv.weight": f"{vision}.embeddings.patch_embeddings.projection.weight",
        "visual.patches.conv.bias": f"{vision}.embeddings.patch_embeddings.projection.bias",
        "visual.norm.weight": f"{vision}.layernorm.weight",
        "visual.norm.bias": f"{vision}.layernorm.bias",
        "visual.proj.weight": "visual_projection.weight",
    }
    sides: Any = (("text", text, "self", _BERT, towers.text), ("visual", vision, "attention", _VIT, towers.visual))
    for prefix, theirs, inner, names, tower in sides:
        for i in range(len(tower.blocks)):
            layer = f"{theirs}.encoder.layer.{i}"
            shared = {f"attention.{part}": f"attention.{inner}.{part}" for part in ("query", "key", "value")}
            for ours, name in (shared | names).items():
                for kind in ("weight", "bias"):
                    pairs[f"{prefix}.blocks.{i}.{ours}.{kind}"] = f"{layer}.{name}.{kind}"
    plan = {ours: Part((theirs,)) for ours, theirs in pairs.items()}
    plan["visual.patches.class_embedding"] = Part((f"{vision}.embeddings.cls_token",), lead=2)
    plan["visual.patches.position_embedding"] = Part((f"{vision}.embeddings.position_embeddings",), lead=1)
    return plan


_SHARED = {
    "attention.out": "attention.output.dense",
    "expand": "intermediate.dense",
    "shrink": "output.dense",
}
_BERT = _SHARED | {"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"}
_VIT = _SHARED | {"norm_1": "layernorm_before", "norm_2": "layernorm_after"}
