"""A folder of transformers' ``CLIPModel``: open_clip's towers under Hugging Face's
names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import read_json
from cloob.models.runs import check_objective
from cloob.models.tokenizer import read_tokenizer
from cloob.models.weights.containers import folder_weights
from cloob.models.weights.keymap import CLIP_MEAN, CLIP_STD, build, fill, key_map

WEIGHTS = (
    "model.safetensors",
    "model-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
)  # on a hub
_ACTIVATIONS: dict[
    str, dict[str, Any]
] = {  # of one tower; open_clip's quick_gelu is for both
    "gelu": {},
    "quick_gelu": {},
    "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}},
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
    text, image = (
        config.get(f"{side}_config_dict") or config[f"{side}_config"]
        for side in ("text", "vision")
    )
    vocabulary, acts = (
        text.get("vocab_size", 49408),
        [side.get("hidden_act", "quick_gelu") for side in (text, image)],
    )
    # open_clip takes the row of the highest token; at 2, of old configurations,
    # transformers does too.
    end, eps = (
        text.get("eos_token_id", 49407),
        {side.get("layer_norm_eps", 1e-5) for side in (text, image)},
    )
    wrong = ""
    if unknown := {*acts} - {*_ACTIVATIONS}:
        wrong = f"hidden_act is {min(unknown)!r}; {', '.join(_ACTIVATIONS)} are known"
    elif (
        end not in (vocabulary - 1, 2)
        or (acts[0] != acts[1] and "quick_gelu" in acts)
        or eps != {1e-5}
    ):
        right = (
            "open_clip's text ends with its highest token, quick_gelu is in both"
            " towers, and the eps is 1e-5"
        )
        wrong = (
            f"eos_token_id {end}, layer_norm_eps {eps}, hidden_act"
            f" {' and '.join(acts)}; {right}"
        )
    if wrong:
        raise InputError(f"{where}: {wrong}")
    towers = []
    for side, width, hidden, heads in ((text, 512, 2048, 8), (image, 768, 3072, 12)):
        width = side.get("hidden_size", width)
        sizes = {
            "layers": side.get("num_hidden_layers", 12),
            "heads": side.get("num_attention_heads", heads),
        }
        sizes |= {
            "width": width,
            "mlp_ratio": side.get("intermediate_size", hidden) / width,
        }
        towers.append(_ACTIVATIONS[side.get("hidden_act", "quick_gelu")] | sizes)
    text_cfg, vision_cfg = towers
    vision_cfg["head_width"] = vision_cfg["width"] // vision_cfg.pop("heads")
    vision_cfg |= {
        "image_size": image.get("image_size", 224),
        "patch_size": image.get("patch_size", 32),
    }
    text_cfg |= {
        "context_length": text.get("max_position_embeddings", 77),
        "vocab_size": vocabulary,
    }
    text_cfg["hf_tokenizer_name"] = "local"
    model_cfg = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": acts[0] == "quick_gelu",
    }
    model_cfg |= {"vision_cfg": vision_cfg, "text_cfg": text_cfg}
    model = build(model_cfg, _preprocess(folder, vision_cfg["image_size"]), where)
    fill(
        model,
        weights,
        tensors,
        key_map("hf_clip", text_cfg["layers"], vision_cfg["layers"]),
    )
    settings = {
        "kind": "hub",
        "pad": text.get("pad_token_id", vocabulary - 1),
        "end": vocabulary - 1,
    }
    tokenizer = read_tokenizer(where, settings, text_cfg["context_length"])
    objective = check_objective(
        config.get("cloob", {}), f"{where}: cloob"
    )  # of an export
    return DualEncoder(
        folder.name, model, tokenizer, EncoderConfig.open_clip(model_cfg), objective
    )


def _preprocess(folder: Path, side: int) -> dict[str, Any]:
    """A folder's image processor as open_clip's ``preprocess_cfg``; empty, which is
    CLIP's, without one.
    """
    path, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    processor = (
        read_json(path).get("image_processor") if path.is_file() else None
    )  # of transformers 5
    if processor is None and not older.is_file():
        return {}
    if processor is None:
        path, processor = older, read_json(older)
    square, crops = (
        {"height": side, "width": side},
        processor.get("do_center_crop", True),
    )
    same: tuple[tuple[Any, ...], ...] = (  # what open_clip does too, the default first
        ("image_processor_type", *_PROCESSORS),
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", 3, 2),
        *(
            [
                ("size", side, {"shortest_edge": side}, square),
                ("crop_size", side, square),
            ]
            if crops
            else []
        ),
        *([] if crops else [("size", square)]),
    )
    for key, *allowed in same:
        value = processor.get(key, 224 if "size" in key else allowed[0])
        if value not in allowed:
            raise InputError(
                f"{path}: {key} is {value!r}; {' or '.join(map(repr, allowed))} is"
                " expected"
            )
    return {
        "mean": tuple(processor.get("image_mean", CLIP_MEAN)),
        "std": tuple(processor.get("image_std", CLIP_STD)),
        "interpolation": _INTERPOLATIONS[processor.get("resample", 3)],
        "resize_mode": (
            "squash" if processor.get("size") == square else "shortest"
        ),  # of a square the crop is all
    }
