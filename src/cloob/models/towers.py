"""Two towers by name: every configuration of open_clip, and three tiny ones of ours
(``configs/``) for 64 pixels.

How their sizes were chosen: ``benchmarks/towers.py`` at commit fc415074.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from cloob.models.runs import HUB_WEIGHTS_FILES
from cloob.models.settings import ModelConfig, Pixels, TextConfig, VisionConfig
from cloob.models.source import check_name
from cloob.models.weights.containers import trained_file
from cloob.models.weights.keymap import build_open_clip, fill

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
        name: One of ``cloob train --list``.
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
    check_name(name)
    target = resolve_device(device)
    library = open_clip()
    config = library.get_model_config(name)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    tag = library.get_pretrained_cfg(name, pretrained) if pretrained else {}
    where = f"{name}/{pretrained}" if tag else f"model {name!r}"
    # Only fresh weights without a seed move the global generator.
    keeps_generator = seed is not None or pretrained is not None
    with torch.random.fork_rng(devices=[], enabled=keeps_generator), translated(where):
        if tag:
            towers = _pretrained_towers(name, config, tag, str(pretrained), image_size)
        elif pretrained is not None:
            towers = _towers_of_file(name, config, Path(pretrained), image_size)
        else:
            towers = _fresh_towers(name, config, seed, image_size)
        if image_size is not None:
            vision = library.get_model_config(name)["vision_cfg"]
            _check_image_size(image_size, name, vision, towers.model.visual)
        tokenizer = load_tokenizer(name, config["text_cfg"], f"model {name!r}")
    built = EncoderConfig.open_clip(config)
    encoder = DualEncoder(name, towers.model, tokenizer, built, towers.objective)
    encoder.weights_file = towers.weights
    return encoder.to(target)


@dataclass(frozen=True)
class BuiltTowers:
    """open_clip's module, the objective that its weights were trained with, and their
    file.
    """

    model: Any
    objective: dict[str, object]
    weights: Path | None = None


def _fresh_towers(
    name: str, config: ModelConfig, seed: int | None, image_size: int | None
) -> BuiltTowers:
    if seed is not None:
        # torch.manual_seed would reseed every GPU as well
        torch.default_generator.manual_seed(seed)
    return BuiltTowers(_create(name, config, force_image_size=image_size), {})


def _pretrained_towers(
    name: str,
    config: ModelConfig,
    tag: Mapping[str, object],
    pretrained: str,
    image_size: int | None,
) -> BuiltTowers:
    """The towers of one of open_clip's tags."""
    # A tag's weights need the activation that they were trained with; open_clip only
    # warns about another one.
    if "quick_gelu" in tag:
        config["quick_gelu"] = bool(tag["quick_gelu"])
    file = _fetched(tag, f"{name}/{pretrained}")
    model = _create(
        name,
        config,
        pretrained=str(file or pretrained),
        force_preprocess_cfg=tag,
        force_image_size=image_size,
    )
    return BuiltTowers(model, sigmoid_objective(model), file)


def _create(name: str, config: ModelConfig, **options: Any) -> Any:
    return open_clip().create_model(
        name,
        quick_gelu=config.get("quick_gelu", False),
        pretrained_text=False,
        **options,
    )


def _towers_of_file(
    name: str, config: ModelConfig, weights: Path, image_size: int | None
) -> BuiltTowers:
    """The towers of a name with a file's weights."""
    if not weights.is_file():
        tags = ", ".join(open_clip().list_pretrained_tags_by_model(name)) or "none"
        raise InputError(
            f"unknown pretrained tag {str(weights)!r} of {name} (nor a file); its tags:"
            f" {tags}"
        )
    return filled_towers(config, {}, weights, name, f"model {name!r}", image_size)


def _fetched(tag: Mapping[str, object], where: str) -> Path | None:
    """The file of a tag's weights, fetched from the hub; None where they are not on it.

    open_clip would wait longer, and ask a closed hub.
    """
    hub, _, file = str(tag.get("hf_hub", "")).rpartition("/")
    if not hub:
        return None
    if file:
        return fetch_file(hub, where, f"{Path(file).stem}.safetensors", file)
    return fetch_file(hub, where, *HUB_WEIGHTS_FILES[::2])


def _check_image_size(
    image_size: int, name: str, vision: VisionConfig, visual: nn.Module
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
        step = 32 if is_resnet else int(vision.get("patch_size") or 16)
        fits = image_size % step == 0
        right = f"a multiple of {step}"
    if not fits:
        raise InputError(f"image size {image_size} does not suit {name}: {right} would")


def filled_towers(
    model_cfg: ModelConfig,
    preprocess_cfg: Pixels,
    weights: Path,
    source: str,
    where: str,
    image_size: int | None = None,
) -> BuiltTowers:
    """open_clip's towers with the weights of a file, which have to fit as they are."""
    tensors, trained = trained_file(weights)
    # replaced by the file's
    bias = 0.0 if "logit_bias" in tensors else None
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    of_other_libraries = "timm_model_name" in vision or "hf_model_name" in text
    if of_other_libraries or "multimodal_cfg" in model_cfg:
        with torch.random.fork_rng(devices=[]):
            model = open_clip().create_model(
                source,
                load_weights=False,
                pretrained_text=False,
                init_logit_bias=bias,
                force_image_size=image_size,
            )
    else:
        model = build_open_clip(
            model_cfg | {"init_logit_bias": bias}, preprocess_cfg, where
        )
    fill(model, weights, tensors)
    return BuiltTowers(model, trained or sigmoid_objective(model), weights)


def load_tokenizer(
    name: str, text_cfg: TextConfig, where: str, folder: Path | None = None
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
