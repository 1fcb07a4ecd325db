"""The optimiser with its groups, the schedule of its rate, the average of the weights,
and starts from trained towers.

Depth of a parameter in its tower: 0 for what first touches pixels or tokens, 1, 2, …
for the blocks in their order, and one more than the last block for what comes after
them (final norm, attention pool, projection).
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from cloob.training.sharding import is_sharded

Tower = Literal["image", "text"]
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
OptimizerRule = tuple[Callable[[str, nn.Parameter], bool], MakeOptimizer]
GivenOptimizer = MakeOptimizer | Sequence[OptimizerRule]
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
        blocks = {name: _block_of(name) for name in ordered if tower_of(name) == tower}
        known = sorted({block for block in blocks.values() if block is not None})
        place = {block: i for i, block in enumerate(known, 1)}
        top = len(known) + 1
        begun = False
        for name, block in blocks.items():
            begun = begun or block is not None
            if block is not None:
                depth = place[block]
            else:
                depth = 0 if _is_input(name, begun=begun) else top
            depths[name] = Depth(depth, top)
    return depths


def _block_of(name: str) -> tuple[int, ...] | None:
    """The numbers of the block that a parameter is in: of a stage and in it."""
    match = _BLOCK.search(name)
    return match and tuple(int(number) for number in match.groups() if number)


def _is_input(name: str, *, begun: bool) -> bool:
    """Whether a parameter outside the blocks comes before them; ``begun``: one of them
    has come.
    """
    parts = name.split(".")
    if any(map(_TOP.fullmatch, parts)):
        return False
    if any(map(_BOTTOM.fullmatch, parts)):
        return True
    return not begun and not any(map(_PROJECTION.fullmatch, parts))


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
    assert config.init is not None and config.average_with_start is not None
    tuned, start = load_model(checkpoint), load_model(config.init)
    after, before = tuned.model.state_dict(), start.model.state_dict()
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(
                torch.lerp(before[name].to(value), value, config.average_with_start)
            )
    with whole_folder(config.out / AVERAGED_FOLDER) as folder:
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
    for full_name, owner, parameter in _trained(encoder):
        name = full_name.rpartition(".")[2]
        if by_name:
            decays = not any(part in full_name for part in _WITHOUT_DECAY)
        else:
            is_bias = name.endswith("bias") or isinstance(owner, NORMS)
            decays = parameter.ndim >= 2 and not is_bias
        is_embedding = isinstance(owner, nn.Embedding) or "embed" in name
        apart = embeddings_apart and is_embedding
        scale = layer_decay ** (depths[full_name].top - depths[full_name].depth)
        groups.setdefault((scale, decays, apart), []).append(parameter)
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


def _trained(encoder: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every trained parameter once, with its name and the module that owns it."""
    seen: set[int] = set()
    for path, owner in encoder.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, owner, parameter


def make_optimizer(
    encoder: nn.Module,
    objective: nn.Module,
    config: TrainConfig,
    device: torch.device,
    given: GivenOptimizer | None = None,
) -> torch.optim.Optimizer:
    """AdamW, fused where the device has it, one of timm's, or ``given``, whose rates
    are peaks.
    """
    groups = parameter_groups(
        encoder,
        objective,
        config.weight_decay,
        config.layer_decay,
        embeddings_apart=given is None and "muon" in config.optimizer,
        by_name=given is None and config.like_ml_jku,
    )
    if not groups:
        raise InputError(
            "nothing learns: no parameter of the towers or the loss requires a gradient"
        )
    if given is not None:
        return _given_optimizer(given, groups, encoder, objective, config.lr)
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=device.type in ("cpu", "cuda"),
        )
    return _timm_optimizer(groups, encoder, config)


def _timm_optimizer(
    groups: list[dict[str, Any]], encoder: nn.Module, config: TrainConfig
) -> torch.optim.Optimizer:
    timm: Any = require("timm.optim", "train")
    name, names = config.optimizer, timm.list_optimizers()
    wrong = ""
    if name not in names:
        wrong = f"timm has no such; {nearest(name, names)}"
    elif timm.get_optimizer_info(name).second_order:
        wrong = "it needs second derivatives, which the objective does not give"
    elif is_sharded(encoder):
        wrong = "--fsdp shards the weights, which only adamw is tried with"
    if wrong:
        raise InputError(f"optimizer is {name!r}: {wrong}")
    try:
        optimizer: torch.optim.Optimizer = timm.create_optimizer_v2(
            groups, name, config.lr, config.weight_decay
        )
    except Exception as error:  # a package or CUDA is missing: mostly an assertion
        raise InputError(f"optimizer is {name!r}: {one_line(error)}") from error
    return optimizer


def _given_optimizer(
    given: GivenOptimizer,
    groups: list[dict[str, Any]],
    encoder: nn.Module,
    objective: nn.Module,
    peak: float,
) -> torch.optim.Optimizer:
    """The caller's optimiser, or several as one; its rates become shares of ``peak``.

    Groups that shall not decay say so; others take the optimiser's own decay.
    """
    for group in groups:
        if group["weight_decay"]:
            del group["weight_decay"]
    if callable(given):
        optimizer = _made(given, groups)
    else:
        names = _names(encoder, objective)
        optimizer = Optimizers(
            _made(make, part) for make, part in _shared_out(given, groups, names)
        )
    _check_all_held(optimizer, groups)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            raise InputError("optimizer: its learning rate is a tensor; give a number")
        group["lr_scale"] = group.get("lr_scale", 1.0) * group["lr"] / peak
    return optimizer


def _check_all_held(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]
) -> None:
    expected = {id(p) for group in groups for p in group["params"]}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = len(expected - held)
    if missing:
        raise InputError(
            f"optimizer: does not hold {missing} of the {len(expected)} parameters that"
            " learn; give it all groups, or freeze the others (requires_grad_(False))"
        )


def _made(make: MakeOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """What a caller's function makes of some groups; InputError where it cannot be
    stepped.
    """
    try:
        optimizer = make(groups)
    except (TypeError, ValueError) as error:  # as Muon of a bias
        raise InputError(
            f"optimizer: {one_line(error)}; optimizer=[(predicate, make), …] gives"
            " parameters to several"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer: returned {type(optimizer).__name__}; a torch.optim.Optimizer"
            " is expected"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            f"optimizer: {type(optimizer).__name__} evaluates the loss again and again"
            " (a closure), which the loop cannot"
        )
    return optimizer


def _names(encoder: nn.Module, objective: nn.Module) -> dict[int, str]:
    """The names of all parameters by their identity: those of the towers as the caller
    knows them, those of the loss after "loss.".
    """
    towers = {
        id(p): name.removeprefix("model.") for name, p in encoder.named_parameters()
    }
    loss = {
        id(p): f"loss.{name.removeprefix('loss.')}"
        for name, p in objective.named_parameters()
    }
    return loss | towers


def _shared_out(
    rules: Sequence[OptimizerRule],
    groups: list[dict[str, Any]],
    names: dict[int, str],
) -> Iterator[tuple[MakeOptimizer, list[dict[str, Any]]]]:
    """For every optimiser its groups: a parameter goes to the first whose predicate
    holds.
    """
    owner: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            holding = (
                i for i, (holds, _) in enumerate(rules) if holds(name, parameter)
            )
            place = next(holding, None)
            if place is None:
                raise InputError(f"optimizer: no predicate takes the parameter {name}")
            owner[id(parameter)] = place
    for place, (_, make) in enumerate(rules):
        part = []
        for group in groups:
            mine = [p for p in group["params"] if owner[id(p)] == place]
            if mine:
                part.append({**group, "params": mine})
        if not part:
            raise InputError(f"optimizer: predicate {place + 1} takes no parameter")
        yield make, part


class Optimizers(torch.optim.Optimizer):
    """Several optimisers as one; every parameter belongs to one of them."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the parts' own, so that a rate set here is theirs

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        self.state = defaultdict(dict)
        for part in self.parts:
            self.state.update(part.state)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            start = stop
            part.state = defaultdict(dict)
            for group in part.param_groups:
                for parameter in group["params"]:
                    if parameter in self.state:
                        part.state[parameter] = self.state[parameter]


class Average:
    """The moving average of an encoder's weights and statistics, each of them once,
    also where two towers share a module; ``begun``: it has a value.
    """

    def __init__(self, encoder: nn.Module, decay: float) -> None:
        self.encoder: Any = copy.deepcopy(encoder).requires_grad_(False)
        self._decay, self.begun = decay, False
        self._moves: list[bool] | None = None

    @torch.no_grad()
    def update(self, encoder: nn.Module, finite: Tensor) -> None:
        """Moves towards the encoder's weights if the 0-d ``finite`` is true; waits for
        a device at its first call alone.
        """
        average, now = _tensors(self.encoder), _tensors(encoder)
        if self._moves is None:
            self._moves = _are_finite(now)
        if not self.begun:
            torch._foreach_copy_(average, now)
            self.begun = True
            return
        pairs = list(zip(average, now, self._moves, strict=True))
        moving = [(old, new) for old, new, moves in pairs if moves]
        copied = [(old, new) for old, new, moves in pairs if not moves]
        if copied:
            old, new = (list(side) for side in zip(*copied, strict=True))
            torch._foreach_copy_(old, new)
        old, new = (list(side) for side in zip(*moving, strict=True))
        steps = torch._foreach_sub(new, old)
        torch._foreach_mul_(steps, finite * (1 - self._decay))
        torch._foreach_add_(old, steps)


def _tensors(encoder: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each of them once."""
    return [*encoder.parameters(), *encoder.buffers()]


def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors are finite floating-point numbers: not an attention mask of −∞,
    whose differences are NaN.
    """
    floating = [tensor.is_floating_point() for tensor in tensors]
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
    return [both[0] and both[1] for both in zip(floating, finite, strict=True)]


def warmup_steps(config: TrainConfig, total: int) -> int:
    return min(2000, total // 10) if config.warmup is None else config.warmup


def make_schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
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
