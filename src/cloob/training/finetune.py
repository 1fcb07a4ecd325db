"""Training that starts from trained towers: what is frozen, which layers learn how fast, averaging with the start.

Depth of a parameter in its tower: 0 for what first touches pixels or tokens (stem, patch and token embeddings,
positions), 1, 2, … for the blocks in their order, and one more than the last block for what comes after them (final
norm, attention pool, projection).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cloob.files import whole_folder
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import AVERAGED_FOLDER
from cloob.training.config import TrainConfig

Tower = Literal["image", "text"]
# `resblocks.3`, `encoder.layer.3`, `layer4.2`, `h.3`, `blocks.2.0`, `stages.2.blocks.0`: a block, or one in a stage.
_BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks|layers?|stages?|h)\.?(\d+)(?![^.])(?:\.(?:blocks\.|layers\.)?(\d+)(?![^.]))?"
)
_TOP = re.compile(r"head|attn_?pool|pooler")
_PROJECTION = re.compile(r"(.*_)?proj(ection)?")
_BOTTOM = re.compile(r".*embed.*|stem|conv_stem|(cls|dist|reg|mask)_token|cls_emb")


class Depth(NamedTuple):
    """Where a parameter lies in its tower."""

    depth: int  # 0 for the input, ``top`` for what comes after the last block
    top: int  # number of blocks plus one


def tower_of(name: str) -> Tower:
    parts = [part for part in name.split(".") if part not in ("module", "model", "encoder", "_orig_mod")]
    return "image" if parts and parts[0] == "visual" else "text"


def layer_depths(names: Iterable[str]) -> dict[str, Depth]:
    """The depth of every parameter of two towers, from the names alone, in the order of ``named_parameters()``.

    Known are the stacks of open_clip's vision and text transformers and ModifiedResNets, of timm's towers (ViT,
    ConvNeXt, EfficientNet, ResNet, Swin) and of Hugging Face's text towers. A tower without a stack has two depths, 0
    and 1. What is in no stack and comes before the tower's first block belongs to the input.
    """
    ordered = list(names)
    depths: dict[str, Depth] = {}
    for tower in ("image", "text"):
        blocks = {name: _block(name) for name in ordered if tower_of(name) == tower}
        known = sorted({block for block in blocks.values() if block is not None})
        place = {block: i + 1 for i, block in enumerate(known)}
        top, begun = len(known) + 1, False
        for name, block in blocks.items():
            begun = begun or block is not None
            outside = 0 if _is_input(name, begun) else top
            depths[name] = Depth(outside if block is None else place[block], top)
    return depths


def _block(name: str) -> tuple[int, ...] | None:
    found = _BLOCK.search(name)
    return tuple(int(number) for number in found.groups() if number is not None) if found else None


def _is_input(name: str, begun: bool) -> bool:
    """Whether a parameter outside of all blocks comes before them."""
    top, bottom, projection = (any(map(kind.fullmatch, name.split("."))) for kind in (_TOP, _BOTTOM, _PROJECTION))
    return not top and (bottom or not (begun or projection))


def freeze(encoder: DualEncoder, tower: str) -> None:
    """Takes a tower out of the training: no gradients, no dropout, and batch norms use and keep their statistics."""
    for name, parameter in encoder.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(False)
    for name, child in encoder.model.named_children():
        if tower_of(name) == tower:
            child.eval()


@torch.no_grad()
def write_average(config: TrainConfig, checkpoint: Path) -> None:
    """Writes ``OUT/averaged``, a model folder on the straight line from ``--init`` to the checkpoint (WiSE-FT).

    Every floating-point tensor becomes (1 − share) · start + share · tuned, exact at both ends, running statistics of
    batch norms among them. Whole numbers stay (Wortsman et al. 2022).
    """
    assert config.towers.init is not None and config.towers.average_with_start is not None
    tuned, start = load_model(checkpoint), load_model(config.towers.init)
    after, before = tuned.model.state_dict(), start.model.state_dict()
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[name].to(value), value, config.towers.average_with_start))
    with whole_folder(config.save.out / AVERAGED_FOLDER) as folder:
        save_model(folder, tuned, tuned.objective_config)
