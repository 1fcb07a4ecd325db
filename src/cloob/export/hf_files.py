"""The files of transformers' ``CLIPModel``, processor and tokenizer, and those of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cloob.errors import require
from cloob.export.exported import Unsupported
from cloob.models.encoder import DualEncoder
from cloob.models.tokenizer import ClipTokenizer, clip_rules
from cloob.models.weights.tokens import FileTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_ACTIVATIONS = {"GELU": "gelu", "GELU tanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3, "random": 3}  # PIL's numbers; open_clip tests "random" with bicubic
_UNCLEANED = (
    "The tokenizer of transformers does not clean texts as open_clip's does: HTML (`&amp;`), typographic quotes (`’`), "
    "broken encodings (`Ã¶`), ligatures (`ﬁ`) and wide letters (`Ａ`) give other tokens. "
    "`html.unescape(ftfy.fix_text(text))` before it makes them equal."
)
_UNCUT = (
    "transformers cuts a text to {} tokens only when it is asked to (`truncation=True`); its `pipeline` passes the "
    "wish over and fails on a longer one (transformers 5.24). sentence-transformers 5 and 6 always cut."
)
_ENDED = (
    "A text that is too long loses its end token in the original program; transformers keeps it, so that such texts "
    "have other embeddings."
)


@dataclass(frozen=True)
class Specials:
    """Numbers of the special tokens: what a text begins with and ends with, and what fills rows up."""

    start: int
    end: int
    pad: int


def write_tokenizer(encoder: DualEncoder, folder: Path) -> tuple[Specials, list[str]]:
    """Writes the tokenizer of an encoder as transformers reads it.

    Returns:
        Its special tokens, and sentences for the card: for which texts tokens differ.
    """
    tokenizer: Any = encoder.tokenizer
    cut = _UNCUT.format(encoder.context_length)
    if isinstance(tokenizer, ClipTokenizer):
        ended = [_ENDED] if (tokenizer.settings or {}).get("ending") == "cut" else []
        return _write_clip(tokenizer, folder), [_UNCLEANED, cut, *ended]
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save_pretrained(folder)
        return Specials(int(tokenizer.ids(["a"])[0, 0]), int(tokenizer.end or 0), int(tokenizer.pad or 0)), [cut]
    theirs: Any = getattr(tokenizer, "tokenizer", None)
    if not hasattr(theirs, "save_pretrained") or getattr(tokenizer, "clean_fn", None) is None:
        kind = type(tokenizer).__name__
        raise Unsupported(f"{encoder.name}: transformers has no tokenizer such as its own ({kind}); --to onnx takes it")
    theirs.save_pretrained(folder)
    numbers = (theirs.bos_token_id, theirs.cls_token_id, theirs.eos_token_id)
    start = next(number for number in numbers if number is not None)
    specials = Specials(int(start), int(theirs.eos_token_id), int(theirs.pad_token_id))
    return specials, ["The tokenizer of transformers does not clean texts as open_clip does before it.", cut]


def _write_clip(tokenizer: ClipTokenizer, folder: Path) -> Specials:
    """``tokenizer.json``, and the older files of the same content, with the special words as Hugging Face has them."""
    library: Any = require("tokenizers", "export")
    prepare = library.normalizers
    spaces = prepare.Replace(library.Regex(r"\s+"), " ")
    rules = clip_rules(tokenizer, (START, END), [prepare.NFC(), spaces, prepare.Lowercase()], lower=False)
    (folder / "tokenizer.json").write_text(rules.to_str(pretty=True), encoding="utf-8")
    rules.model.save(str(folder))  # vocab.json and merges.txt
    words = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", words)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, **words}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    write_json(folder / "tokenizer_config.json", config)
    return Specials(tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.eot_token_id)


def write_configs(encoder: DualEncoder, text: Any, specials: Specials, folder: Path) -> None:
    """Writes the configurations of towers and processor; Unsupported where ``CLIPModel`` has none such."""
    visual = encoder.model.visual
    patch, size = visual.conv1.kernel_size, visual.image_size
    if patch[0] != patch[1] or size[0] != size[1] or size[0] % patch[0]:
        raise Unsupported(f"{encoder.name}: CLIPModel wants square patches that fill a square; --to onnx takes it")
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": encoder.context_length,
        "bos_token_id": specials.start,
        "eos_token_id": specials.end,  # the real one: at 2 transformers would pool where the highest token is
        "pad_token_id": specials.pad,
        **_tower(encoder, text.transformer, text.ln_final),
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": size[0],
        "patch_size": patch[0],
        "num_channels": 3,
        **_tower(encoder, visual.transformer, visual.ln_post),
    }
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.embed_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": text_config,
        "vision_config": vision_config,
        "cloob": encoder.objective_config,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", _processor(encoder))


def _tower(encoder: DualEncoder, transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    block = transformer.resblocks[0]
    gelu = block.mlp.gelu
    kind = type(gelu).__name__ + (" tanh" if getattr(gelu, "approximate", "none") == "tanh" else "")
    if kind not in _ACTIVATIONS:
        raise Unsupported(f"{encoder.name}: CLIPModel has no activation {kind}; --to onnx takes it")
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _ACTIVATIONS[kind],
        "layer_norm_eps": norm.eps,
        "projection_dim": encoder.embed_dim,
    }


def _processor(encoder: DualEncoder) -> dict[str, Any]:
    preprocess, side = encoder.preprocess_cfg, encoder.image_size
    mode, interpolation = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        how = f"resize_mode {mode!r}, interpolation {interpolation!r}"
        raise Unsupported(f"{encoder.name}: CLIPImageProcessor cannot prepare pictures by {how}; --to onnx takes it")
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else square,
        "resample": _RESAMPLE[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def write_sentence_transformers(folder: Path) -> None:
    """Writes what ``SentenceTransformer(DIR)`` reads beside transformers' files: CLIP's features as unit rows.

    The modules have the names that every version since 3.4 knows.
    """
    method = {"method_output_name": "pooler_output"}
    modalities = {kind: {"method": f"get_{kind}_features", **method} for kind in ("text", "image")}
    row = "sentence_embedding"
    modules = [("0", "", "CLIPModel"), ("1", "1_Normalize", "Normalize")]
    listed = [
        {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for name, path, kind in modules
    ]
    transformer = {"transformer_task": "feature-extraction", "modality_config": modalities, "module_output_name": row}
    config = {"model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""}}
    write_json(folder / "modules.json", listed)
    write_json(folder / "sentence_bert_config.json", transformer)
    write_json(
        folder / "config_sentence_transformers.json",
        config | {"default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {"module_input_name": row, "module_output_name": row})


def write_json(path: Path, content: object) -> None:
    """Writes a file of JSON."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
