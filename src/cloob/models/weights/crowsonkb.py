"""crowsonkb/cloob-training: pickles of haiku parameters, and the towers that they belong to.

No norm stands before or after the blocks, the projection has a bias, and the text tower's mask lies on the query axis:
positions behind the end token attend to all alike, and the start token, whose row is the embedding, sees the padding.
The model was trained with the tanh form of GELU; the same repository's port to torch has the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError, printable
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.untrusted import read_json
from cloob.models.weights.blocks import Block, Blocks, Gelu, Patches, Towers, preprocess
from cloob.models.weights.clip_towers import MAX_LAYERS
from cloob.models.weights.containers import array, read_arrays
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import Part, fill
from cloob.models.weights.scales import cloob_objective
from cloob.models.weights.tokens import clip_tokenizer

FAMILY = "crowsonkb"
_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_IMAGE, _TEXT = "vi_t_image_encoder", "text_encoder"
_EPS = 1e-5
_MOST = 1 << 16


class ImageTower(nn.Module):
    """Pixels to unit rows; the class row after the blocks, projected."""

    def __init__(self, config: Fields, d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        size, patch, width = config.integer("image_size"), config.integer("patch_size"), config.integer("d_model")
        self.preprocess_cfg: dict[str, Any] = {}
        self.patches = Patches(size, patch, width, bias=False)
        self.blocks = _blocks(config, width, gelu)
        self.proj = nn.Linear(width, d_embed)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) normalised pixels to (n, D)."""
        return F.normalize(self.proj(self.blocks(self.patches(images))[:, 0]), dim=-1)


class TextTower(nn.Module):
    """Tokens to unit rows; the start token's row after the blocks, projected."""

    def __init__(self, config: Fields, d_embed: int, gelu: Gelu) -> None:
        super().__init__()
        vocabulary, length = config.integer("vocab_size"), config.integer("text_size")
        self.end = vocabulary - 1
        self.token_embedding = nn.Embedding(vocabulary, d_embed)
        self.position_embedding = nn.Parameter(torch.zeros(length, d_embed))
        self.blocks = _blocks(config, d_embed, gelu)
        self.proj = nn.Linear(d_embed, d_embed)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, L) tokens to (n, D)."""
        ends = tokens == self.end
        text_tokens = ends.cumsum(1) == ends.long()  # up to the first end token
        x = self.token_embedding(tokens) + self.position_embedding
        return F.normalize(self.proj(self.blocks(x, queries=text_tokens)[:, 0]), dim=-1)


def matches(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 4 or 5 does."""
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def load(path: Path, config: dict[str, Any] | None, gelu: Gelu = "tanh") -> DualEncoder:
    """The encoder.

    Args:
        path: The pickle.
        config: Its configuration, where a registry knows it; None: the JSON file of its name or ``config.json``
            beside it.
        gelu: ``"exact"`` computes as the port to torch does.

    Raises:
        InputError: The file or its configuration is not what that program writes.
    """
    value = read_arrays(path)
    where = path
    if config is None:
        where = _beside(path)
        config = read_json(where)
    tensors = _tensors(path, value)
    towers = build(where, config, gelu, len(tensors))
    fill(towers, path, tensors, _plan(towers))
    return encoder(path.stem, where, towers, config, gelu)


def build(where: Path, config: dict[str, Any], gelu: Gelu, known: int) -> Towers:
    """The towers of a configuration, on the meta device.

    Args:
        where: The configuration's file.
        config: What it says.
        gelu: Which GELU.
        known: Number of tensors that there are: a configuration with more blocks than that is refused.

    Raises:
        InputError: A field is missing or out of its range.
    """
    fields = Fields(where, config)
    d_embed = fields.integer("d_embed", most=_MOST)
    image, text = fields.inside("image_encoder"), fields.inside("text_encoder")
    image.one_of("type", ("ViT",))
    text.one_of("type", ("transformer",))
    text.one_of("tokenizer", ("clip",))
    if text.integer("d_model", most=_MOST) != d_embed:
        raise text.wrong("d_model", f"d_embed ({d_embed})")
    size, patch = image.integer("image_size", most=_MOST), image.integer("patch_size", most=_MOST)
    if image.integer("input_channels", 3) != 3 or size % patch:
        raise InputError(f"{where}: pictures of {size} pixels in patches of {patch} with three channels are wanted")
    normalize = image.inside("normalize")
    mean, std = normalize.channels("mean"), normalize.channels("std", positive=True)
    inv_tau = fields.number("inv_tau")
    fields.number("scale_hopfield")
    for side, width in ((image, image.integer("d_model", most=_MOST)), (text, d_embed)):
        heads, layers = side.integer("n_heads"), side.integer("n_layers", most=MAX_LAYERS)
        if width % heads:
            raise side.wrong("n_heads", f"a divisor of {width}")
        if layers > known:
            raise side.wrong("n_layers", f"what the {known} tensors of the weights can be")
    with torch.device("meta"):
        towers = Towers(ImageTower(image, d_embed, gelu), TextTower(text, d_embed, gelu), math.log(inv_tau))
    towers.visual.preprocess_cfg = preprocess(size, mean, std, "lanczos")  # type: ignore[assignment]
    return towers


def encoder(name: str, where: Path, towers: Towers, config: dict[str, Any], gelu: Gelu) -> DualEncoder:
    """Filled towers as an encoder."""
    text = config["text_encoder"]
    inv_tau, beta = float(config["inv_tau"]), float(config["scale_hopfield"])
    tokenizer = clip_tokenizer(where, text["vocab_size"], text["text_size"], _SPECIALS, "kept")
    settings = {"family": FAMILY, "gelu": gelu, "config": config}
    encoder_config = EncoderConfig("towers", config["d_embed"], text["text_size"], settings)
    return DualEncoder(name, towers, tokenizer, encoder_config, cloob_objective(inv_tau, beta, "unit"))


def _beside(path: Path) -> Path:
    for candidate in (path.with_suffix(".json"), path.parent / "config.json"):
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path}: its configuration must lie beside it as {path.with_suffix('.json').name} or config.json "
        "(the weights do not hold it)"
    )


def _tensors(path: Path, value: Any) -> dict[str, Tensor]:
    """The arrays by ``module path/name``; each array belongs to one name."""
    params = value.get("params") if isinstance(value, dict) else None
    if not isinstance(params, tuple) or len(params) != 2:
        raise InputError(
            f"{path}: 'params' with the parameters of two towers is wanted, as crowsonkb's training writes"
        )
    tensors: dict[str, Tensor] = {}
    for tower in params:
        if not isinstance(tower, dict):
            raise InputError(f"{path}: a tower's parameters are no dictionary")
        for module, arrays in tower.items():
            if not isinstance(module, str) or not isinstance(arrays, dict):
                raise InputError(f"{path}: {printable(str(module)[:80])!r} holds no parameters")
            for name in list(arrays):
                key = f"{module}/{name}"
                tensors[key] = array(path, repr(printable(key)), arrays.pop(name))
    return tensors


def _blocks(config: Fields, width: int, gelu: Gelu) -> Blocks:
    heads, layers = config.integer("n_heads"), config.integer("n_layers")
    return Blocks(Block(width, heads, 4 * width, _EPS, norm_first=True, gelu=gelu) for _ in range(layers))


def _plan(towers: Towers) -> dict[str, Part]:
    """Where each weight of the towers comes from; the scale is no weight of the file."""
    image: Any = towers.visual
    text: Any = towers.text
    plan = {
        "visual.patches.conv.weight": Part((f"{_IMAGE}/embed/w",), (3, 2, 0, 1)),
        "visual.patches.class_embedding": Part((f"{_IMAGE}/class_embed",)),
        "visual.patches.position_embedding": Part((f"{_IMAGE}/pos_embed/w",)),
        "text.token_embedding.weight": Part((f"{_TEXT}/embed/embeddings",)),
        "text.position_embedding": Part((f"{_TEXT}/pos_embed/w",)),
    }
    for prefix, tower, blocks in (("visual", _IMAGE, image.blocks), ("text", _TEXT, text.blocks)):
        plan |= _linear(f"{prefix}.proj", f"{tower}/proj")
        for i in range(len(blocks)):
            plan |= dict(_block(f"{prefix}.blocks.{i}", f"{tower}/layer_{i}"))
    return plan


def _block(prefix: str, layer: str) -> Iterator[tuple[str, Part]]:
    attention, feed = f"{layer}/self_attention", f"{layer}/feed_forward"
    for ours, theirs in (("query", "query"), ("key", "key"), ("value", "value"), ("out", "linear")):
        yield from _linear(f"{prefix}.attention.{ours}", f"{attention}/multi_head_attention/{theirs}").items()
    yield from _linear(f"{prefix}.expand", f"{feed}/linear_0").items()
    yield from _linear(f"{prefix}.shrink", f"{feed}/linear_1").items()
    for ours, theirs in (("norm_1", attention), ("norm_2", feed)):
        yield f"{prefix}.{ours}.weight", Part((f"{theirs}/layer_norm/scale",))
        yield f"{prefix}.{ours}.bias", Part((f"{theirs}/layer_norm/offset",))


def _linear(prefix: str, theirs: str) -> dict[str, Part]:
    return {f"{prefix}.weight": Part((f"{theirs}/w",), (1, 0)), f"{prefix}.bias": Part((f"{theirs}/b",))}
