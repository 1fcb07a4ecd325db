"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import OBJECTIVE_FILE
from cloob.models.untrusted import read_json
from cloob.models.weights.clip_towers import CLIP_MEAN, CLIP_STD, MAX_LAYERS, build, filled
from cloob.models.weights.folders import folder_weights
from cloob.models.weights.formats.fields import Fields
from cloob.models.weights.keymap import Part
from cloob.models.weights.scales import clip_objective, scale_of
from cloob.models.weights.tokens import hub_tokenizer

_MOST = 1 << 16
_IGNORED = frozenset({"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"})
_TEXT = {"width": 512, "hidden": 2048, "layers": 12, "heads": 8}
_IMAGE = {"width": 768, "hidden": 3072, "layers": 12, "heads": 12}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` is of this family."""
    return config.get("model_type") == "clip"


def load(folder: Path, config: dict[str, Any]) -> DualEncoder:
    """The encoder of a folder; InputError where it is no ``CLIPModel`` that open_clip has towers for."""
    where = folder / "config.json"
    weights, tensors = folder_weights(folder)
    fields = Fields(where, config)
    model_cfg = _model_cfg(fields, len(tensors))
    text = model_cfg["text_cfg"]
    model = build(model_cfg, _preprocess(folder, model_cfg["vision_cfg"]["image_size"]), str(where))
    plan = key_map(model_cfg["text_cfg"]["layers"], model_cfg["vision_cfg"]["layers"])
    model = filled(model, weights, tensors, plan, _IGNORED)
    end = _end(fields, text["vocab_size"])
    pad = fields.inside("text_config").integer("pad_token_id", end, least=0, most=text["vocab_size"] - 1)
    tokenizer = hub_tokenizer(folder, text["context_length"], pad, end)
    objective = clip_objective(scale_of(weights, "logit_scale", model.logit_scale))
    if (folder / OBJECTIVE_FILE).is_file():  # of `cloob export`
        objective = dict(read_json(folder / OBJECTIVE_FILE)) or objective
    return DualEncoder(folder.name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def _end(fields: Fields, vocabulary: int) -> int:
    """The end token; open_clip takes the row of the highest token, so it has to be that."""
    text = fields.inside("text_config")
    end = text.integer("eos_token_id", 49407, least=0, most=vocabulary - 1)
    if end not in (2, vocabulary - 1):
        raise text.wrong("eos_token_id", f"the last word of the vocabulary ({vocabulary - 1})")
    return vocabulary - 1


def _model_cfg(fields: Fields, known: int) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a CLIPConfig."""
    text, image = fields.inside("text_config"), fields.inside("vision_config")
    text_tower, image_tower = _tower(text, _TEXT, known), _tower(image, _IMAGE, known)
    activations = {side.one_of("hidden_act", ("gelu", "quick_gelu"), "quick_gelu") for side in (text, image)}
    if len(activations) != 1:
        raise fields.wrong("vision_config", "towers with the same hidden_act")
    size, patch = image.integer("image_size", 224, most=_MOST), image.integer("patch_size", 32, most=_MOST)
    if size % patch or image.integer("num_channels", 3) != 3:
        raise image.wrong("image_size", f"a multiple of patch_size ({patch})")
    vocabulary = text.integer("vocab_size", 49408)
    return {
        "embed_dim": fields.integer("projection_dim", 512, most=_MOST),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            "image_size": size,
            "layers": image_tower["layers"],
            "width": image_tower["width"],
            "head_width": image_tower["width"] // image_tower["heads"],
            "patch_size": patch,
            "mlp_ratio": image_tower["hidden"] / image_tower["width"],
        },
        "text_cfg": {
            "context_length": text.integer("max_position_embeddings", 77, most=_MOST),
            "vocab_size": vocabulary,
            "width": text_tower["width"],
            "heads": text_tower["heads"],
            "layers": text_tower["layers"],
            "mlp_ratio": text_tower["hidden"] / text_tower["width"],
            "hf_tokenizer_name": "local",
        },
    }


def _tower(side: Fields, defaults: Mapping[str, int], known: int) -> dict[str, int]:
    tower = {
        "width": side.integer("hidden_size", defaults["width"], most=_MOST),
        "hidden": side.integer("intermediate_size", defaults["hidden"], most=_MOST),
        "layers": side.integer("num_hidden_layers", defaults["layers"], most=MAX_LAYERS),
        "heads": side.integer("num_attention_heads", defaults["heads"]),
    }
    if tower["width"] % tower["heads"]:
        raise side.wrong("num_attention_heads", f"a divisor of {tower['width']}")
    if tower["layers"] > known:
        raise side.wrong("num_hidden_layers", f"what the {known} tensors of the weights can be")
    if side.number("layer_norm_eps", 1e-5) != 1e-5:
        raise side.wrong("layer_norm_eps", "1e-05")
    return tower


def _preprocess(folder: Path, size: int) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says of pixels; CLIP's own without it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    fields = Fields(path, read_json(path))
    crop = fields.values.get("crop_size", {"height": size, "width": size})
    if crop not in (size, {"height": size, "width": size}) or fields.integer("resample", 3, least=0) not in (2, 3):
        raise InputError(f"{path}: pictures of {size} pixels, bicubic or bilinear, are wanted")
    return {
        "mean": fields.channels("image_mean", list(CLIP_MEAN)),
        "std": fields.channels("image_std", list(CLIP_STD), positive=True),
        "interpolation": "bicubic" if fields.values.get("resample", 3) == 3 else "bilinear",
    }


def key_map(text_layers: int, image_layers: int) -> dict[str, Part]:
    """Where each weight of open_clip's module comes from, for towers of so many blocks."""
    text, image = "text_model", "vision_model"
    plan = {
        "token_embedding.weight": Part((f"{text}.embeddings.token_embedding.weight",)),
        "positional_embedding": Part((f"{text}.embeddings.position_embedding.weight",)),
        "text_projection": Part(("text_projection.weight",), (1, 0)),
        "logit_scale": Part(("logit_scale",)),
        "visual.class_embedding": Part((f"{image}.embeddings.class_embedding",)),
        "visual.conv1.weight": Part((f"{image}.embeddings.patch_embedding.weight",)),
        "visual.positional_embedding": Part((f"{image}.embeddings.position_embedding.weight",)),
        "visual.proj": Part(("visual_projection.weight",), (1, 0)),
    }
    norms = {"ln_final": f"{text}.final_layer_norm", "visual.ln_pre": f"{image}.pre_layrnorm"}
    norms["visual.ln_post"] = f"{image}.post_layernorm"
    for ours, tower, layers in (("", text, text_layers), ("visual.", image, image_layers)):
        for i in range(layers):
            block, layer = f"{ours}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
                plan[f"{block}.attn.in_proj_{kind}"] = Part(parts)
            norms[f"{block}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
            norms |= {f"{block}.ln_{n}": f"{layer}.layer_norm{n}" for n in (1, 2)}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
    for ours, theirs in norms.items():
        plan |= {f"{ours}.{kind}": Part((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}
    return plan
