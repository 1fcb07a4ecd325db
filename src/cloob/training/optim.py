"""The optimiser with its groups, the schedule of its rate, the average of the weights,
and starts from trained towers.

Depth of a parameter in its tower: 0 for what first touches pixels or tokens, 1, 2, …
    for the blocks in their order, and
one more than the last block for what comes after them (final norm, attention pool,
projection).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from cloob.errors import InputError, nearest, one_line, require
from cloob.files import whole_folder
from cloob.functional.private import NORMS
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import AVERAGED_FOLDER
from cloob.training.config import TrainConfig
from cloob.training.config.parts import OptimConfig
from cloob.training.sharding import is_sharded

Tower = Literal["image", "text"]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
# `resblocks.3`, `encoder.layer.3`, `layer4.2`, `h.3`, `blocks.2.0`,
# `stages.2.blocks.0`: a block, or one in a stage.
_BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks|layers?|stages?|h)\.?(\d+)(?![^.])(?:\.(?:blocks\.|layers\.)?(\d+)(?![^.]))?"
)
_TOP = re.compile(r"head|attn_?pool|pooler")
_PROJECTION = re.compile(r"(.*_)?proj(ection)?")
_BOTTOM = re.compile(r".*embed.*|stem|conv_stem|(cls|dist|reg|mask)_token|cls_emb")


class Depth(NamedTuple):
    depth: int  # 0 for the input, ``top`` for what comes after the last block
    top: int  # number of blocks plus one


def tower_of(name: str) -> Tower:
    parts = [
        part
        for part in name.split(".")
        if part not in ("module", "model", "encoder", "_orig_mod")
    ]
    return "image" if parts and parts[0] == "visual" else "text"


def layer_depths(names: Iterable[str]) -> dict[str, Depth]:
    """The depth of every parameter of two towers (of open_clip, timm, Hugging Face),
    from the names in their order.
    """
    ordered = list(names)
    depths: dict[str, Depth] = {}
    for tower in ("image", "text"):
        matches = {
            name: _BLOCK.search(name) for name in ordered if tower_of(name) == tower
        }
        blocks = {
            name: match and tuple(int(n) for n in match.groups() if n)
            for name, match in matches.items()
        }
        known = sorted({block for block in blocks.values() if block is not None})
        place = {block: i + 1 for i, block in enumerate(known)}
        top, begun = len(known) + 1, False
        for name, block in blocks.items():
            begun = begun or block is not None
            ends, bottom, projection = (
                any(map(k.fullmatch, name.split(".")))
                for k in (_TOP, _BOTTOM, _PROJECTION)
            )
            is_input = not ends and (bottom or not (begun or projection))
            depths[name] = Depth(
                place[block] if block is not None else 0 if is_input else top, top
            )
    return depths


def freeze(encoder: DualEncoder, tower: str) -> None:
    """Takes a tower out of the training: no gradients, no dropout, and batch norms use
    and keep their statistics.
    """
    for name, parameter in encoder.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(False)
    for name, child in encoder.model.named_children():
        if tower_of(name) == tower:
            child.eval()


@torch.no_grad()
def write_average(config: TrainConfig, checkpoint: Path) -> None:
    """Writes ``OUT/averaged``: (1 − share) · start + share · tuned, for all floats
    (Wortsman et al. 2022).
    """
    assert (
        config.towers.init is not None and config.towers.average_with_start is not None
    )
    tuned, start = load_model(checkpoint), load_model(config.towers.init)
    after, before = tuned.model.state_dict(), start.model.state_dict()
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(
                torch.lerp(
                    before[name].to(value), value, config.towers.average_with_start
                )
            )
    with whole_folder(config.save.out / AVERAGED_FOLDER) as folder:
        save_model(folder, tuned, tuned.objective_config)


_WITHOUT_DECAY = (
    "bn",
    "ln",
    "bias",
    "logit_scale",
)  # parts of names in the authors' program
_COOLDOWN = 0.2  # the share of a run in which constant-cooldown falls


def parameter_groups(
    encoder: nn.Module,
    objective: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    *,
    embeddings_apart: bool = False,
    by_name: bool = False,
) -> list[dict[str, Any]]:
    """Groups by weight decay and learning rate, with their ``lr_scale``, the largest
    first.

    CLIP's rule: a parameter decays when it has two dimensions or more, is no bias and
    belongs to no norm layer; at depth d of a tower of depths 0 … top its rate is
    multiplied by ``layer_decay ** (top − d)`` (as in BEiT). ``embeddings_apart``:
    timm's Muon leaves embeddings to AdamW. ``by_name``: the rule of the authors'
    program.
    """
    depths = layer_depths(name for name, _ in encoder.named_parameters())
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for path, owner in encoder.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decays = (
                parameter.ndim >= 2
                and not name.endswith("bias")
                and not isinstance(owner, NORMS)
            )
            full_name = f"{path}.{name}" if path else name
            if by_name:
                decays = not any(part in full_name for part in _WITHOUT_DECAY)
            depth = depths[full_name]
            apart = embeddings_apart and (
                isinstance(owner, nn.Embedding) or "embed" in name
            )
            groups.setdefault(
                (layer_decay ** (depth.top - depth.depth), decays, apart), []
            ).append(parameter)
    scales = [p for p in objective.parameters() if p.requires_grad]
    if scales:
        groups.setdefault((1.0, by_name, False), []).extend(scales)
    result: list[dict[str, Any]] = []
    for scale, decays, apart in sorted(groups, reverse=True):
        decay = weight_decay if decays else 0.0
        group = {
            "params": groups[scale, decays, apart],
            "weight_decay": decay,
            "lr_scale": scale,
        }
        result.append(group | ({"use_fallback": True} if apart else {}))
    return result


def make_optimizer(
    encoder: nn.Module,
    objective: nn.Module,
    config: OptimConfig,
    device: torch.device,
    given: MakeOptimizer | None = None,
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it, one of timm's, or ``given``, whose rates
    are peaks.
    """
    name = config.optimizer
    how = {
        "embeddings_apart": given is None and "muon" in name,
        "by_name": given is None and config.like_ml_jku,
    }
    groups = parameter_groups(
        encoder, objective, config.weight_decay, config.layer_decay, **how
    )
    if given is not None:
        optimizer = given(
            [
                {k: v for k, v in group.items() if k != "weight_decay" or not v}
                for group in groups
            ]
        )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"optimizer: returned {type(optimizer).__name__}; a"
                " torch.optim.Optimizer is expected"
            )
        for group in optimizer.param_groups:
            group["lr_scale"] = group.get("lr_scale", 1.0) * group["lr"] / config.lr
        return optimizer
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    if name == "adamw":
        betas, fused = (config.beta1, config.beta2), device.type in ("cpu", "cuda")
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused
        )
    timm, names = (
        require("timm.optim", "train"),
        require("timm.optim", "train").list_optimizers(),
    )
    message = ""
    if name not in names:
        message = f"timm has no such; {nearest(name, names)}"
    elif timm.get_optimizer_info(name).second_order:
        message = "it needs second derivatives, which the objective does not give"
    elif is_sharded(encoder):
        message = "--fsdp shards the weights, which only adamw is tried with"
    if message:
        raise InputError(f"optimizer is {name!r}: {message}")
    try:
        return cast(
            torch.optim.Optimizer,
            timm.create_optimizer_v2(groups, name, config.lr, config.weight_decay),
        )
    except Exception as error:  # a package or CUDA is missing: mostly an assertion
        raise InputError(f"optimizer is {name!r}: {one_line(error)}") from error


class Average:
    """The moving average of an encoder's weights and statistics; ``begun``: it has a
    value.
    """

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        self.encoder: Any = copy.deepcopy(encoder).requires_grad_(False)
        self._decay, self.begun = decay, False

    @torch.no_grad()
    def update(self, encoder: nn.Module, finite: Tensor) -> None:
        """Moves towards the encoder's weights if the 0-d ``finite`` is true; waits for
        no device.
        """
        share = finite * (1 - self._decay)
        for averaged, now in zip(
            self.encoder.state_dict().values(),
            encoder.state_dict().values(),
            strict=True,
        ):
            if (
                self.begun and now.is_floating_point()
            ):  # attention masks are buffers of −∞, whose difference is NaN
                averaged.add_(share.to(averaged.dtype) * (now - averaged).nan_to_num())
            else:
                averaged.copy_(now)
        self.begun = True


def warmup_steps(config: OptimConfig, total: int) -> int:
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: OptimConfig, total: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, 0 for the first of ``total``.

    During the warm-up it rises linearly to the peak: (step + 1)/warmup, or step/warmup
    with ``like_ml_jku``. Then, with the progress p = (step − warmup)/(total − warmup)
    in [0, 1):

    - ``constant``: the peak;
    - ``constant-cooldown``: the peak, and over the last fifth of the run linearly to 0;
    - ``cosine``: peak · (1 + cos πp)/2; 0 beyond the end;
    - ``cosine-restarts``: the same of the fractional part of restarts · p (the authors'
      schedule, with ten).
    """
    warmup = warmup_steps(config, total)

    def schedule(step: int) -> float:
        if step < warmup:
            return config.lr * (step + (not config.like_ml_jku)) / warmup
        if config.schedule == "constant":
            return config.lr
        if step >= total:
            return 0.0
        if config.schedule == "constant-cooldown":
            return config.lr * min(1.0, (total - step) / (_COOLDOWN * total))
        progress = (step - warmup) / (total - warmup)
        if config.schedule == "cosine-restarts":
            progress = config.restarts * progress % 1.0
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))

    return schedule
