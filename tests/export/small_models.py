"""Small models in open_clip's format, with CLIP's vocabulary unless it is said
otherwise.
"""

import json

import torch
from PIL import Image

OBJECTIVE = {
    "contrast": "infoloob",
    "hopfield": True,
    "inv_tau": 25.0,
    "beta": 9.0,
    "scale": "paper",
}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8}
RESNET = {
    "image_size": 32,
    "layers": [1, 1, 1, 1],
    "width": 8,
    "head_width": 16,
    "patch_size": None,
}


def write_model(folder, *, text=None, **changes):
    """A model folder with random weights, those of norms and biases too."""
    import open_clip
    from safetensors.torch import save_file

    sizes = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT | (text or {})}
    config = sizes | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config)
        state = model.state_dict()
        for key, value in state.items():
            if value.is_floating_point() and value.ndim == 1:
                state[key] = value + 0.3 * torch.randn_like(value)
    folder.mkdir(parents=True)
    weights = {key: value.contiguous() for key, value in state.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"interpolation": "bicubic"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess, "name": "small"}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    # a model of SigLIP's says with its bias what it was trained with
    if "init_logit_bias" not in config:
        (folder / "objective.json").write_text(json.dumps(OBJECTIVE))
    return folder


TEXTS = [
    "a dog",
    "",
    "Two  RED hearts!",
    "it's 3 o'clock",
    "naïve 日本語",
    "long " * 40,
]


def same_rows(one, other):
    """Two models give the same rows of texts and of a picture."""
    picture = [Image.effect_noise((90, 44), 80).convert("RGB")]
    for kind, items in (("encode_text", TEXTS), ("encode_image", picture)):
        found = getattr(one, kind)(items)
        expected = getattr(other, kind)(items)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
