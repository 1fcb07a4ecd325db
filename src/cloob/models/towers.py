"""Two towers by name: every configuration of open_clip, and three tiny ones of ours for 64-pixel work on a CPU.

Ours are open_clip ``model_cfg`` files in ``configs/``; nothing in them needs this package, so that what is trained here
loads in a plain open_clip. How their sizes were chosen: ``benchmarks/towers.py`` at commit fc415074.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from cloob.distributed import resolve_device
from cloob.errors import InputError, is_failure, one_line, require
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.hub import answers, check_hub_model, no_answer, not_there, reachable_hub
from cloob.models.importing import import_open_clip
from cloob.models.names import CONFIGS, TINY_MODELS, check_name
from cloob.models.runs import CONFIG_FILE
from cloob.models.untrusted import check_folder, read_json
from cloob.models.weights.fields import Fields
from cloob.models.weights.folders import file_tensors
from cloob.models.weights.keymap import fill, same_names, surplus
from cloob.models.weights.scales import sigmoid_objective
from cloob.models.weights.tokens import HUB_FILE, check_rules

_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
__all__ = ["TINY_MODELS", "check_words", "create_model", "load_tokenizer", "open_clip", "translated"]


@functools.cache
def open_clip() -> ModuleType:
    """The open_clip module with our configurations registered; imported on the first call, which takes seconds.

    Raises:
        InputError: open_clip is not installed.
    """
    module = import_open_clip()
    module.add_model_config(CONFIGS)
    return module


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
            they are; ``None`` for fresh weights. Beside such a file an ``open_clip_config.json`` with another
            activation, or other pictures, brings a warning.

    Returns:
        The encoder; open_clip's own ``logit_scale`` is frozen in it. Pretrained weights that hold a ``logit_bias``
        (SigLIP) say with it which objective they were trained with.

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
    file = None
    if pretrained is not None:
        file = _pretrained_file(name, pretrained)
        # A tag's weights need the activation that they were trained with; open_clip only warns about another one.
        tag = library.get_pretrained_cfg(name, pretrained)
        if tag and "quick_gelu" in tag:
            config["quick_gelu"] = bool(tag["quick_gelu"])
    generator = torch.random.fork_rng(devices=[]) if seed is not None else nullcontext()
    with generator, translated(f"model {name!r}"), _fetching(name, pretrained):
        tensors = {} if file is None else _own_tensors(file, config)
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        model = library.create_model(
            name,
            pretrained=pretrained if file is None else None,
            quick_gelu=config.get("quick_gelu", False),
            force_image_size=image_size,
            pretrained_text=False,
            **({} if file is None else {"init_logit_bias": config.get("init_logit_bias")}),
        )
        if file is not None:
            plan = same_names(model)
            fill(model, file, tensors, plan, surplus(tensors, plan))
    tokenizer = load_tokenizer(name, config, f"model {name!r}")
    if image_size is not None:
        _check_fixed_size(name, model, image_size)
    trained = {} if pretrained is None else sigmoid_objective(Path(f"{name}/{pretrained}"), model)
    encoder = DualEncoder(name, model, tokenizer, EncoderConfig.open_clip(config), trained)
    if file is not None:
        _warn_of_other_settings(encoder, file.with_name(CONFIG_FILE))
    return encoder.to(place)


def load_tokenizer(source: str, config: dict[str, Any], where: str) -> Any:
    """open_clip's tokeniser of a model.

    Args:
        source: What ``open_clip.get_tokenizer`` takes; of a ``local-dir:`` it reads the tokeniser from that folder
            alone, whatever name the configuration gives.
        config: The ``model_cfg``.
        where: Where that is written, for the error.

    Raises:
        InputError: It is not there or damaged; the line says which tokeniser, and what asks for it.
    """
    text = config["text_cfg"]
    key = next((key for key in ("hf_tokenizer_name", "tokenizer_kwargs") if text.get(key)), None)
    asked = f"text_cfg.{key} asks for the tokenizer {text[key]!r}" if key else "its tokenizer cannot be loaded"
    try:
        with translated(f"{where}: {asked}"):
            if key != "hf_tokenizer_name":
                with reachable_hub(source) if source.startswith("hf-hub:") else nullcontext():
                    return open_clip().get_tokenizer(source)
            require("transformers", "align")
            if source.startswith("local-dir:"):
                files = Path(source.removeprefix("local-dir:"))
                check_folder(files)
            else:
                files = check_hub_model(text[key], f"{where}: {asked}", HUB_FILE)
            try:
                check_rules(files)
            except InputError as error:
                raise InputError(f"{where}: {asked}: {error}") from error
            with reachable_hub(f"{where}: {asked}"):
                tokenizer = open_clip().get_tokenizer(source, trust_remote_code=False)
            check_words(tokenizer.tokenizer)
            return tokenizer
    except InputError as error:
        folder = Path(source.removeprefix("local-dir:")) if source.startswith("local-dir:") else None
        if key != "hf_tokenizer_name" or folder is None or any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
            raise
        raise InputError(
            f"{where}: {asked}, whose files must lie beside it, and there is no tokenizer.json (nor vocab.txt, "
            "vocab.json or *.model); save_pretrained of that tokenizer writes them"
        ) from error


@contextmanager
def _fetching(name: str, tag: str | None) -> Iterator[None]:
    """Readies what open_clip fetches for fresh or pretrained towers: the hub's cache alone where nobody answers.

    Raises:
        InputError: What is needed is not on this machine and cannot be fetched.
    """
    library: Any = open_clip()
    config = library.get_model_config(name)
    weights = library.get_pretrained_cfg(name, tag) if tag else {}
    text_tower = config["text_cfg"].get("hf_model_name")
    if weights.get("hf_hub") or text_tower:
        with reachable_hub(f"{name}/{tag}" if tag else f"its text tower {text_tower!r}"):
            yield
        return
    url = weights.get("url", "")
    if url and not (Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]).is_file() and not answers(url):
        raise not_there(f"{name}/{tag}", no_answer(url))
    yield


def check_words(tokenizer: Any) -> None:
    """Refuses a Hugging Face tokeniser that knows nothing but its special tokens.

    transformers 5 makes such a one, without a warning, where a folder has lost its vocabulary: every text is then the
    same row of unknown words.

    Raises:
        ValueError: It is one.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:  # T5's knows the space as well
        raise ValueError("it knows no word, so that its vocabulary (tokenizer.json) must be missing")


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Keeps open_clip quiet, and turns what it raises into one line.

    open_clip logs through the root logger's module functions, which would also install a handler there.

    Args:
        what: Subject of the line, e.g. ``"model 'RN50'"``.

    Raises:
        InputError: For whatever the library raised.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except InputError:
        raise
    # Whatever it is: hub, pickle, JSON and shape errors have no common class, and the cause stays attached.
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"{what}: {one_line(error)}") from error
    finally:
        root.removeFilter(_nothing)
        root.removeHandler(handler)


def _nothing(record: logging.LogRecord) -> bool:
    """A filter that lets no record pass."""
    return False


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


def _pretrained_file(name: str, pretrained: str) -> Path | None:
    """The file of weights, None for a tag; InputError when there is neither such a tag nor such a file."""
    library = open_clip()
    tags = library.list_pretrained_tags_by_model(name)
    if library.get_pretrained_cfg(name, pretrained):
        return None
    if Path(pretrained).is_file():
        return Path(pretrained)
    known = f"its tags: {', '.join(tags)}" if tags else "open_clip has no weights for it"
    raise InputError(f"unknown pretrained tag {pretrained!r} of {name} (nor a file); {known}")


def _own_tensors(file: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a file of open_clip's; the configuration gets a bias, or loses it, as the file has one."""
    tensors = file_tensors(file)
    prefix = "module."  # of training by several processes
    if all(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    config.pop("init_logit_bias", None)
    if "logit_bias" in tensors:
        config["init_logit_bias"] = 0.0  # replaced by the file's
    return tensors


def _warn_of_other_settings(encoder: DualEncoder, path: Path) -> None:
    """Warns where the configuration beside a file of weights has another activation or prepares pictures otherwise."""
    if not path.is_file():
        return
    beside = Fields(path, {"model_cfg": {}, "preprocess_cfg": {}} | read_json(path))
    own = {key: encoder.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    given = own | dict(beside.inside("preprocess_cfg").values)
    other = [key for key, value in own.items() if json.dumps(value) != json.dumps(given[key])]
    activations = beside.inside("model_cfg").values, encoder.config.settings
    if len({bool(settings.get("quick_gelu", False)) for settings in activations}) == 2:
        other.append("quick_gelu")
    if other:
        said = f"{path}: has another {' and '.join(other)} than {encoder.name}"
        warnings.warn(f"{said}, whose is taken; give the folder {path.parent} to take the file's", stacklevel=3)


def _check_fixed_size(name: str, model: Any, image_size: int) -> None:
    """Raises InputError for a timm tower with positions: open_clip would not read its saved folder back."""
    trunk = getattr(model.visual, "trunk", None)
    trained_size = open_clip().get_model_config(name)["vision_cfg"].get("image_size", 224)
    if hasattr(trunk, "set_input_size") and image_size != trained_size:
        raise InputError(f"image size {image_size} does not suit {name}: its tower takes {trained_size} alone")
