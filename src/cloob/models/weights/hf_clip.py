"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloob.errors import printable
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.runs import read_objective
from cloob.models.untrusted import read_json
from cloob.models.weights.clip_towers import CLIP_MEAN, CLIP_STD, MAX_LAYERS, build, filled
from cloob.models.weights.fields import Fields
from cloob.models.weights.folders import folder_weights
from cloob.models.weights.keymap import Part
from cloob.models.weights.scales import clip_objective, scale_of
from cloob.models.weights.tokens import FileTokenizer, hub_tokenizer

WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
"""Patterns of the files of weights on a hub: of the first that is there; an index of several is a configuration."""
_MOST = 1 << 16
_IGNORED = frozenset({"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"})
_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of CLIPTextConfig and CLIPVisionConfig
    "text_config": _TOWER
    | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    | {"max_position_embeddings": 77, "vocab_size": 49408},
    "vision_config": _TOWER
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 32, "num_channels": 3},
}
_ACTIVATIONS = {  # of a tower, beside open_clip's quick_gelu, which is of both
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_WORDS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_FLAGS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "use_square_size": False}


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
    if isinstance(tokenizer, FileTokenizer):
        _check_rules(folder, tokenizer)
    # An export has its own.
    objective = read_objective(folder) or clip_objective(scale_of(weights, "logit_scale", model.logit_scale))
    return DualEncoder(folder.name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective)


def _end(fields: Fields, vocabulary: int) -> int:
    """The end token; open_clip takes the row of the highest token, so it has to be that."""
    keys = ("text_config", "text_config_dict")
    for text in (fields.inside(key) for key in keys if fields.values.get(key) is not None):
        if text.integer("eos_token_id", 49407, least=0, most=vocabulary - 1) not in (2, vocabulary - 1):
            raise text.wrong("eos_token_id", f"the last word of the vocabulary ({vocabulary - 1})")
    return vocabulary - 1


def _check_rules(folder: Path, tokenizer: FileTokenizer) -> None:
    """InputError where a folder's tokenizer is of transformers' own class, and ``tokenizer.json`` has other rules."""
    path = folder / "tokenizer_config.json"
    fields = Fields(path, read_json(path) if path.is_file() else {})
    if fields.values.get("tokenizer_class") in (None, *_TOKENIZERS):
        words = [fields.values.get(key, default) for key, default in _WORDS.items()]
        start, end = (str(word.get("content") if isinstance(word, dict) else word) for word in words)
        tokenizer.check_clip(start, end)


def _model_cfg(fields: Fields, known: int) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a CLIPConfig."""
    text, image = _side(fields, "text_config"), _side(fields, "vision_config")
    text_tower, image_tower = _tower(text, known), _tower(image, known)
    text_act, image_act = _activations(text, image)
    size, patch = image.integer("image_size", most=_MOST), image.integer("patch_size", most=_MOST)
    if size % patch or image.integer("num_channels") != 3:
        raise image.wrong("image_size", f"a multiple of patch_size ({patch})")
    vocabulary = text.integer("vocab_size")
    return {
        "embed_dim": fields.integer("projection_dim", 512, most=_MOST),
        "quick_gelu": text_act == "quick_gelu",
        "vision_cfg": {
            "image_size": size,
            "layers": image_tower["layers"],
            "width": image_tower["width"],
            "head_width": image_tower["width"] // image_tower["heads"],
            "patch_size": patch,
            "mlp_ratio": image_tower["hidden"] / image_tower["width"],
            **_ACTIVATIONS[image_act],
        },
        "text_cfg": {
            "context_length": text.integer("max_position_embeddings", most=_MOST),
            "vocab_size": vocabulary,
            "width": text_tower["width"],
            "heads": text_tower["heads"],
            "layers": text_tower["layers"],
            "mlp_ratio": text_tower["hidden"] / text_tower["width"],
            "hf_tokenizer_name": "local",
            **_ACTIVATIONS[text_act],
        },
    }


def _side(fields: Fields, key: str) -> Fields:
    """A tower's object with its defaults; InputError where ``KEY_dict``, which transformers puts over it, differs."""
    given = [fields.inside(key)]
    if fields.values.get(f"{key}_dict") is not None:
        given.append(fields.inside(f"{key}_dict"))
    whole = [Fields(side.path, {**_DEFAULTS[key], **side.values}, side.prefix) for side in given]
    for name in _DEFAULTS[key]:
        if whole[-1].values[name] != (value := whole[0].values[name]):
            raise whole[-1].wrong(name, f"{printable(repr(value))[:60]}, as in {key},")
    return whole[0]


def _activations(text: Fields, image: Fields) -> tuple[str, str]:
    """The activations of the two towers; InputError where open_clip cannot have both."""
    names = tuple(_ACTIVATIONS)
    text_act, image_act = (side.one_of("hidden_act", names) for side in (text, image))
    if text_act != image_act and "quick_gelu" in (text_act, image_act):
        raise image.wrong("hidden_act", f"that of the text tower ({text_act!r}), as open_clip has quick_gelu in both,")
    return text_act, image_act


def _tower(side: Fields, known: int) -> dict[str, int]:
    tower = {
        "width": side.integer("hidden_size", most=_MOST),
        "hidden": side.integer("intermediate_size", most=_MOST),
        "layers": side.integer("num_hidden_layers", most=MAX_LAYERS),
        "heads": side.integer("num_attention_heads"),
    }
    if tower["width"] % tower["heads"]:
        raise side.wrong("num_attention_heads", f"a divisor of {tower['width']}")
    if tower["layers"] > known:
        raise side.wrong("num_hidden_layers", f"what the {known} tensors of the weights can be")
    if side.number("layer_norm_eps") != 1e-5:
        raise side.wrong("layer_norm_eps", "1e-05")
    return tower


def _preprocess(folder: Path, side: int) -> dict[str, Any]:
    """What a folder's image processor makes of pictures, in open_clip's words; CLIP's own without one.

    A field that is left out has the default of ``CLIPImageProcessor``.

    Args:
        folder: With ``preprocessor_config.json`` or ``processor_config.json``, or neither.
        side: The ``image_size`` of the towers.

    Raises:
        InputError: It does what open_clip does not, or a field is of another kind.
    """
    fields = _image_processor(folder)
    if fields is None:
        return {}
    key = next((key for key in ("image_processor_type", "feature_extractor_type") if key in fields.values), None)
    if key is not None:  # others have other defaults
        fields.one_of(key, _PROCESSORS)
    for key, right in _FLAGS.items():
        given = fields.values.get(key, right)
        if given is not right and not (given is None and not right):  # of what is not done transformers 4 writes null
            raise fields.wrong(key, str(right).lower())
    if abs(255 * fields.number("rescale_factor", 1 / 255) - 1) > 1e-6:
        raise fields.wrong("rescale_factor", "1/255")
    resample = fields.integer("resample", 3, least=0)
    if resample not in _INTERPOLATIONS:
        raise fields.wrong("resample", "2 (bilinear) or 3 (bicubic)")
    return {
        "mean": fields.channels("image_mean", list(CLIP_MEAN)),
        "std": fields.channels("image_std", list(CLIP_STD), positive=True),
        "interpolation": _INTERPOLATIONS[resample],
        "resize_mode": _resize_mode(fields, side),
    }


def _image_processor(folder: Path) -> Fields | None:
    """What a folder says of its image processor, None where it says nothing.

    transformers 5 writes ``processor_config.json`` alone, and takes what is in it before ``preprocessor_config.json``.
    """
    path = folder / "processor_config.json"
    if path.is_file() and "image_processor" in (content := read_json(path)):
        return Fields(path, content).inside("image_processor")
    path = folder / "preprocessor_config.json"
    return Fields(path, read_json(path)) if path.is_file() else None


def _resize_mode(fields: Fields, side: int) -> str:
    """open_clip's ``resize_mode`` of ``size``, ``do_center_crop`` and ``crop_size``."""
    size, crops = fields.values.get("size", 224), fields.values.get("do_center_crop", True)
    square, shortest = {"height": side, "width": side}, {"shortest_edge": side}
    if not isinstance(crops, bool):
        raise fields.wrong("do_center_crop", "true or false")
    if crops and not _is_one_of(fields.values.get("crop_size", 224), (side, square)):
        raise fields.wrong("crop_size", f"{side}, the image_size of the towers,")
    if _is_one_of(size, (square,)):  # of which the crop is all
        return "squash"
    if not _is_one_of(size, (side, shortest)):
        raise fields.wrong("size", f"{shortest} or {square}, the image_size of the towers,")
    if not crops:
        raise fields.wrong("do_center_crop", f"true with size {size}")
    if size == side and fields.values.get("default_to_square", False) is not False:
        raise fields.wrong("default_to_square", f"false with size {size}")
    return "shortest"


def _is_one_of(value: object, wanted: tuple[object, ...]) -> bool:
    """Whether it is one of some whole numbers, or objects of them; neither true nor 32.0 is a whole number."""
    parts = value.values() if isinstance(value, dict) else [value]
    return value in wanted and all(type(part) is int for part in parts)


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
