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
from cloob.files import whole_folder, write_whole
from cloob.models.encoder import DualEncoder
from cloob.models.fingerprint import fingerprint
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import AVERAGED_FOLDER, RUN_CONFIG_FILE
from cloob.models.source import known_models
from cloob.models.towers import create_model
from cloob.training.config import TrainConfig

Tower = Literal["image", "text"]
# `resblocks.3`, `encoder.layer.3`, `blocks.2.0`, `stages.2.blocks.0`, `layer4.2`, `h.3`: a stack and what follows it.
_STACK = re.compile(r"(?:resblocks|blocks|layers?|stages?|h)(\d*)")
_TOP = re.compile(r"head|attn_?pool|pooler|(.*_)?proj(ection)?")
_BOTTOM = re.compile(r".*embed.*|stem|conv_stem|(cls|dist|reg|mask)_token|cls_emb")


class Depth(NamedTuple):
    """Where a parameter lies.

    Attributes:
        depth: 0 for the input, ``top`` for what comes after the last block.
        top: Number of blocks of the tower, plus one.
    """

    depth: int
    top: int


def tower_of(name: str) -> Tower:
    """The tower of a parameter of a ``DualEncoder``, by its name; what wraps the encoder does not count."""
    parts = [part for part in name.split(".") if part not in ("module", "model", "encoder", "_orig_mod")]
    return "image" if parts and parts[0] == "visual" else "text"


def layer_depths(names: Iterable[str]) -> dict[str, Depth]:
    """The depth of every parameter of two towers, from the names alone.

    Known are the stacks of open_clip's vision and text transformers and ModifiedResNets, of timm's towers (ViT,
    ConvNeXt, EfficientNet, ResNet, Swin) and of Hugging Face's text towers. Stages that hold blocks count each block. A
    tower without a stack has two depths, 0 and 1.

    Args:
        names: As ``named_parameters()`` lists them; the order matters for what is in no stack: what comes before the
            tower's first block belongs to the input.

    Returns:
        For each name its depth.
    """
    ordered = list(names)
    blocks = {name: _block(name) for name in ordered}
    depths: dict[str, Depth] = {}
    for tower in ("image", "text"):
        names = [name for name in ordered if tower_of(name) == tower]
        known = sorted({block for name in names if (block := blocks[name]) is not None})
        place = {block: i + 1 for i, block in enumerate(known)}
        top, begun = len(known) + 1, False
        for name in names:
            block = blocks[name]
            begun = begun or block is not None
            outside = 0 if _is_input(name, begun) else top
            depth = outside if block is None else place[block]
            depths[name] = Depth(depth, top)
    return depths


def _block(name: str) -> tuple[int, ...] | None:
    """The numbers of the block that a name lies in: (3,) or, in a stage, (2, 0); None outside of all stacks."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        stack = _STACK.fullmatch(part)
        if stack is None:
            continue
        rest = parts[i + 1 :]
        numbers = [int(stack[1])] if stack[1] else []
        while rest and (rest[0].isdigit() or (numbers and rest[0] in ("blocks", "layers") and len(rest) > 1)):
            word = rest.pop(0)
            if word.isdigit():
                numbers.append(int(word))
            if len(numbers) == 2:
                break
        if numbers:
            return tuple(numbers)
    return None


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

    Args:
        encoder: The towers.
        tower: ``"image"``, ``"text"`` or ``"none"``.
        unlocked: The topmost depths of the frozen tower that learn all the same; 1: final norm and projection.

    Raises:
        InputError: ``unlocked`` is more depths than the tower has.
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


@torch.no_grad()
def interpolate(start: DualEncoder, tuned: DualEncoder, share: float) -> None:
    """Moves ``tuned`` to the straight line between two models (WiSE-FT, Wortsman et al. 2022), in place.

    Every floating-point tensor becomes (1 − share) · start + share · tuned, running statistics of batch norms included
    (those of the averaged weights would need a pass over data). Whole numbers stay those of ``tuned``.

    Args:
        start: The model that the fine-tuning began with.
        tuned: The fine-tuned model, of the same architecture.
        share: 0 gives the start, 1 the fine-tuned model, both exactly.

    Raises:
        InputError: The architectures differ.
    """
    before, after = start.model.state_dict(), tuned.model.state_dict()
    if difference := first_difference(after, before):
        name, here, there = difference
        raise InputError(
            f"{start.name}: cannot be averaged with {tuned.name}: {name} has {there} there and {here} here"
        )
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(_between(before[name].to(value), value, share))


def beside_image_tower(spec: str, model: str | None, image_size: int | None, seed: int) -> DualEncoder:
    """An image tower with weights and pixels' normalisation of another model, and a text tower from random weights.

    Args:
        spec: Whose image tower, as ``load_model`` takes it.
        model: Name of the towers; None: those of ``spec``.
        image_size: As of ``create_model``; None: that of ``spec``.
        seed: Of the text tower.

    Returns:
        The towers, on the CPU.

    Raises:
        InputError: As of ``load_model`` and ``create_model``, or the image towers are not of the same kind.
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


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    return torch.lerp(start, end, share)  # exact at both ends


def make_good_average(config: TrainConfig, checkpoint: Path, start: str) -> None:
    """As ``write_average`` for a run that had ended before; its ``config.json`` then says the share."""
    write_average(config, checkpoint, start)
    file = config.save.out / RUN_CONFIG_FILE
    if file.is_file():
        ended = TrainConfig.from_json(file)
        write_whole(file, ended.override(average_with_start=config.towers.average_with_start).to_json())


def write_average(config: TrainConfig, checkpoint: Path, start: str) -> Path:
    """Writes ``OUT/averaged``, a model folder: the checkpoint's weights averaged with those of ``--init``.

    Args:
        config: With ``towers.init`` and ``towers.average_with_start``.
        checkpoint: The run's last checkpoint; it stays as it is.
        start: Fingerprint of what the run began with; empty where it is not known.

    Returns:
        The folder; it appears under its name only when it is whole.

    Raises:
        InputError: The start or the checkpoint cannot be read, the start holds other weights by now, or the folder
            cannot be written.
    """
    assert config.towers.init is not None and config.towers.average_with_start is not None
    tuned = load_model(checkpoint)
    begun = load_model(config.towers.init)
    if start and fingerprint(begun) != start:
        raise InputError(
            f"init {config.towers.init!r} holds other weights than the run began with, so {AVERAGED_FOLDER} is not "
            f"written; {checkpoint} stays; with those weights as --init, --resume auto writes it"
        )
    interpolate(begun, tuned, config.towers.average_with_start)
    final = config.save.out / AVERAGED_FOLDER
    with whole_folder(final) as folder:
        save_model(folder, tuned, tuned.objective_config)
    return final
