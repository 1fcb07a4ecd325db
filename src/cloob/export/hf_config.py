"""The configuration files of transformers' ``CLIPModel`` and its processor, and those of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from cloob.export.exported import Unsupported
from cloob.export.hf_tokenizer import Specials
from cloob.models.encoder import DualEncoder

_RESAMPLE = {"bilinear": 2, "bicubic": 3, "random": 3}  # PIL's numbers; open_clip tests "random" with bicubic
_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"


def clip_config(encoder: DualEncoder, text: Any, specials: Specials) -> dict[str, Any]:
    """``config.json`` of a ``CLIPModel``, for a ViT of open_clip's and a module with a causal text tower's parts.

    Raises:
        Unsupported: A tower has an activation that ``CLIPModel`` has not, or patches that are not square.
    """
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
        **_tower(encoder.name, text.transformer, text.ln_final),
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": size[0],
        "patch_size": patch[0],
        "num_channels": 3,
        **_tower(encoder.name, visual.transformer, visual.ln_post),
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": encoder.embed_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": text_config | {"projection_dim": encoder.embed_dim},
        "vision_config": vision_config | {"projection_dim": encoder.embed_dim},
    }


def _tower(name: str, transformer: Any, norm: nn.LayerNorm) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(name, block.mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def _activation(name: str, module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    kind = type(module).__name__
    raise Unsupported(f"{name}: CLIPModel has no activation {kind}; --to onnx takes it")


def processor_config(encoder: DualEncoder) -> dict[str, Any]:
    """``preprocessor_config.json`` of a ``CLIPImageProcessor``.

    Raises:
        Unsupported: Pictures are resized in a way that it does not have.
    """
    preprocess, side = encoder.preprocess_cfg, encoder.image_size
    mode = preprocess.get("resize_mode") or "shortest"
    resample = _RESAMPLE.get(preprocess.get("interpolation") or "bicubic")
    if mode not in ("shortest", "squash") or resample is None:
        how = f"resize_mode {mode!r}, interpolation {preprocess.get('interpolation')!r}"
        raise Unsupported(f"{encoder.name}: CLIPImageProcessor cannot prepare pictures by {how}; --to onnx takes it")
    square = {"height": side, "width": side}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else square,
        "resample": resample,
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def write_sentence_transformers(folder: Path) -> None:
    """Writes what ``SentenceTransformer(DIR)`` reads beside transformers' files: CLIP's features as unit rows."""
    method = {"method_output_name": "pooler_output"}
    modalities = {kind: {"method": f"get_{kind}_features", **method} for kind in ("text", "image")}
    modules = [("0", "", _TRANSFORMER), ("1", "1_Normalize", _NORMALIZE)]
    row = "sentence_embedding"
    write_json(
        folder / "modules.json",
        [{"idx": int(name), "name": name, "path": path, "type": kind} for name, path, kind in modules],
    )
    write_json(
        folder / "sentence_bert_config.json",
        {"transformer_task": "feature-extraction", "modality_config": modalities, "module_output_name": row},
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {"module_input_name": row, "module_output_name": row})


def write_json(path: Path, content: object) -> None:
    """Writes a file of JSON."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
