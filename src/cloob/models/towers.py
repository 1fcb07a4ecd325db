"""Two towers by name: every configuration of open_clip, and three tiny ones of ours
(``configs/``) for 64 pixels.

How their sizes were chosen: ``benchmarks/towers.py`` at commit fc415074.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cloob.distributed import resolve_device
from cloob.errors import InputError, require
from cloob.models.encoder import DualEncoder, EncoderConfig, sigmoid_objective
from cloob.models.importing import (
    check_folder,
    check_hub_model,
    fetch_file,
    import_open_clip,
    open_clip,
    translated,
)
from cloob.models.source import TINY_MODELS, check_name
from cloob.models.weights.containers import trained_file
from cloob.models.weights.keymap import build, fill

__all__ = [
    "TINY_MODELS",
    "TOKENIZER_FILES",
    "check_words",
    "create_model",
    "load_tokenizer",
    "open_clip",
    "translated",
]
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "merges.txt", "*.model")


def create_model(
    name: str,
    *,
    image_size: int | None = None,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    pretrained: str | None = None,
) -> DualEncoder:
    """Two towers with fresh or pretrained weights, in training mode.

    Args:
        name: One of ``cloob train --list``; a ``/`` counts as ``-`` (``ViT-B/32``).
        image_size: Side of the square input in pixels; ``None`` takes the
            configuration's.
        seed: Seed of the fresh weights; the same seed gives the same weights whatever
            the global generator's state, and leaves that state alone. ``None`` draws
            from the global generator.
        device: Where the towers go.
        pretrained: One of open_clip's tags for this name, or a file of weights of
            open_clip's, which have to fit as they are; ``None`` for fresh weights.

    Returns:
        The encoder; open_clip's ``logit_scale`` is frozen in it. It knows its objective
        where the weights have a ``logit_bias`` (SigLIP) or are a checkpoint of our
        open_clip launcher.

    Raises:
        InputError: Unknown name, tag or device; an image size that the tower cannot
            take; weights that cannot be fetched or do not fit.

    Example:
        >>> import cloob
        >>> from PIL import Image
        >>> model = cloob.create_model("tiny-vit", seed=0)
        >>> model.encode_image([Image.new("RGB", (64, 64), "red")]).shape
        torch.Size([1, 256])
    """
    name = check_name(name)
    place = resolve_device(device)
    library = open_clip()
    config = library.get_model_config(name)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    tag = library.get_pretrained_cfg(name, pretrained) if pretrained is not None else {}
    # A tag's weights need the activation that they were trained with; open_clip only
    # warns about another one.
    if tag and "quick_gelu" in tag:
        config["quick_gelu"] = bool(tag["quick_gelu"])
    where = f"{name}/{pretrained}" if tag else f"model {name!r}"
    trained = dict[str, Any]()
    options: dict[str, Any] = {"force_image_size": image_size}
    with torch.random.fork_rng(devices=[], enabled=seed is not None), translated(where):
        if pretrained is not None and not tag:
            if not Path(pretrained).is_file():
                tags = ", ".join(library.list_pretrained_tags_by_model(name)) or "none"
                raise InputError(
                    f"unknown pretrained tag {pretrained!r} of {name} (nor a file); its"
                    f" tags: {tags}"
                )
            config.pop("init_logit_bias", None)
            model, trained = filled_towers(
                config, {}, Path(pretrained), name, where, **options
            )
        else:
            if seed is not None:
                # torch.manual_seed would reseed every GPU as well
                torch.default_generator.manual_seed(seed)
            options |= {
                "force_preprocess_cfg": tag,
                "quick_gelu": config.get("quick_gelu", False),
            }
            model = library.create_model(
                name,
                pretrained=_fetched(tag, where) or pretrained,
                pretrained_text=False,
                **options,
            )
            trained = sigmoid_objective(model) if tag else {}
        if image_size is not None:
            vision = library.get_model_config(name)["vision_cfg"]
            _check_image_size(image_size, name, vision, model.visual)
        tokenizer = load_tokenizer(name, config["text_cfg"], f"model {name!r}")
    return DualEncoder(
        name, model, tokenizer, EncoderConfig.open_clip(config), trained
    ).to(place)


def _fetched(tag: Mapping[str, Any], where: str) -> str | None:
    """The file of a tag's weights, fetched from the hub; None where they are not on it.

    open_clip would wait longer, and ask a closed hub.
    """
    hub, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not hub:
        return None
    file = file or "open_clip_pytorch_model.bin"
    safe = Path(file).stem
    if file == "open_clip_pytorch_model.bin":
        safe = "open_clip_model"
    return str(fetch_file(hub, where, f"{safe}.safetensors", file))


def _check_image_size(
    image_size: int, name: str, vision: Mapping[str, Any], visual: Any
) -> None:
    """Refuses a size that the image tower of a name cannot take."""
    trunk = getattr(visual, "trunk", None)
    own_size = vision.get("image_size", 224)
    if hasattr(trunk, "set_input_size"):
        # positions of timm; open_clip reads back no other number
        fits = image_size == own_size
        right = f"{own_size} alone"
    elif trunk is not None:
        fits = image_size >= 32
        right = "at least 32"
    else:
        # the attention pool of a ModifiedResNet has a position per cell of stride 32
        is_resnet = isinstance(vision.get("layers", 12), list)
        step = 32 if is_resnet else int(vision.get("patch_size", 16))
        fits = image_size % step == 0
        right = f"a multiple of {step}"
    if not fits:
        raise InputError(f"image size {image_size} does not suit {name}: {right} would")


def filled_towers(
    model_cfg: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    weights: Path,
    source: str,
    where: str,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """open_clip's towers with the weights of a file, which have to fit as they are; and
    their training's objective.
    """
    tensors, trained = trained_file(weights)
    # replaced by the file's
    bias = {"init_logit_bias": 0.0} if "logit_bias" in tensors else {}
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if (
        "timm_model_name" in vision
        or "hf_model_name" in text
        or "multimodal_cfg" in model_cfg
    ):
        options |= {
            "load_weights": False,
            "pretrained_text": False,
            "init_logit_bias": None,
        } | bias
        with torch.random.fork_rng(devices=[]):
            model = open_clip().create_model(source, **options)
    else:
        plain = {
            key: value for key, value in model_cfg.items() if key != "init_logit_bias"
        }
        model = build(plain | bias, preprocess_cfg, where)
    fill(model, weights, tensors)
    return model, trained or sigmoid_objective(model)


def load_tokenizer(
    name: str, text_cfg: dict[str, Any], where: str, folder: Path | None = None
) -> Any:
    """open_clip's tokenizer of a model ``name``, or the one in a folder whatever its
    configuration calls it.
    """
    from_hub = text_cfg.get("hf_tokenizer_name")
    if not from_hub:
        return open_clip().get_tokenizer(name)
    needs = f"{where}: text_cfg.hf_tokenizer_name asks for the tokenizer {from_hub!r}"
    with translated(needs):
        require("transformers", "align")
        folder = folder or check_hub_model(from_hub, needs, *TOKENIZER_FILES)
        check_folder(folder)
        tokenizer = import_open_clip(".tokenizer").HFTokenizer(
            str(folder),
            context_length=text_cfg.get("context_length", 77),
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            trust_remote_code=False,
            **(text_cfg.get("tokenizer_kwargs") or {}),
        )
        check_words(tokenizer.tokenizer)
        return tokenizer


def check_words(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer without words, as transformers 5 makes where a
    folder lost its vocabulary.
    """
    # T5's knows the space as well
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:
        raise ValueError(
            "it knows no word, so that its vocabulary (tokenizer.json) must be missing"
        )
