"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and
for sentence-transformers.

What ``CLIPModel`` has no place for is refused, and what was written is read by
transformers and compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloob.errors import require
from cloob.export.exported import Exported, Unsupported, quiet, usage_of
from cloob.models.encoder import DualEncoder, causal_tower, evaluating
from cloob.models.tokenizer import ClipTokenizer, FileTokenizer, NoTokenizer, clip_rules
from cloob.models.towers import translated
from cloob.models.weights.containers import write_safetensors
from cloob.models.weights.keymap import Origin, key_map

TOLERANCE = 1e-5
"""Greatest difference of a feature, relative to the largest one where that is above 1.
"""
_PLAIN = (
    "a photo of a dog",
    "Two  red Hearts, 3 (three)!",
    "a cat's toy, it'll move",
    "",
    "naïve café 日本語",
)
START, END = "<|startoftext|>", "<|endoftext|>"
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELU tanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
}
# PIL's numbers; open_clip tests "random" with bicubic
_RESAMPLE = {
    "bilinear": 2,
    "bicubic": 3,
    "random": 3,
}
_NOTES: dict[str, str] = json.loads(
    (Path(__file__).parent / "usage" / "notes.json").read_text(encoding="utf-8")
)
Specials = tuple[int, int, int]
"""The tokens that a text begins with and ends with, and what fills rows up."""


def export_transformers(encoder: DualEncoder, folder: Path) -> Exported:
    """Writes the files of transformers and of sentence-transformers into an empty
    folder.

    Unsupported where transformers has no such towers, or makes another model of the
    folder.
    """
    encoder.check_weights()
    refusal = next(_refusals(encoder), "")
    if refusal:
        raise Unsupported(f"{encoder.name}: {refusal}; --to onnx takes it")
    specials, notes = _write_tokenizer(encoder, folder)
    _write_configs(encoder, specials, folder)
    theirs = Path(__file__).parent / "sentence_transformers"
    shutil.copytree(theirs, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    write_safetensors(folder / "model.safetensors", _state(encoder))
    difference = next(_differences(encoder, folder), "")
    if difference:
        raise Unsupported(f"{encoder.name}: {difference}; --to onnx takes it")
    if encoder.preprocess_cfg.get("resize_mode") != "squash":
        notes.append(_NOTES["cropped"].format(size=encoder.image_size))
    summary = "transformers and sentence-transformers read it"
    tags = ("transformers", "sentence-transformers", "clip")
    return Exported(
        "transformers", summary, usage_of("transformers"), tuple(notes), tags
    )


def _text_tower(encoder: DualEncoder) -> Any:
    return encoder.model.get_submodule(
        causal_tower(encoder.model, encoder.context_length) or ""
    )


def _refusals(encoder: DualEncoder) -> Iterator[str]:
    """Why ``CLIPModel`` cannot be this model, the simplest reason first."""
    visual = getattr(encoder.model, "visual", None)
    if encoder.config.kind == "aligned":
        yield "heads on frozen encoders, and transformers has no such model"
    is_vit = type(visual).__name__ == "VisionTransformer"
    if encoder.config.kind != "open_clip" or not is_vit:
        image_tower = type(getattr(visual, "trunk", visual)).__name__
        yield (
            f"its image tower is of class {image_tower}, and CLIPModel has only CLIP's"
            " own ViT"
        )
    if causal_tower(encoder.model, encoder.context_length) is None:
        yield "its text tower is not CLIP's causal one, as CLIPModel's is"
    yield from _refusals_of_tokenizer(encoder.tokenizer)
    if encoder.objective_config.get("contrast") == "sigmoid":
        yield "CLIPModel has no place for logit_bias"
    weights, plan = _weights(encoder)
    if homeless := sorted(weights.keys() - plan.keys()):
        yield f"CLIPModel has no place for {', '.join(homeless[:2])}"
    if missing := sorted(plan.keys() - weights.keys()):
        yield f"CLIPModel needs {', '.join(missing[:2])}"
    for tower in (_text_tower(encoder), visual):
        activation = _activation(tower)
        if activation not in _ACTIVATIONS:
            yield f"CLIPModel has no activation {activation}"
    if processor_config(encoder) is None:
        yield (
            "CLIPImageProcessor cannot prepare pictures by its resize_mode and"
            " interpolation"
        )


def _refusals_of_tokenizer(tokenizer: Any) -> Iterator[str]:
    """Why transformers cannot have the tokenizer; nothing if it can."""
    if isinstance(tokenizer, NoTokenizer):
        yield "it takes tokens, not texts, as it has no tokenizer"
    if isinstance(tokenizer, ClipTokenizer | FileTokenizer):
        return
    theirs = getattr(tokenizer, "tokenizer", None)  # of transformers, in open_clip's
    if not hasattr(theirs, "save_pretrained") or tokenizer.clean_fn is None:
        yield f"transformers has no {type(tokenizer).__name__}"


def _activation(tower: Any) -> str:
    gelu = tower.transformer.resblocks[0].mlp.gelu
    return type(gelu).__name__ + (
        " tanh" if getattr(gelu, "approximate", "none") == "tanh" else ""
    )


def _weights(encoder: DualEncoder) -> tuple[dict[str, Tensor], dict[str, Origin]]:
    """The weights by open_clip's names, and Hugging Face's for them."""
    text, image = (
        len(tower.transformer.resblocks)
        for tower in (_text_tower(encoder), encoder.model.visual)
    )
    weights = {
        key.removeprefix("text."): value
        for key, value in encoder.model.state_dict().items()
    }
    return weights, key_map("hf_clip", text, image)


def _state(encoder: DualEncoder) -> dict[str, Tensor]:
    """The weights by Hugging Face's names (the inverse of ``fill``), float32."""
    (weights, plan), state = _weights(encoder), dict[str, Tensor]()
    for key, part in plan.items():
        value = weights[key].detach().float().cpu()
        pieces = value.chunk(len(part.names)) if len(part.names) > 1 else (value,)
        for name, piece in zip(part.names, pieces, strict=True):
            piece = piece if part.permute is None else piece.permute(part.permute)
            state[name] = piece.clone(memory_format=torch.contiguous_format)
    return state


def _write_tokenizer(encoder: DualEncoder, folder: Path) -> tuple[Specials, list[str]]:
    """Writes the tokenizer for transformers; returns its special tokens, and for which
    texts tokens differ.
    """
    tokenizer: Any = encoder.tokenizer
    cut = _NOTES["uncut"].format(encoder.context_length)
    if isinstance(tokenizer, ClipTokenizer):
        _write_clip_tokenizer(tokenizer, folder)
        notes = [_NOTES["uncleaned"], cut]
        if tokenizer.ending == "cut":
            notes.append(_NOTES["ended"])
        end = tokenizer.eot_token_id
        return (tokenizer.sot_token_id, end, end), notes
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save_pretrained(folder)
        start = int(tokenizer.ids(["a"])[0, 0])
        return (start, int(tokenizer.end or 0), int(tokenizer.pad or 0)), [cut]
    theirs = tokenizer.tokenizer
    theirs.save_pretrained(folder)
    numbers = (theirs.bos_token_id, theirs.cls_token_id, theirs.eos_token_id)
    start = next(number for number in numbers if number is not None)
    specials = int(start), int(theirs.eos_token_id), int(theirs.pad_token_id)
    return specials, [_NOTES["other"], cut]


def _write_clip_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    """Writes CLIP's tokenizer as transformers has it."""
    # the special words as Hugging Face has them
    rules = clip_rules(tokenizer, (START, END), lower=False)
    text = rules.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    # vocab.json and merges.txt, the older files of the same content
    rules.model.save(str(folder))
    words = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    _write_json(folder / "special_tokens_map.json", words)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **words,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_configs(encoder: DualEncoder, specials: Specials, folder: Path) -> None:
    """Writes the configuration of the model and of its pictures."""
    text, visual = _text_tower(encoder), encoder.model.visual
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": encoder.context_length,
        # The end is the real one: at 2 transformers would pool where the highest token
        # is.
        **dict(
            zip(("bos_token_id", "eos_token_id", "pad_token_id"), specials, strict=True)
        ),
        **_tower(encoder, text, text.ln_final),
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": encoder.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "num_channels": 3,
        **_tower(encoder, visual, visual.ln_post),
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.embed_dim,
    }
    config |= {
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "cloob": encoder.objective_config,
    }
    _write_json(
        folder / "config.json",
        config | {"text_config": text_config, "vision_config": vision_config},
    )
    _write_json(folder / "preprocessor_config.json", processor_config(encoder))


def _tower(encoder: DualEncoder, tower: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _ACTIVATIONS[_activation(tower)],
        "layer_norm_eps": norm.eps,
        "projection_dim": encoder.embed_dim,
    }


def processor_config(encoder: DualEncoder) -> dict[str, Any] | None:
    """How ``CLIPImageProcessor`` prepares pictures; None where it cannot."""
    preprocess, side = encoder.preprocess_cfg, encoder.image_size
    mode = preprocess.get("resize_mode") or "shortest"
    interpolation = preprocess.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        return None
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        **dict.fromkeys(
            ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True
        ),
        "size": {"shortest_edge": side} if mode == "shortest" else square,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "rescale_factor": 1 / 255,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


@torch.no_grad()
def _differences(encoder: DualEncoder, folder: Path) -> Iterator[str]:
    """What transformers computes differently: features of the same pixels and tokens,
    and tokens.
    """
    library: Any = require("transformers", "export")
    with quiet(), translated(f"{encoder.name}: transformers cannot read the export"):
        model = library.CLIPModel.from_pretrained(folder).eval()
        tokenizer = library.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(
        2, 3, encoder.image_size, encoder.image_size, generator=generator
    )
    end, length = model.config.text_config.eos_token_id, encoder.context_length
    tokens = torch.randint(
        1, model.config.text_config.vocab_size - 1, (4, length), generator=generator
    )
    for row, last in enumerate((length - 1, length // 2, 2, 1)):
        tokens[row, min(last, length - 1) :] = end
    with evaluating(encoder):
        features = encoder.model.encode_image(pixels), encoder.model.encode_text(tokens)
    their_features = model.get_image_features(pixels), model.get_text_features(tokens)
    for side, ours, other in zip(
        ("image", "text"), features, their_features, strict=True
    ):
        other = getattr(other, "pooler_output", other)  # of transformers 5
        apart = float((ours - other).abs().max() / ours.abs().max().clamp_min(1))
        if not apart <= TOLERANCE:
            yield f"CLIPModel computes another {side} feature ({apart:.1e} apart)"
    for text in _PLAIN:
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if encoder.tokenizer([text])[0].tolist()[: len(ids)] != ids:
            yield f"transformers makes other tokens of {text!r}"
