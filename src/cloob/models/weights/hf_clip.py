"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's
names.
"""

from __future__ import annotations

from pathlib import Path

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import read_json
from cloob.models.runs import check_objective
from cloob.models.settings import (
    JsonObject,
    ModelConfig,
    Pixels,
    TextConfig,
    VisionConfig,
)
from cloob.models.tokenizer import (
    CLIP_VOCABULARY,
    TokenizerSettings,
    read_tokenizer,
)
from cloob.models.weights.containers import folder_weights
from cloob.models.weights.keymap import (
    CLIP_MEAN,
    CLIP_STD,
    build_open_clip,
    fill,
    key_map,
)

# the arguments of one tower's activation; open_clip's quick_gelu is for both
_ACTIVATIONS: dict[str, dict[str, object]] = {
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)


def load(folder: Path) -> DualEncoder:
    """The encoder of a CLIPConfig, by open_clip's ``model_cfg``; defaults are those of
    transformers.
    """
    where = folder / "config.json"
    config = read_json(where)
    weights, tensors = folder_weights(folder)
    # KEY_dict of older files, which transformers puts over KEY.
    text = config.get("text_config_dict") or config["text_config"]
    image = config.get("vision_config_dict") or config["vision_config"]
    _check(where, text, image)
    model_cfg: ModelConfig = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _activation(text) == "quick_gelu",
        "vision_cfg": _vision_cfg(image),
        "text_cfg": _text_cfg(text),
    }
    pixels = _preprocess(folder, model_cfg["vision_cfg"]["image_size"])
    model = build_open_clip(model_cfg, pixels, where)
    text_layers = len(model.transformer.resblocks)
    image_layers = len(model.visual.transformer.resblocks)
    fill(model, weights, tensors, key_map("hf_clip", text_layers, image_layers))
    built = EncoderConfig.open_clip(model_cfg)
    end = model_cfg["text_cfg"]["vocab_size"] - 1
    settings: TokenizerSettings = {
        "kind": "hub",
        "pad": text.get("pad_token_id", end),
        "end": end,
    }
    tokenizer = read_tokenizer(where, settings, built.context_length)
    # of an export
    objective = check_objective(config.get("cloob", {}), f"{where}: cloob")
    return DualEncoder(folder.name, model, tokenizer, built, objective)


def _text_cfg(config: JsonObject) -> TextConfig:
    width = config.get("hidden_size", 512)
    text_cfg: TextConfig = {
        "layers": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 8),
        "width": width,
        "mlp_ratio": config.get("intermediate_size", 2048) / width,
        "context_length": config.get("max_position_embeddings", 77),
        "vocab_size": config.get("vocab_size", CLIP_VOCABULARY),
        "hf_tokenizer_name": "local",
    }
    act_kwargs = _ACTIVATIONS[_activation(config)]
    if act_kwargs:
        text_cfg["act_kwargs"] = act_kwargs
    return text_cfg


def _vision_cfg(config: JsonObject) -> VisionConfig:
    width = config.get("hidden_size", 768)
    vision_cfg: VisionConfig = {
        "layers": config.get("num_hidden_layers", 12),
        "head_width": width // config.get("num_attention_heads", 12),
        "width": width,
        "mlp_ratio": config.get("intermediate_size", 3072) / width,
        "image_size": config.get("image_size", 224),
        "patch_size": config.get("patch_size", 32),
    }
    act_kwargs = _ACTIVATIONS[_activation(config)]
    if act_kwargs:
        vision_cfg["act_kwargs"] = act_kwargs
    return vision_cfg


def _activation(tower: JsonObject) -> str:
    return str(tower.get("hidden_act", "quick_gelu"))


def _check(where: Path, text: JsonObject, image: JsonObject) -> None:
    """Raises InputError for towers that open_clip's cannot be."""
    names = [_activation(text), _activation(image)]
    unknown = set(names) - _ACTIVATIONS.keys()
    if unknown:
        supported = ", ".join(_ACTIVATIONS)
        raise InputError(
            f"{where}: hidden_act is {min(unknown)!r}; {supported} are known"
        )
    # open_clip takes the row of the highest token; at 2, of old configurations,
    # transformers does too.
    highest = text.get("vocab_size", CLIP_VOCABULARY) - 1
    end = text.get("eos_token_id", CLIP_VOCABULARY - 1)
    eps = {side.get("layer_norm_eps", 1e-5) for side in (text, image)}
    is_mixed = names[0] != names[1] and "quick_gelu" in names
    if end not in (highest, 2) or is_mixed or eps != {1e-5}:
        raise InputError(
            f"{where}: eos_token_id {end}, layer_norm_eps {eps}, hidden_act"
            f" {' and '.join(names)}; open_clip's text ends with its highest token,"
            " quick_gelu is in both towers, and the eps is 1e-5"
        )


def _preprocess(folder: Path, side: int) -> Pixels:
    """A folder's image processor as open_clip's ``preprocess_cfg``; empty, which is
    CLIP's, without one.
    """
    path, processor = _processor(folder)
    if processor is None:
        return {}
    square = {"height": side, "width": side}
    # what open_clip can do too, the default first
    supported: dict[str, tuple[object, ...]] = {
        "image_processor_type": _PROCESSORS,
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (3, 2),
        "size": (square,),
    }
    if processor.get("do_center_crop", True):
        supported |= {
            "size": (side, {"shortest_edge": side}, square),
            "crop_size": (side, square),
        }
    for key, allowed in supported.items():
        value = processor.get(key, 224 if "size" in key else allowed[0])
        if value not in allowed:
            raise InputError(
                f"{path}: {key} is {value!r}; {' or '.join(map(repr, allowed))} is"
                " expected"
            )
    # Of a square the crop is all.
    mode = "squash" if processor.get("size") == square else "shortest"
    return {
        "mean": tuple(processor.get("image_mean", CLIP_MEAN)),
        "std": tuple(processor.get("image_std", CLIP_STD)),
        "interpolation": _INTERPOLATIONS[processor.get("resample", 3)],
        "resize_mode": mode,
    }


def _processor(folder: Path) -> tuple[Path, JsonObject | None]:
    """The image processor's file and content: that of transformers 5 before an older
    one.
    """
    path = folder / "processor_config.json"
    if path.is_file():
        content = read_json(path).get("image_processor")
        if content is not None:
            return path, content
    path = folder / "preprocessor_config.json"
    return path, read_json(path) if path.is_file() else None
