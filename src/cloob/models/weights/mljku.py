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
from cloob.models.untrusted import leaves, read_json
from cloob.models.weights.clip_towers import beside_its_name, build, filled, infer_config
from cloob.models.weights.containers import TorchFile
from cloob.models.weights.fields import Fields
from cloob.models.weights.keymap import same_names
from cloob.models.weights.scales import cloob_objective, scale_of
from cloob.models.weights.tokens import clip_tokenizer

_PUBLISHED = frozenset({"RN50.json", "RN50x4.json", "RN101.json", "ViT-B-32.json", "ViT-B-16.json"})


def matches(file: TorchFile) -> bool:
    """Whether a torch file holds what ml-jku's training writes."""
    return not file.scripted and isinstance(file.value, dict) and "state_dict" in file.value


def load(file: TorchFile) -> DualEncoder:
    """The encoder of a checkpoint; InputError where its weights are not those of a model of ml-jku/cloob."""
    path = file.path
    tensors = _renamed(path, file.tensors(file.value["state_dict"], "state_dict"))
    stored = tensors.pop("logit_scale_hopfield", None)
    config = infer_config(path, tensors, _text_heads(path, file.value.get("model_config_file")))
    model = build(config, {}, str(path))
    model = filled(model, path, tensors, same_names(model))
    inv_tau = scale_of(path, "logit_inv_tau", model.logit_scale)
    beta = None if stored is None else scale_of(path, "logit_scale_hopfield", stored)
    text = config["text_cfg"]
    specials = "<start_of_text>", "<end_of_text>"
    tokenizer = clip_tokenizer(path, text["vocab_size"], text["context_length"], specials, "cut")
    objective = cloob_objective(inv_tau, beta, "paper")
    return DualEncoder(path.stem, model, tokenizer, EncoderConfig.open_clip(config), objective)


def _renamed(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by open_clip's names."""
    names = {key: key.removeprefix("module.") for key in tensors}  # of training over several GPUs
    if "logit_scale" in names.values() and "logit_inv_tau" not in names.values():
        raise InputError(
            f"{path}: a checkpoint of open_clip's training, which does not say its towers; give {beside_its_name(path)}"
        )
    renamed: dict[str, Tensor] = {}
    for key, name in names.items():
        ours = "logit_scale" if name == "logit_inv_tau" else name.removeprefix("transformer.")
        if ours in renamed:
            raise InputError(f"{path}: two values for {printable(name)!r}")
        renamed[ours] = tensors[key]
    return renamed


def _text_heads(path: Path, named: Any) -> int | None:
    """The heads of the text tower by the JSON file that the checkpoint names, or by that of its name or beside it."""
    if named is not None and (not isinstance(named, str) or leaves(named) or Path(named).name != named):
        wanted = "the name of a file beside it is wanted"
        raise InputError(f"{path}: model_config_file is {printable(repr(named))}; {wanted}")
    own = path.with_suffix(".json") if named is None else path.parent / named
    files = [own] if own.is_file() else []
    if named is None and not files:
        files = [file for file in path.parent.glob("*.json") if _names_heads(file)]
    if len(files) > 1:
        names = ", ".join(sorted(file.name for file in files))
        raise InputError(f"{path}: {names} lie beside it; the one that is its own must be called {own.name}")
    if files:
        return Fields(files[0], read_json(files[0])).integer("transformer_heads")
    if named is None or named in _PUBLISHED:
        return None
    raise InputError(f"{path}: its configuration {named!r} must lie beside it (the heads are not in the weights)")


def _names_heads(file: Path) -> bool:
    try:
        return "transformer_heads" in read_json(file)
    except InputError:  # of another program
        return False
