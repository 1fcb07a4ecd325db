"""ml-jku/cloob: torch checkpoints of open_clip's towers under other names, with QuickGELU.

Of the configuration a file holds at most the name. All sizes are in the shapes; the number of heads of the text tower
is not, so it comes from the JSON file beside the checkpoint, or is the 64 wide head of every published model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cloob.errors import InputError, printable
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.untrusted import read_json
from cloob.models.weights.clip_towers import beside_its_name, build, filled, infer_config
from cloob.models.weights.containers import TorchFile
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import same_names
from cloob.models.weights.scales import cloob_objective, scale_of
from cloob.models.weights.tokens import clip_tokenizer

_SPECIALS = ("<start_of_text>", "<end_of_text>")
_BETA = "logit_scale_hopfield"
_PUBLISHED = frozenset({"RN50.json", "RN50x4.json", "RN101.json", "ViT-B-32.json", "ViT-B-16.json"})


def matches(file: TorchFile) -> bool:
    """Whether a torch file holds what ml-jku's training writes."""
    return not file.scripted and isinstance(file.value, dict) and "state_dict" in file.value


def load(file: TorchFile) -> DualEncoder:
    """The encoder; its text tower has the heads that the configuration beside the file says.

    Raises:
        InputError: The file's weights are not those of a model of ml-jku/cloob, or the configuration is another one.
    """
    path = file.path
    tensors = file.tensors(file.value["state_dict"], "state_dict")
    _check_whose(path, tensors)
    tensors = _renamed(path, tensors)
    beta_tensor = tensors.pop(_BETA, None)
    given = _config_beside(path, file.value.get("model_config_file"))
    heads = None if given is None else Fields(given[0], given[1]).integer("transformer_heads", most=4096)
    config = infer_config(path, tensors, heads)
    if given is not None:
        _check_config(given[0], given[1], config)
    model = build(config, {}, str(path))
    model = filled(model, path, tensors, same_names(model))
    inv_tau = scale_of(path, "logit_inv_tau", model.logit_scale)
    beta = None
    if beta_tensor is not None:
        if beta_tensor.shape != () or not beta_tensor.dtype.is_floating_point:
            raise InputError(
                f"{path}: {_BETA} has shape {tuple(beta_tensor.shape)} and {beta_tensor.dtype}; a number is wanted"
            )
        beta = scale_of(path, _BETA, beta_tensor)
    text = config["text_cfg"]
    tokenizer = clip_tokenizer(path, text["vocab_size"], text["context_length"], _SPECIALS, "cut")
    objective_config = cloob_objective(inv_tau, beta, "paper")
    return DualEncoder(path.stem, model, tokenizer, EncoderConfig.open_clip(config), objective_config)


def _check_whose(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses what open_clip's training writes: the same layout with open_clip's own names."""
    names = {key.removeprefix("module.") for key in tensors}
    if "logit_scale" in names and "logit_inv_tau" not in names and any(name.startswith("visual.") for name in names):
        raise InputError(
            f"{path}: a checkpoint of open_clip's training, which does not say its towers; give {beside_its_name(path)}"
        )


def _renamed(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by open_clip's names."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.")
        name = "logit_scale" if name == "logit_inv_tau" else name.removeprefix("transformer.")
        if name in renamed:
            raise InputError(f"{path}: two values for {printable(key.removeprefix('module.'))!r}")
        renamed[name] = tensor
    return renamed


def _config_beside(path: Path, named: Any) -> tuple[Path, dict[str, Any]] | None:
    """The JSON file that says the sizes: the named one, or the one beside the checkpoint that looks like one."""
    if named is not None:
        if not isinstance(named, str) or named != Path(named).name or named in ("", ".", "..") or "\\" in named:
            found = repr(printable(named)) if isinstance(named, str) else f"a {type(named).__name__}"
            raise InputError(f"{path}: model_config_file is {found}; the name of a file beside it is wanted")
        beside = path.parent / named
        if beside.is_file():
            return beside, read_json(beside)
        if named in _PUBLISHED:
            return None
        raise InputError(
            f"{path}: its configuration {printable(named)} must lie beside it (the heads are not in the weights)"
        )
    config_file = path.with_suffix(".json")
    if config_file.is_file():
        return config_file, read_json(config_file)
    candidates = []
    for beside in sorted(path.parent.glob("*.json")):
        values = _readable(beside)
        if values is not None and {"transformer_heads", "transformer_width"} <= values.keys():
            candidates.append((beside, values))
    if len(candidates) > 1:
        names = ", ".join(beside.name for beside, _ in candidates)
        raise InputError(f"{path}: {names} lie beside it; the one that is its own must be called {config_file.name}")
    return candidates[0] if candidates else None


def _readable(path: Path) -> dict[str, Any] | None:
    """A JSON object beside the file; None for what is none, as another program's file may be."""
    try:
        content: dict[str, Any] = read_json(path)
    except InputError:
        return None
    return content


def _check_config(path: Path, given: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuses a configuration whose sizes are not those of the weights."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    sizes = {
        "embed_dim": config["embed_dim"],
        "image_resolution": vision["image_size"],
        "vision_layers": vision["layers"],
        "vision_width": vision["width"],
        "vision_patch_size": vision["patch_size"],
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "transformer_width": text["width"],
        "transformer_layers": text["layers"],
    }
    for key, size in sizes.items():
        if key in given and given[key] != size:
            stated = printable(repr(given[key]))[:60]
            raise InputError(f"{path}: {key} is {stated}, but the weights are of a model with {size}")
