"""A model folder as transformers' ``CLIPModel`` with its processor and tokenizer, and
for sentence-transformers.

What ``CLIPModel`` has no place for is refused, and what was written is read by
transformers and compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cloob.errors import needs
from cloob.export.exported import (
    Exported,
    Unsupported,
    quiet,
    usage_of,
    write_json,
)
from cloob.models.encoder import DualEncoder, causal_tower, evaluating
from cloob.models.importing import translated
from cloob.models.tokenizer import (
    OPENAI_SPECIALS,
    ClipTokenizer,
    FileTokenizer,
    clip_rules,
)
from cloob.models.weights.containers import write_safetensors
from cloob.models.weights.keymap import Origin, key_map

with needs("export"):
    import tokenizers  # noqa: F401
    from transformers import AutoTokenizer, CLIPModel

if TYPE_CHECKING:
    from open_clip.transformer import TextTransformer, VisionTransformer
    from transformers.modeling_outputs import BaseModelOutputWithPooling


TOLERANCE = 1e-5
"""Greatest difference of a feature, relative to the largest one where that is above 1.
"""
_PLAIN = (
    "a photo of a dog",
    "Two  red Hearts, 3 (three)!",
    "a cat's toy, it'll move",
    "x",
    "",
    "naïve café 日本語",
)
START, END = OPENAI_SPECIALS
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
    reason = _reason_against(encoder)
    if reason:
        raise _unsupported(encoder, reason)
    specials, notes = _write_tokenizer(encoder, folder)
    _write_configs(encoder, specials, folder)
    theirs = Path(__file__).parent / "sentence_transformers"
    shutil.copytree(theirs, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    write_safetensors(folder / "model.safetensors", _state(encoder))
    reason = _first_difference(encoder, folder)
    if reason:
        raise _unsupported(encoder, reason)
    if encoder.preprocess_cfg.get("resize_mode") != "squash":
        notes.append(_NOTES["cropped"].format(size=encoder.image_size))
    summary = "transformers and sentence-transformers read it"
    tags = ("transformers", "sentence-transformers", "clip")
    return Exported(
        "transformers", summary, usage_of("transformers"), tuple(notes), tags
    )


def _unsupported(encoder: DualEncoder, reason: str) -> Unsupported:
    return Unsupported(f"{encoder.name}: {reason}; --to onnx takes it")


def _text_tower(encoder: DualEncoder) -> TextTransformer:
    return getattr(encoder.model, "text", encoder.model)


def _reason_against(encoder: DualEncoder) -> str:
    """Why ``CLIPModel`` cannot be this model, the simplest reason first; empty if it
    may be.
    """
    visual = encoder.model.visual
    is_vit = type(visual).__name__ == "VisionTransformer"
    if encoder.config.kind != "open_clip" or not is_vit:
        image_tower = type(getattr(visual, "trunk", visual)).__name__
        return (
            f"its image tower is of class {image_tower}, and CLIPModel has only CLIP's"
            " own ViT"
        )
    if causal_tower(encoder.model, encoder.context_length) is None:
        return "its text tower is not CLIP's causal one, as CLIPModel's is"
    if encoder.objective_config.get("contrast") == "sigmoid":
        return "CLIPModel has no place for logit_bias"
    weights = _weights(encoder).keys()
    plan = _plan(encoder).keys()
    for verb, names in (
        ("has no place for", weights - plan),
        ("needs", plan - weights),
    ):
        if names:
            return f"CLIPModel {verb} {', '.join(sorted(names)[:2])}"
    for tower in (_text_tower(encoder), visual):
        if _activation(tower) not in _ACTIVATIONS:
            return f"CLIPModel has no activation {_activation(tower)}"
    if processor_config(encoder) is None:
        return (
            "CLIPImageProcessor cannot prepare pictures by its resize_mode and"
            " interpolation"
        )
    return ""


def _activation(tower: TextTransformer | VisionTransformer) -> str:
    gelu = tower.transformer.resblocks[0].mlp.gelu
    return type(gelu).__name__ + (
        " tanh" if getattr(gelu, "approximate", "none") == "tanh" else ""
    )


def _plan(encoder: DualEncoder) -> dict[str, Origin]:
    """Hugging Face's names of every weight."""
    text = _text_tower(encoder).transformer.resblocks
    image = encoder.model.visual.transformer.resblocks
    return key_map("hf_clip", len(text), len(image))


def _weights(encoder: DualEncoder) -> dict[str, Tensor]:
    """The weights by open_clip's names."""
    state = encoder.model.state_dict()
    return {key.removeprefix("text."): value for key, value in state.items()}


def _state(encoder: DualEncoder) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, float32."""
    weights = _weights(encoder)
    state: dict[str, Tensor] = {}
    for key, origin in _plan(encoder).items():
        state |= origin.split(weights[key].float().cpu())
    return state


def _write_tokenizer(encoder: DualEncoder, folder: Path) -> tuple[Specials, list[str]]:
    """Writes the tokenizer for transformers; returns its special tokens, and for which
    texts tokens differ.
    """
    tokenizer = encoder.tokenizer
    notes = [_NOTES["uncut"].format(encoder.context_length)]
    if isinstance(tokenizer, ClipTokenizer):
        _write_clip_tokenizer(tokenizer, folder)
        notes.append(_NOTES["uncleaned"])
        if tokenizer.ending == "cut":
            notes.append(_NOTES["ended"])
        end = tokenizer.eot_token_id
        return (tokenizer.sot_token_id, end, end), notes
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.store(folder)
        start = int(tokenizer.ids(["a"])[0, 0])
        return (start, int(tokenizer.end or 0), int(tokenizer.pad or 0)), notes
    raise _unsupported(encoder, "it takes tokens, not texts, or has an own tokenizer")


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
    write_json(folder / "special_tokens_map.json", words)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **words,
    }
    write_json(folder / "tokenizer_config.json", config)


def _write_configs(encoder: DualEncoder, specials: Specials, folder: Path) -> None:
    """Writes the configuration of the model and of its pictures."""
    text = _text_tower(encoder)
    visual = encoder.model.visual
    start, end, pad = specials
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": encoder.context_length,
        "bos_token_id": start,
        # The real one: at 2 transformers would pool where the highest token is.
        "eos_token_id": end,
        "pad_token_id": pad,
        "layer_norm_eps": text.ln_final.eps,
        **_tower(encoder, text),
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": encoder.image_size,
        "patch_size": visual.conv1.kernel_size[0],
        "num_channels": 3,
        "layer_norm_eps": visual.ln_post.eps,
        **_tower(encoder, visual),
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.embed_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "cloob": encoder.objective_config,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor_config(encoder))


def _tower(
    encoder: DualEncoder, tower: TextTransformer | VisionTransformer
) -> dict[str, object]:
    """What both towers' configurations have."""
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _ACTIVATIONS[_activation(tower)],
        "projection_dim": encoder.embed_dim,
    }


def processor_config(encoder: DualEncoder) -> dict[str, object] | None:
    """How ``CLIPImageProcessor`` prepares pictures; None where it cannot."""
    preprocess = encoder.preprocess_cfg
    side = encoder.image_size
    crops = preprocess.get("resize_mode") != "squash"
    interpolation = preprocess.get("interpolation") or "bicubic"
    if interpolation not in _RESAMPLE:
        return None
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"shortest_edge": side} if crops else square,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": crops,
        "crop_size": square,
        "rescale_factor": 1 / 255,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


@torch.no_grad()
def _first_difference(encoder: DualEncoder, folder: Path) -> str:
    """What transformers computes differently of the folder: tokens, or features of the
    same pixels and tokens; empty where all are equal.
    """
    with quiet(), translated(f"{encoder.name}: transformers cannot read the export"):
        model = CLIPModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = encoder.tokenizer(list(_PLAIN))
    cut = {"truncation": True, "max_length": encoder.context_length}
    for text, row in zip(_PLAIN, tokens.tolist(), strict=True):
        ids = tokenizer(text, **cut)["input_ids"]
        if row[: len(ids)] != ids:
            return f"transformers makes other tokens of {text!r}"
    shape = (2, 3, encoder.image_size, encoder.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with evaluating(encoder):
        images = encoder.model.encode_image(pixels)
        texts = encoder.model.encode_text(tokens)
    if not _equal(images, model.get_image_features(pixels)):
        return "CLIPModel computes another image feature"
    if not _equal(texts, model.get_text_features(tokens)):
        return "CLIPModel computes another text feature"
    return ""


def _equal(features: Tensor, theirs: Tensor | BaseModelOutputWithPooling) -> bool:
    theirs = getattr(theirs, "pooler_output", theirs)  # of transformers 5
    largest = features.abs().max().clamp_min(1)
    return bool((features - theirs).abs().max() <= TOLERANCE * largest)
