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

    config = {
        "embed_dim": 12,
        "vision_cfg": VISION,
        "text_cfg": TEXT | (text or {}),
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {key: value for key, value in config.items() if key != "custom_text"}
        model = (
            open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        )(**options)
        state = {
            key: value + 0.3 * torch.randn_like(value)
            if value.is_floating_point() and value.ndim == 1
            else value
            for key, value in model.state_dict().items()
        }
    folder.mkdir(parents=True)
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        folder / "open_clip_model.safetensors",
    )
    content = {
        "model_cfg": config,
        "preprocess_cfg": {"interpolation": "bicubic"},
        "name": "small",
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if (
        "init_logit_bias" not in config
    ):  # a model of SigLIP's says with it what it was trained with
        (folder / "objective.json").write_text(json.dumps(OBJECTIVE))
    return folder


def same_rows(one, other):
    """Two models give the same rows of texts and of a picture."""
    texts = [
        "a dog",
        "",
        "Two  RED hearts!",
        "it's 3 o'clock",
        "naïve 日本語",
        "long " * 40,
    ]
    picture = [Image.effect_noise((90, 44), 80).convert("RGB")]
    torch.testing.assert_close(
        one.encode_text(texts), other.encode_text(texts), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        one.encode_image(picture), other.encode_image(picture), atol=1e-6, rtol=0
    )
