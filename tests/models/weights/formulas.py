"""crowsonkb's and rinna's towers once more, in plain torch from the formulas and straight from a file's own names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention written out; ``allowed`` (n, L or 1, L or 1) is False where a logit is none."""
    n, length, width = query.shape
    query, key, value = (x.view(n, length, heads, width // heads).permute(0, 2, 1, 3) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) / (width // heads) ** 0.5
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None], -1e4)
    return (logits.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(n, length, width)


def crowsonkb_blocks(
    weights: Weights, tower: str, x: Tensor, heads: int, layers: int, allowed: Tensor | None
) -> Tensor:
    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ weights[f"{name}/w"] + weights[f"{name}/b"]

    def norm(name: str, rows: Tensor) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * weights[f"{name}/layer_norm/scale"] + weights[f"{name}/layer_norm/offset"]

    for i in range(layers):
        layer = f"{tower}/layer_{i}"
        rows = norm(f"{layer}/self_attention", x)
        part = f"{layer}/self_attention/multi_head_attention"
        query, key, value = (linear(f"{part}/{name}", rows) for name in ("query", "key", "value"))
        x = x + linear(f"{part}/linear", attend(query, key, value, heads, allowed))
        hidden = linear(f"{layer}/feed_forward/linear_0", norm(f"{layer}/feed_forward", x))
        gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
        x = x + linear(f"{layer}/feed_forward/linear_1", gelu)
    return F.normalize(linear(f"{tower}/proj", x[:, 0]), dim=-1)


def crowsonkb_image(weights: Weights, images: Tensor, heads: int, layers: int) -> Tensor:
    tower = "vi_t_image_encoder"
    kernel = weights[f"{tower}/embed/w"]  # height, width, in, out
    patches = F.conv2d(images, kernel.permute(3, 2, 0, 1), stride=kernel.shape[0]).flatten(2).transpose(1, 2)
    first = weights[f"{tower}/class_embed"].expand(len(images), 1, -1)
    x = torch.cat([first, patches], 1) + weights[f"{tower}/pos_embed/w"]
    return crowsonkb_blocks(weights, tower, x, heads, layers, None)


def crowsonkb_text(weights: Weights, tokens: Tensor, heads: int, layers: int) -> Tensor:
    tower = "text_encoder"
    table = weights[f"{tower}/embed/embeddings"]
    is_end = tokens == len(table) - 1
    before = is_end.cumsum(1) - is_end.long() == 0  # up to and with the first end token: the rows that see
    x = table[tokens] + weights[f"{tower}/pos_embed/w"]
    return crowsonkb_blocks(weights, tower, x, heads, layers, before[:, :, None].expand(-1, -1, tokens.shape[1]))


def rinna_blocks(weights: Weights, layer: str, inner: str, x: Tensor, heads: int, keys: Tensor | None) -> Tensor:
    """One block of Hugging Face's ViT (norm first) or BERT (norm last)."""

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ weights[f"{layer}.{name}.weight"].T + weights[f"{layer}.{name}.bias"]

    def norm(name: str, rows: Tensor, eps: float) -> Tensor:
        return F.layer_norm(
            rows, rows.shape[-1:], weights[f"{layer}.{name}.weight"], weights[f"{layer}.{name}.bias"], eps
        )

    vit = inner == "attention"
    rows = norm("layernorm_before", x, 1e-12) if vit else x
    query, key, value = (linear(f"attention.{inner}.{name}", rows) for name in ("query", "key", "value"))
    allowed = None if keys is None else keys[:, None, :].expand(-1, keys.shape[1], -1)
    x = x + linear("attention.output.dense", attend(query, key, value, heads, allowed))
    x = x if vit else norm("attention.output.LayerNorm", x, 1e-5)
    rows = norm("layernorm_after", x, 1e-12) if vit else x
    hidden = linear("intermediate.dense", rows)
    x = x + linear("output.dense", 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
    return x if vit else norm("output.LayerNorm", x, 1e-5)


def rinna_image(weights: Weights, images: Tensor, heads: int, layers: int) -> Tensor:
    embeddings = "vision_model.embeddings"
    kernel = weights[f"{embeddings}.patch_embeddings.projection.weight"]
    bias = weights[f"{embeddings}.patch_embeddings.projection.bias"]
    patches = F.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = weights[f"{embeddings}.cls_token"].expand(len(images), -1, -1)
    x = torch.cat([first, patches], 1) + weights[f"{embeddings}.position_embeddings"]
    for i in range(layers):
        x = rinna_blocks(weights, f"vision_model.encoder.layer.{i}", "attention", x, heads, None)
    norm = weights["vision_model.layernorm.weight"], weights["vision_model.layernorm.bias"]
    return F.layer_norm(x[:, 0], x.shape[-1:], *norm, 1e-12) @ weights["visual_projection.weight"].T


def rinna_text(weights: Weights, tokens: Tensor, heads: int, layers: int, pad: int) -> Tensor:
    embeddings = "text_model.embeddings"
    x = (
        weights[f"{embeddings}.word_embeddings.weight"][tokens]
        + weights[f"{embeddings}.token_type_embeddings.weight"][0]
    )
    x = x + weights[f"{embeddings}.position_embeddings.weight"][: tokens.shape[1]]
    norm = weights[f"{embeddings}.LayerNorm.weight"], weights[f"{embeddings}.LayerNorm.bias"]
    x = F.layer_norm(x, x.shape[-1:], *norm, 1e-5)
    for i in range(layers):
        x = rinna_blocks(weights, f"text_model.encoder.layer.{i}", "self", x, heads, tokens != pad)
    return x[:, 0] @ weights["text_projection.weight"].T
