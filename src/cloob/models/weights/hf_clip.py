"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import check_objective
from cloob.models.untrusted import read_json
from cloob.models.weights.blocks import CLIP_MEAN, CLIP_STD, MAX_LAYERS
from cloob.models.weights.clip_towers import build, filled
from cloob.models.weights.fields import Fields
from cloob.models.weights.folders import folder_weights
from cloob.models.weights.keymap import Part
from cloob.models.weights.tokens import hub_tokenizer

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
"""Patterns of the files of weights on a hub: of the first that is there; an index of several is a configuration."""
_IGNORED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_ACTIVATIONS: dict[str, dict[str, Any]] = {  # of a tower, beside open_clip's quick_gelu, which is of both
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PROCESSOR: dict[str, tuple[Any, ...]] = {  # what open_clip does too, the default first
    "image_processor_type": (
        *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"),
    ),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_pad": (False, None),  # transformers 4 writes null
    "rescale_factor": (1 / 255,),
}


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a folder's ``config.json`` is of this family."""
    return config.get("model_type") == "clip"


def load(folder: Path, config: dict[str, Any]) -> DualEncoder:
    """The encoder of a folder; InputError where it is no ``CLIPModel`` that open_clip has towers for."""
    where = folder / "config.json"
    weights, tensors = folder_weights(folder)
    model_cfg, pad = _model_cfg(Fields(where, config))
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    model = build(model_cfg, _preprocess(folder, vision["image_size"]), str(where))
    model = filled(model, weights, tensors, key_map(text["layers"], vision["layers"]), _IGNORED)
    tokenizer = hub_tokenizer(folder, text["context_length"], pad, text["vocab_size"] - 1)
    objective = check_objective(config.get("cloob", {}), f"{where}: cloob")  # of an export; transformers keeps the key
    return DualEncoder(folder.name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def _model_cfg(fields: Fields) -> tuple[dict[str, Any], int]:
    """open_clip's ``model_cfg`` of a CLIPConfig, and the padding; defaults are those of transformers."""
    text, image = _side(fields, "text_config"), _side(fields, "vision_config")
    vocabulary, size = text.integer("vocab_size", 49408), image.integer("image_size", 224)
    image.one_of("num_channels", (3,), 3)
    # open_clip takes the row of the highest token; at 2, of old configurations, transformers does too.
    text.one_of("eos_token_id", (vocabulary - 1, 2), 49407)
    text_act, image_act = (side.one_of("hidden_act", tuple(_ACTIVATIONS), "quick_gelu") for side in (text, image))
    if text_act != image_act and "quick_gelu" in (text_act, image_act):
        raise image.wrong("hidden_act", f"that of the text tower ({text_act!r}), as open_clip has quick_gelu in both,")
    text_cfg, heads = _tower(text, 512, 2048, 8)
    vision_cfg, image_heads = _tower(image, 768, 3072, 12)
    model_cfg = {
        "embed_dim": fields.integer("projection_dim", 512),
        "quick_gelu": text_act == "quick_gelu",
        "vision_cfg": vision_cfg
        | {"head_width": vision_cfg["width"] // image_heads, "image_size": size}
        | {"patch_size": image.divisor("patch_size", size, 32), **_ACTIVATIONS[image_act]},
        "text_cfg": text_cfg
        | {"heads": heads, "context_length": text.integer("max_position_embeddings", 77), "vocab_size": vocabulary}
        | {"hf_tokenizer_name": "local", **_ACTIVATIONS[text_act]},
    }
    return model_cfg, text.integer("pad_token_id", vocabulary - 1, least=0, most=vocabulary - 1)


def _side(fields: Fields, key: str) -> Fields:
    """A tower's object: ``KEY_dict`` of older files, which transformers puts over ``KEY``, where it is there."""
    return fields.inside(key if fields.values.get(f"{key}_dict") is None else f"{key}_dict")


def _tower(side: Fields, width: int, hidden: int, heads: int) -> tuple[dict[str, Any], int]:
    """The sizes of a tower and its heads; the defaults are given."""
    width = side.integer("hidden_size", width)
    side.one_of("layer_norm_eps", (1e-5,), 1e-5)
    sizes = {
        "layers": side.integer("num_hidden_layers", 12, most=MAX_LAYERS),
        "width": width,
        "mlp_ratio": side.integer("intermediate_size", hidden) / width,
    }
    return sizes, side.divisor("num_attention_heads", width, heads)


def _preprocess(folder: Path, side: int) -> dict[str, Any]:
    """What a folder's image processor makes of pictures, in open_clip's words; CLIP's own without one.

    transformers 5 writes ``processor_config.json`` alone, and takes what is in it before ``preprocessor_config.json``.
    """
    path, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    if path.is_file() and "image_processor" in (content := read_json(path)):
        fields = Fields(path, content).inside("image_processor")
    elif older.is_file():
        fields = Fields(older, read_json(older))
    else:
        return {}
    for key, allowed in _PROCESSOR.items():
        fields.one_of(key, allowed, allowed[0])
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    crops = fields.one_of("do_center_crop", (True, False), True)
    if crops:
        fields.one_of("crop_size", (side, square), 224)
    size = fields.one_of("size", (side, shortest, square) if crops else (square,), 224)
    return {
        "mean": fields.channels("image_mean", CLIP_MEAN),
        "std": fields.channels("image_std", CLIP_STD, positive=True),
        "interpolation": _INTERPOLATIONS[fields.one_of("resample", tuple(_INTERPOLATIONS), 3)],
        "resize_mode": "squash" if size == square else "shortest",  # of a square the crop is all
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
    biased = {"ln_final": f"{text}.final_layer_norm", "visual.ln_pre": f"{image}.pre_layrnorm"}
    biased["visual.ln_post"] = f"{image}.post_layernorm"
    for ours, tower, layers in (("", text, text_layers), ("visual.", image, image_layers)):
        for i in range(layers):
            block, layer = f"{ours}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
                plan[f"{block}.attn.in_proj_{kind}"] = Part(parts)
            biased[f"{block}.attn.out_proj"] = f"{layer}.self_attn.out_proj"
            biased |= {f"{block}.ln_{n}": f"{layer}.layer_norm{n}" for n in (1, 2)}
            biased |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
    for ours, theirs in biased.items():
        plan |= {f"{ours}.{kind}": Part((f"{theirs}.{kind}",)) for kind in ("weight", "bias")}
    return plan
