"""Small random checkpoints in each family's format, written here, so that no other program's file is needed."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2},
}
CROWSONKB = {
    "d_embed": 16,
    "inv_tau": 30.0,
    "scale_hopfield": 15.0,
    "image_encoder": {
        "type": "ViT",
        "image_size": 32,
        "input_channels": 3,
        "normalize": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        "patch_size": 16,
        "n_layers": 2,
        "d_model": 24,
        "n_heads": 3,
    },
    "text_encoder": {
        "type": "transformer",
        "tokenizer": "clip",
        "text_size": 77,
        "vocab_size": 40,
        "n_layers": 2,
        "d_model": 16,
        "n_heads": 2,
    },
}
RINNA = {
    "model_type": "cloob",
    "projection_dim": 16,
    "init_inv_tau": 30.0,
    "scale_hopfield": 15.0,
    "text_config": {
        "model_type": "roberta",
        "vocab_size": 40,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
        "type_vocab_size": 2,
        "pad_token_id": 3,
        "layer_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "vit",
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 16,
    },
}


def drawn(model: Any) -> Any:
    """A model with random weights, biases and norms too."""
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_transformers_clip(folder: Path, text_act: str, image_act: str, max_shard_size: str = "5GB") -> Any:
    """A folder of transformers' without an image processor; returns its ``CLIPModel``."""
    import transformers

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": 40, "max_position_embeddings": 77, "eos_token_id": 39, "bos_token_id": 38}
    config = transformers.CLIPConfig(
        text_config=tower | special | {"hidden_act": text_act},
        vision_config=tower | {"image_size": 32, "patch_size": 16, "hidden_act": image_act},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = drawn(transformers.CLIPModel(config).eval())
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def open_clip_towers(seed: int = 0, **changes: Any) -> nn.Module:
    """open_clip's own module of ``CLIP`` with random weights, biases and norms too."""
    from open_clip import CLIP as Clip  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = drawn(Clip(**(CLIP | changes)))
    model.logit_scale.requires_grad_(False)
    return model.eval()


def mljku_state(model: nn.Module) -> dict[str, Tensor]:
    """The towers under ml-jku's names, as its training over several GPUs writes them."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        own = key if key.startswith("visual.") or key == "logit_scale" else f"transformer.{key}"
        state[f"module.{'logit_inv_tau' if key == 'logit_scale' else own}"] = value
    state["module.logit_scale_hopfield"] = torch.tensor(8.0).log()
    return state


def scripted(state: dict[str, Tensor], path: Path) -> None:
    """A TorchScript archive whose modules form the tree that the keys describe."""
    root = nn.Module()
    for key, value in state.items():
        module = root
        *parts, name = key.split(".")
        for part in parts:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(value.clone()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(root), str(path))


def crowsonkb_arrays(seed: int = 0, vocabulary: int = 40) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """haiku's parameters of ``CROWSONKB`` by ``module path/name``."""
    image, text, embed = CROWSONKB["image_encoder"], CROWSONKB["text_encoder"], CROWSONKB["d_embed"]
    shapes: dict[str, tuple[int, ...]] = {
        "vi_t_image_encoder/embed/w": (16, 16, 3, 24),
        "vi_t_image_encoder/class_embed": (24,),
        "vi_t_image_encoder/pos_embed/w": (5, 24),
        "text_encoder/embed/embeddings": (vocabulary, 16),
        "text_encoder/pos_embed/w": (77, 16),
    }
    for tower, config, width in (("vi_t_image_encoder", image, 24), ("text_encoder", text, embed)):
        shapes |= {f"{tower}/proj/w": (width, embed), f"{tower}/proj/b": (embed,)}
        for i in range(config["n_layers"]):
            layer = f"{tower}/layer_{i}"
            linears = {
                f"self_attention/multi_head_attention/{n}": (width, width) for n in ("query", "key", "value", "linear")
            }
            linears |= {"feed_forward/linear_0": (width, 4 * width), "feed_forward/linear_1": (4 * width, width)}
            for name, (into, out) in linears.items():
                shapes |= {f"{layer}/{name}/w": (into, out), f"{layer}/{name}/b": (out,)}
            for name in ("self_attention", "feed_forward"):
                shapes |= {f"{layer}/{name}/layer_norm/{part}": (width,) for part in ("scale", "offset")}
    source = np.random.default_rng(seed)
    return {key: source.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}


def write_crowsonkb(folder: Path, arrays: dict[str, Any], protocol: int = 4) -> Path:
    """The pickle that the training writes, its configuration beside it."""
    towers: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for key, value in arrays.items():
        module, _, name = key.rpartition("/")
        towers[0 if module.startswith("vi_t") else 1].setdefault(module, {})[name] = value
    (folder / "config.json").write_text(json.dumps(CROWSONKB))
    path = folder / "towers.pkl"
    path.write_bytes(pickle.dumps({"params": towers, "epoch": 3}, protocol))
    return path


def rinna_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights of ``RINNA`` under Hugging Face's names of 2022."""
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        f"{text}.word_embeddings.weight": (40, 24),
        f"{text}.position_embeddings.weight": (80, 24),
        f"{text}.token_type_embeddings.weight": (2, 24),
        f"{text}.LayerNorm.weight": (24,),
        f"{text}.LayerNorm.bias": (24,),
        f"{vision}.cls_token": (1, 1, 24),
        f"{vision}.position_embeddings": (1, 5, 24),
        f"{vision}.patch_embeddings.projection.weight": (24, 3, 16, 16),
        f"{vision}.patch_embeddings.projection.bias": (24,),
        "vision_model.layernorm.weight": (24,),
        "vision_model.layernorm.bias": (24,),
        "text_projection.weight": (16, 24),
        "visual_projection.weight": (16, 24),
    }
    sides = (
        ("text_model", "self", ("attention.output.LayerNorm", "output.LayerNorm")),
        ("vision_model", "attention", ("layernorm_before", "layernorm_after")),
    )
    for tower, inner, norms in sides:
        for i in range(2):
            layer = f"{tower}.encoder.layer.{i}"
            linears = {f"attention.{inner}.{name}": (24, 24) for name in ("query", "key", "value")}
            linears |= {"attention.output.dense": (24, 24), "intermediate.dense": (48, 24), "output.dense": (24, 48)}
            for name, shape in linears.items():
                shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
            for name in norms:
                shapes |= {f"{layer}.{name}.{part}": (24,) for part in ("weight", "bias")}
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=source) * 0.3 for key, shape in shapes.items()}
