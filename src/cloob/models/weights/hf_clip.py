"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import check_objective
from cloob.models.tokenizer import hub_tokenizer
from cloob.models.untrusted import read_json
from cloob.models.weights.blocks import CLIP_MEAN, CLIP_STD
from cloob.models.weights.containers import folder_weights
from cloob.models.weights.keymap import Part, build, fill

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
"""Patterns of the files of weights on a hub: of the first that is there; an index of several is a configuration."""
_ACTIVATIONS: dict[str, dict[str, Any]] = {  # of a tower, beside open_clip's quick_gelu, which is of both
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


def load(folder: Path, config: dict[str, Any]) -> DualEncoder:
    weights, tensors = folder_weights(folder)
    model_cfg, pad = _model_cfg(folder / "config.json", config)
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    model = build(model_cfg, _preprocess(folder, vision["image_size"]), folder / "config.json")
    fill(model, weights, tensors, key_map(text["layers"], vision["layers"]))
    tokenizer = hub_tokenizer(folder, text["context_length"], pad, text["vocab_size"] - 1)
    objective = check_objective(config.get("cloob", {}), f"{folder / 'config.json'}: cloob")  # of an export
    return DualEncoder(folder.name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def _model_cfg(where: Path, config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """open_clip's ``model_cfg`` of a CLIPConfig, and the padding; defaults are those of transformers."""
    # KEY_dict of older files, which transformers puts over KEY.
    text, image = (config.get(f"{side}_config_dict") or config[f"{side}_config"] for side in ("text", "vision"))
    vocabulary, acts = text.get("vocab_size", 49408), [side.get("hidden_act", "quick_gelu") for side in (text, image)]
    # open_clip takes the row of the highest token; at 2, of old configurations, transformers does too.
    end, eps = text.get("eos_token_id", 49407), {side.get("layer_norm_eps", 1e-5) for side in (text, image)}
    if unknown := {*acts} - {*_ACTIVATIONS}:
        raise InputError(f"{where}: hidden_act is {min(unknown)!r}; {', '.join(_ACTIVATIONS)} are known")
    if end not in (vocabulary - 1, 2) or (acts[0] != acts[1] and "quick_gelu" in acts) or eps != {1e-5}:
        right = "open_clip's text ends with its highest token, quick_gelu is in both towers, and the eps is 1e-5"
        raise InputError(f"{where}: eos_token_id {end}, layer_norm_eps {eps}, hidden_act {' and '.join(acts)}; {right}")
    text_cfg, vision_cfg = _tower(text, 512, 2048, 8), _tower(image, 768, 3072, 12)
    heads = vision_cfg.pop("heads")
    vision_cfg |= {"head_width": vision_cfg["width"] // heads, "image_size": image.get("image_size", 224)}
    vision_cfg |= {"patch_size": image.get("patch_size", 32)}
    text_cfg |= {"context_length": text.get("max_position_embeddings", 77), "vocab_size": vocabulary}
    text_cfg |= {"hf_tokenizer_name": "local"}
    model_cfg = {"embed_dim": config.get("projection_dim", 512), "quick_gelu": acts[0] == "quick_gelu"}
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
    return model_cfg, text.get("pad_token_id", vocabulary - 1)


def _tower(side: dict[str, Any], width: int, hidden: int, heads: int) -> dict[str, Any]:
    width = side.get("hidden_size", width)
    return _ACTIVATIONS[side.get("hidden_act", "quick_gelu")] | {
        "layers": side.get("num_hidden_layers", 12),
        "width": width,
        "mlp_ratio": side.get("intermediate_size", hidden) / width,
        "heads": side.get("num_attention_heads", heads),
    }


def _preprocess(folder: Path, side: int) -> dict[str, Any]:
    """What a folder's image processor makes of pictures, in open_clip's words; CLIP's own without one."""
    path, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    processor = read_json(path).get("image_processor") if path.is_file() else None  # of transformers 5
    if processor is None and not older.is_file():
        return {}
    if processor is None:
        path, processor = older, read_json(older)
    square, crops = {"height": side, "width": side}, processor.get("do_center_crop", True)
    same: tuple[tuple[Any, ...], ...] = (  # what open_clip does too, the default first
        ("image_processor_type", *_PROCESSORS),
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", 3, 2),
        *([("size", side, {"shortest_edge": side}, square), ("crop_size", side, square)] if crops else []),
        *([] if crops else [("size", square)]),
    )
    for key, *allowed in same:
        value = processor.get(key, 224 if "size" in key else allowed[0])
        if value not in allowed:
            raise InputError(f"{path}: {key} is {value!r}; {' or '.join(map(repr, allowed))} is wanted")
    return {
        "mean": tuple(processor.get("image_mean", CLIP_MEAN)),
        "std": tuple(processor.get("image_std", CLIP_STD)),
        "interpolation": _INTERPOLATIONS[processor.get("resample", 3)],
        "resize_mode": "squash" if processor.get("size") == square else "shortest",  # of a square the crop is all
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
