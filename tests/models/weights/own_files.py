"""Small random checkpoints in each family's format, written here, so that no other program's file is needed."""

import torch
from torch import nn

CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2},
}


def drawn(model):
    """A model with random weights, biases and norms too."""
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_transformers_clip(folder, text_act, image_act, max_shard_size="5GB"):
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


def open_clip_towers():
    """open_clip's own module of ``CLIP`` with random weights, biases and norms too."""
    from open_clip import CLIP as Clip  # slow to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = drawn(Clip(**CLIP))
    model.logit_scale.requires_grad_(False)
    return model.eval()


def mljku_state(model):
    """The towers under ml-jku's names, as its training over several GPUs writes them."""
    state = {}
    for key, value in model.state_dict().items():
        own = key if key.startswith("visual.") or key == "logit_scale" else f"transformer.{key}"
        state[f"module.{'logit_inv_tau' if key == 'logit_scale' else own}"] = value
    state["module.logit_scale_hopfield"] = torch.tensor(8.0).log()
    return state
