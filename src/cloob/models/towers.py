"""Two towers by name: every configuration of open_clip, and three tiny ones of ours for 64-pixel work on a CPU.

Ours are open_clip ``model_cfg`` files in ``configs/``; nothing in them needs this package, so that what is trained here
loads in a plain open_clip. How their sizes were chosen: ``benchmarks/towers.py`` at commit fc415074.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cloob.distributed import resolve_device
from cloob.errors import InputError, require
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.hub import check_hub_model, fetch_file
from cloob.models.importing import import_open_clip, open_clip, translated
from cloob.models.source import TINY_MODELS, check_name
from cloob.models.untrusted import check_folder
from cloob.models.weights.folders import trained_file
from cloob.models.weights.keymap import fill, same_names, surplus
from cloob.models.weights.scales import sigmoid_objective
from cloob.models.weights.tokens import check_rules

__all__ = ["TINY_MODELS", "TOKENIZER_FILES", "check_words", "create_model", "load_tokenizer", "open_clip", "translated"]
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
        name: One of ``cloob models``; a ``/`` counts as ``-`` (``ViT-B/32``).
        image_size: Side of the square input in pixels; ``None`` takes the configuration's.
        seed: Seed of the fresh weights; the same seed gives the same weights whatever the global generator's state,
            and leaves that state alone. ``None`` draws from the global generator.
        device: Where the towers go.
        pretrained: One of open_clip's tags for this name, or a file of weights of open_clip's, which have to fit as
            they are; ``None`` for fresh weights.

    Returns:
        The encoder; open_clip's own ``logit_scale`` is frozen in it. Pretrained weights that hold a ``logit_bias``
        (SigLIP) say with it which objective they were trained with; a checkpoint of our open_clip launcher says it.

    Raises:
        InputError: Unknown name, tag or device; an image size that the tower cannot take; weights that cannot be
            fetched or do not fit.

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
        _check_image_size(name, config, image_size)
        config["vision_cfg"]["image_size"] = image_size
    tag = library.get_pretrained_cfg(name, pretrained) if pretrained is not None else {}
    # A tag's weights need the activation that they were trained with; open_clip only warns about another one.
    if tag and "quick_gelu" in tag:
        config["quick_gelu"] = bool(tag["quick_gelu"])
    tensors: dict[str, Tensor] = {}
    bias: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    if pretrained is not None and not tag:
        tensors, trained = trained_file(_weights_file(name, pretrained))
        config.pop("init_logit_bias", None)
        bias = {"init_logit_bias": 0.0 if "logit_bias" in tensors else None}  # replaced by the file's
        config |= {key: value for key, value in bias.items() if value is not None}
    generator = torch.random.fork_rng(devices=[]) if seed is not None else nullcontext()
    with generator, translated(f"{name}/{pretrained}" if tag else f"model {name!r}"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        model = library.create_model(
            name,
            pretrained=_tag_weights(f"{name}/{pretrained}", str(pretrained), tag) if tag else None,
            force_preprocess_cfg=tag,
            quick_gelu=config.get("quick_gelu", False),
            force_image_size=image_size,
            pretrained_text=False,
            **bias,
        )
        if pretrained is not None and not tag:
            plan = same_names(model)
            fill(model, Path(pretrained), tensors, plan, surplus(tensors, plan))
    if image_size is not None:
        _check_fixed_size(name, model, image_size)
    tokenizer = load_tokenizer(name, config["text_cfg"], f"model {name!r}")
    if pretrained is not None and not trained:
        trained = sigmoid_objective(Path(f"{name}/{pretrained}"), model)
    return DualEncoder(name, model, tokenizer, EncoderConfig.open_clip(config), trained).to(place)


def load_tokenizer(name: str, text_cfg: dict[str, Any], where: str, folder: Path | None = None) -> Any:
    """open_clip's tokenizer of a model ``name``, or the one in a folder whatever its configuration calls it."""
    from_hub = text_cfg.get("hf_tokenizer_name")
    if not from_hub:
        with translated(f"{where}: its tokenizer cannot be loaded"):
            return open_clip().get_tokenizer(name)
    asked = f"{where}: text_cfg.hf_tokenizer_name asks for the tokenizer {from_hub!r}"
    with translated(asked):
        require("transformers", "align")
        if folder is None:
            folder = check_hub_model(from_hub, asked, *TOKENIZER_FILES)
        check_folder(folder)
        if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
            raise InputError(f"{asked}, and there is no tokenizer.json (nor vocab.txt, vocab.json or *.model)")
        try:
            check_rules(folder)
        except InputError as error:
            raise InputError(f"{asked}: {error}") from error
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
    """Raises ValueError for a Hugging Face tokenizer that knows nothing but its special tokens.

    transformers 5 makes such a one, without a warning, where a folder has lost its vocabulary: every text is then the
    same row of unknown words.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:  # T5's knows the space as well
        raise ValueError("it knows no word, so that its vocabulary (tokenizer.json) must be missing")


def _check_image_size(name: str, config: dict[str, Any], image_size: int) -> None:
    """Raises InputError when the image tower cannot take the size."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        step, least = 1, 32
    elif isinstance(vision.get("layers", 12), list):
        step = least = 32  # the attention pool of a ModifiedResNet has a position for each cell of stride 32
    else:
        step = least = int(vision.get("patch_size", 16))
    if image_size < least or image_size % step:
        right = f"a multiple of {step}" if step > 1 else f"at least {least}"
        raise InputError(f"image size {image_size} does not suit {name}: {right} would")


def _check_fixed_size(name: str, model: Any, image_size: int) -> None:
    """Raises InputError for a timm tower with positions: open_clip would not read its saved folder back."""
    trunk = getattr(model.visual, "trunk", None)
    trained_size = open_clip().get_model_config(name)["vision_cfg"].get("image_size", 224)
    if hasattr(trunk, "set_input_size") and image_size != trained_size:
        raise InputError(f"image size {image_size} does not suit {name}: its tower takes {trained_size} alone")


def _tag_weights(where: str, tag: str, known: dict[str, Any]) -> str:
    """What ``open_clip.create_model`` takes as ``pretrained``: the file of a tag from the hub, else the tag itself."""
    name, _, file = str(known.get("hf_hub", "")).rpartition("/")
    if not name:
        return tag
    file = file or "open_clip_pytorch_model.bin"
    safe = "open_clip_model" if file == "open_clip_pytorch_model.bin" else Path(file).stem
    return str(fetch_file(name, where, f"{safe}.safetensors", file))


def _weights_file(name: str, pretrained: str) -> Path:
    """The file of weights; InputError when there is neither such a tag nor such a file."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = open_clip().list_pretrained_tags_by_model(name)
    known = f"its tags: {', '.join(tags)}" if tags else "open_clip has no weights for it"
    raise InputError(f"unknown pretrained tag {pretrained!r} of {name} (nor a file); {known}")
