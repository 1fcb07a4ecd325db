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

from cloob.errors import InputError, printable
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.untrusted import read_json
from cloob.models.weights.blocks import MAX_LAYERS, Block, Blocks, Gelu, Patches, Towers, preprocess
from cloob.models.weights.containers import array, read_arrays
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import Part, fill, without_memory
from cloob.models.weights.scales import cloob_objective
from cloob.models.weights.tokens import clip_tokenizer

FAMILY = "crowsonkb"


class ImageTower(nn.Module):
    """Pixels to unit rows; the class row after the blocks, projected."""

    def __init__(self, config: Fields, d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        size, width = config.integer("image_size"), config.integer("d_model")
        normalize = config.inside("normalize")
        mean, std = normalize.channels("mean"), normalize.channels("std", positive=True)
        self.preprocess_cfg = preprocess(size, mean, std, "lanczos")
        self.patches = Patches(size, config.divisor("patch_size", of=size), width, bias=False)
        self.blocks = _blocks(config, width, gelu)
        self.proj = nn.Linear(width, d_embed)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        return F.normalize(self.proj(self.blocks(self.patches(images))[:, 0]), dim=-1)


class TextTower(nn.Module):
    """Tokens to unit rows; the start token's row after the blocks, projected."""

    def __init__(self, config: Fields, d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        vocabulary = config.integer("vocab_size")
        self.end = vocabulary - 1
        self.token_embedding = nn.Embedding(vocabulary, d_embed)
        self.position_embedding = nn.Parameter(torch.zeros(config.integer("text_size"), d_embed))
        self.blocks = _blocks(config, d_embed, gelu)
        self.proj = nn.Linear(d_embed, d_embed)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D)."""
        ends = tokens == self.end
        text_tokens = ends.cumsum(1) == ends.long()  # up to the first end token
        x = self.token_embedding(tokens) + self.position_embedding
        return F.normalize(self.proj(self.blocks(x, queries=text_tokens)[:, 0]), dim=-1)


def _blocks(config: Fields, width: int, gelu: Gelu) -> Blocks:
    heads, layers = config.divisor("n_heads", of=width), config.integer("n_layers", most=MAX_LAYERS)
    return Blocks(Block(width, heads, 4 * width, 1e-5, norm_first=True, gelu=gelu) for _ in range(layers))


def matches(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 to 5 does."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load(path: Path, config: dict[str, Any] | None, gelu: Gelu = "tanh") -> DualEncoder:
    """The encoder of a pickle; InputError where it or its configuration is not what that program writes.

    Without a configuration that a registry knows, the JSON file of its name or ``config.json`` beside it says it.
    """
    where = path if config is not None else _beside(path)
    config = config or read_json(where)
    tensors = _tensors(path, read_arrays(path))
    towers = build(where, config, gelu)
    fill(towers, path, tensors, _plan(towers))
    return encoder(path.stem, where, towers, config, gelu)


def build(where: Path, config: dict[str, Any], gelu: Gelu) -> Towers:
    """The towers of a configuration, on the meta device; InputError where a field is not as wanted."""
    fields = Fields(where, config)
    d_embed, inv_tau = fields.integer("d_embed"), fields.number("inv_tau")
    fields.number("scale_hopfield")
    image, text = fields.inside("image_encoder"), fields.inside("text_encoder")
    image.one_of("type", ("ViT",))
    image.one_of("input_channels", (3,), 3)
    text.one_of("type", ("transformer",))
    text.one_of("tokenizer", ("clip",))
    text.one_of("d_model", (d_embed,))
    with without_memory():
        return Towers(ImageTower(image, d_embed, gelu), TextTower(text, d_embed, gelu), math.log(inv_tau))


def encoder(name: str, where: Path, towers: Towers, config: dict[str, Any], gelu: Gelu) -> DualEncoder:
    """Filled towers as an encoder."""
    text = config["text_encoder"]
    specials = "<|startoftext|>", "<|endoftext|>"
    tokenizer = clip_tokenizer(where, text["vocab_size"], text["text_size"], specials, "kept")
    settings = {"family": FAMILY, "gelu": gelu, "config": config}
    encoder_config = EncoderConfig("towers", config["d_embed"], text["text_size"], settings)
    objective = cloob_objective(config["inv_tau"], config["scale_hopfield"], "unit")
    return DualEncoder(name, towers, tokenizer, encoder_config, objective)


def _beside(path: Path) -> Path:
    for candidate in (path.with_suffix(".json"), path.parent / "config.json"):
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path}: its configuration must lie beside it as {path.with_suffix('.json').name} or config.json "
        "(the weights do not hold it)"
    )


def _tensors(path: Path, value: Any) -> dict[str, Tensor]:
    """The arrays by ``module path/name``."""
    try:
        image, text = value["params"]
        arrays = {f"{module}/{name}": data for module, held in (image | text).items() for name, data in held.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: 'params' with the parameters of two towers is wanted, as crowsonkb's training writes"
        ) from None
    return {key: array(path, repr(printable(key)), data) for key, data in arrays.items()}


def _plan(towers: Towers) -> dict[str, Part]:
    """Where each weight of the towers comes from; the scale is no weight of the file."""
    plan = {
        "visual.patches.conv.weight": Part(("vi_t_image_encoder/embed/w",), (3, 2, 0, 1)),
        "visual.patches.class_embedding": Part(("vi_t_image_encoder/class_embed",)),
        "visual.patches.position_embedding": Part(("vi_t_image_encoder/pos_embed/w",)),
        "text.token_embedding.weight": Part(("text_encoder/embed/embeddings",)),
        "text.position_embedding": Part(("text_encoder/pos_embed/w",)),
    }
    linears, norms = {}, {}
    sides: Any = (("visual", "vi_t_image_encoder", towers.visual), ("text", "text_encoder", towers.text))
    for ours, theirs, tower in sides:
        linears[f"{ours}.proj"] = f"{theirs}/proj"
        for i in range(len(tower.blocks)):
            block, layer = f"{ours}.blocks.{i}", f"{theirs}/layer_{i}"
            for name, part in (("query", "query"), ("key", "key"), ("value", "value"), ("out", "linear")):
                linears[f"{block}.attention.{name}"] = f"{layer}/self_attention/multi_head_attention/{part}"
            linears[f"{block}.expand"] = f"{layer}/feed_forward/linear_0"
            linears[f"{block}.shrink"] = f"{layer}/feed_forward/linear_1"
            norms[f"{block}.norm_1"] = f"{layer}/self_attention/layer_norm"
            norms[f"{block}.norm_2"] = f"{layer}/feed_forward/layer_norm"
    for ours, theirs in linears.items():
        plan |= {f"{ours}.weight": Part((f"{theirs}/w",), (1, 0)), f"{ours}.bias": Part((f"{theirs}/b",))}
    for ours, theirs in norms.items():
        plan |= {f"{ours}.weight": Part((f"{theirs}/scale",)), f"{ours}.bias": Part((f"{theirs}/offset",))}
    return plan
