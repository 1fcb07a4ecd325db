"""Training that starts from trained towers: one of them or both, what is frozen, and averaging with the start.

Depth of a parameter in its tower: 0 for what first touches pixels or tokens (stem, patch and token embeddings,
positions), 1, 2, … for the blocks in their order, and one more than the last block for what comes after them (final
norm, attention pool, projection).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.files import whole_folder
from cloob.models.encoder import DualEncoder
from cloob.models.fingerprint import fingerprint
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import AVERAGED_FOLDER
from cloob.models.source import known_models
from cloob.models.towers import create_model
from cloob.training.config import TrainConfig

Tower = Literal["image", "text"]
# `resblocks.3`, `encoder.layer.3`, `layer4.2`, `h.3`, `blocks.2.0`, `stages.2.blocks.0`: a block, or one in a stage.
_BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks|layers?|stages?|h)\.?(\d+)(?![^.])(?:\.(?:blocks\.|layers\.)?(\d+)(?![^.]))?"
)
_TOP = re.compile(r"head|attn_?pool|pooler|(.*_)?proj(ection)?")
_BOTTOM = re.compile(r".*embed.*|stem|conv_stem|(cls|dist|reg|mask)_token|cls_emb")


class Depth(NamedTuple):
    """Where a parameter lies in its tower."""

    depth: int  # 0 for the input, ``top`` for what comes after the last block
    top: int  # number of blocks plus one


def tower_of(name: str) -> Tower:
    """The tower of a parameter of a ``DualEncoder``, by its name; what wraps the encoder does not count."""
    parts = [part for part in name.split(".") if part not in ("module", "model", "encoder", "_orig_mod")]
    return "image" if parts and parts[0] == "visual" else "text"


def layer_depths(names: Iterable[str]) -> dict[str, Depth]:
    """The depth of every parameter of two towers, from the names alone, in the order of ``named_parameters()``.

    Known are the stacks of open_clip's vision and text transformers and ModifiedResNets, of timm's towers (ViT,
    ConvNeXt, EfficientNet, ResNet, Swin) and of Hugging Face's text towers. Stages that hold blocks count each block. A
    tower without a stack has two depths, 0 and 1. What is in no stack and comes before the tower's first block belongs
    to the input.
    """
    ordered = list(names)
    depths: dict[str, Depth] = {}
    for tower in ("image", "text"):
        names = [name for name in ordered if tower_of(name) == tower]
        blocks = {name: _block(name) for name in names}
        known = sorted({block for block in blocks.values() if block is not None})
        place = {block: i + 1 for i, block in enumerate(known)}
        top, begun = len(known) + 1, False
        for name, block in blocks.items():
            begun = begun or block is not None
            outside = 0 if _is_input(name, begun) else top
            depths[name] = Depth(outside if block is None else place[block], top)
    return depths


def _block(name: str) -> tuple[int, ...] | None:
    """The numbers of the block that a name lies in: (3,) or, in a stage, (2, 0); None outside of all stacks."""
    found = _BLOCK.search(name)
    return tuple(int(number) for number in found.groups() if number is not None) if found else None


def _is_input(name: str, begun: bool) -> bool:
    """Whether a parameter outside of all blocks comes before them."""
    parts = name.split(".")
    if any(part in ("head", "attnpool", "attn_pool", "pooler") for part in parts):
        return False
    if any(_BOTTOM.fullmatch(part) for part in parts):
        return True
    return not begun and not any(_TOP.fullmatch(part) for part in parts)


def freeze(encoder: DualEncoder, tower: str, unlocked: int = 0) -> None:
    """Takes a tower out of the training: no gradients, no optimiser state; ``keep_frozen`` does the rest.

    The topmost ``unlocked`` depths learn all the same; 1: final norm and projection.
    """
    if tower == "none":
        return
    named = dict(encoder.named_parameters())
    depths = {name: depth for name, depth in layer_depths(named).items() if tower_of(name) == tower}
    top = max(depth.top for depth in depths.values())
    if unlocked > top:
        depths_there = f"the {tower} tower of {encoder.name} has {top + 1} depths, 0 to {top}"
        raise InputError(f"unlocked is {unlocked}; {depths_there}")
    for name, depth in depths.items():
        if depth.depth <= depth.top - unlocked:
            named[name].requires_grad_(False)


def keep_frozen(encoder: DualEncoder, tower: str) -> None:
    """Puts a frozen tower into evaluation mode, after ``train()`` put everything into training mode.

    Its dropout is off and its batch norms use and keep their statistics. Modules that still hold a learning parameter
    (``unlocked``) stay in training mode.
    """
    if tower == "none":
        return
    for name, child in encoder.model.named_children():
        if tower_of(name) != tower:
            continue
        child.eval()
        for module in child.modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.training = True


def first_difference(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """The first tensor by name that has not the same shape on both sides, and both shapes; None if all have."""
    for name in sorted(here.keys() | there.keys()):
        shapes = [str(tuple(side[name].shape)) if name in side else "nothing" for side in (here, there)]
        if shapes[0] != shapes[1]:
            return name, shapes[0], shapes[1]
    return None


def beside_image_tower(spec: str, model: str | None, image_size: int | None, seed: int) -> DualEncoder:
    """An image tower with weights and pixels' normalisation of ``spec``, and a text tower from random weights.

    ``model`` and ``image_size`` are those of ``spec`` when left out.
    """
    source = load_model(spec, device="cpu")
    source.check_weights()
    if model is None and source.name not in known_models():
        raise InputError(f"init_image {spec!r} does not say what its towers are called; give --model")
    towers = create_model(model or source.name, image_size=image_size or source.image_size, seed=seed)
    trained, new = (_activation(encoder.config.settings) for encoder in (source, towers))
    if trained != new:  # no shape tells
        raise InputError(f"init_image {spec!r} was trained with {trained}, {towers.name} has {new}")
    wanted, held = towers.model.visual.state_dict(), source.model.visual.state_dict()
    if difference := first_difference(wanted, held):
        name, here, there = difference
        if towers.image_size != source.image_size:
            held_size = f"init_image {spec!r} holds an image tower for {source.image_size} pixels"
            raise InputError(f"{held_size}, image_size is {image_size}; leave --image-size out")
        other = f"visual.{name} has {there}, {towers.name} has {here}"
        raise InputError(f"init_image {spec!r} has another image tower ({other}); --model names one that fits")
    towers.model.visual.load_state_dict(held)
    towers.model.visual.preprocess_cfg = dict(source.preprocess_cfg)
    return DualEncoder(towers.name, towers.model, towers.tokenizer, towers.config)


def _activation(settings: Mapping[str, Any]) -> str:
    """Of an open_clip image tower."""
    if settings.get("quick_gelu"):
        return "QuickGELU"
    options = settings.get("vision_cfg", {}).get("act_kwargs")
    return f"GELU {options}" if options else "GELU"


def write_average(config: TrainConfig, checkpoint: Path, start: str) -> None:
    """Writes ``OUT/averaged``, a model folder: the checkpoint's weights averaged with those of ``--init``.

    ``start`` is the fingerprint of what the run began with; empty where it is not known.
    """
    assert config.towers.init is not None and config.towers.average_with_start is not None
    tuned = load_model(checkpoint)
    begun = load_model(config.towers.init)
    if start and fingerprint(begun) != start:
        raise InputError(
            f"init {config.towers.init!r} holds other weights than the run began with, so {AVERAGED_FOLDER} is not "
            f"written; {checkpoint} stays; with those weights as --init, --resume auto writes it"
        )
    _interpolate(begun, tuned, config.towers.average_with_start)
    with whole_folder(config.save.out / AVERAGED_FOLDER) as folder:
        save_model(folder, tuned, tuned.objective_config)


@torch.no_grad()
def _interpolate(start: DualEncoder, tuned: DualEncoder, share: float) -> None:
    """Moves ``tuned`` to the straight line between two models (WiSE-FT, Wortsman et al. 2022), in place.

    Every floating-point tensor becomes (1 − share) · start + share · tuned, exact at both ends; running statistics of
    batch norms are included (those of the averaged weights would need a pass over data). Whole numbers stay.
    """
    before, after = start.model.state_dict(), tuned.model.state_dict()
    if difference := first_difference(after, before):
        name, here, there = difference
        raise InputError(
            f"{start.name}: cannot be averaged with {tuned.name}: {name} has {there} there and {here} here"
        )
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[name].to(value), value, share))
