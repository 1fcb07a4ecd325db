"""The parts of a run that its caller brings as objects, in the place of what the configuration names."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.distributed import Layout, gather_objects, gather_rows, world_size
from cloob.errors import InputError
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import import_open_clip
from cloob.models.pixels import EvalTransform
from cloob.models.tokenizer import ClipTokenizer
from cloob.objective import ContrastiveObjective
from cloob.training.config import TrainConfig
from cloob.training.config.parts import SCALES
from cloob.training.optim import MakeOptimizer
from cloob.training.pairs import GivenPairs


@dataclass(frozen=True)
class Given:
    """What ``train`` was given; None where the configuration says it."""

    pairs: GivenPairs | None = None
    held_out: GivenPairs | None = None
    towers: nn.Module | None = None
    objective: nn.Module | None = None
    optimizer: MakeOptimizer | None = None

    def named(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the class of each given part, and without what that part takes the place of."""
        names: dict[str, str | None] = {}
        for name, part in vars(self).items():
            before = getattr(config.given, f"given_{name}")
            if before is not None and part is None:
                what = f"{name} of the class {before!r}, which Python code gave"
                raise InputError(f"the configuration has {what}; give them to cloob.train(config, {name}=…)")
            while isinstance(part, functools.partial):
                part = part.func
            named = part if hasattr(part, "__qualname__") else type(part)
            names[f"given_{name}"] = None if part is None else named.__qualname__
        if self.pairs is not None:
            config = config.override(data=(), a=None, b=None, ids=None, a_ids=None, b_ids=None)
        if self.held_out is not None:
            config = config.override(val_split=0.0)
        if self.towers is not None:
            config = config.override(model=None, image_size=config.towers.image_size)
        if self.objective is not None:
            auto = {"objective": "cloob"} if config.loss.objective == "auto" else {}  # there is nothing to choose
            config = config.override(**dict.fromkeys(SCALES), retrieval_from=0.0, **auto)
        return config.override(**names)


class GivenTowers(DualEncoder):
    """A caller's module as a ``DualEncoder``, as far as training needs one.

    Of image-caption pairs it takes uint8 (n, 3, S, S) pixels and (n, 77) int64 tokens of CLIP's tokenizer.
    """

    def __init__(self, module: nn.Module, image_size: int | None = None) -> None:
        nn.Module.__init__(self)  # a DualEncoder's asks for open_clip's towers
        self.name = type(module).__qualname__
        self.model = module
        self.config = EncoderConfig("module", 0, 0, {"class": self.name})
        self.objective_config = {}
        self.image_size = image_size or 224

    @cached_property
    def preprocess(self) -> EvalTransform:  # type: ignore[override]
        return EvalTransform({"size": self.image_size})

    @cached_property
    def tokenizer(self) -> ClipTokenizer:  # type: ignore[override]
        return ClipTokenizer.of(import_open_clip(".tokenizer").SimpleTokenizer())

    @property
    def trims_texts(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        first: nn.Parameter = next(self.model.parameters())
        return first.device

    def set_channels_last(self, enabled: bool) -> None:
        """Does nothing: the module's layout is the caller's."""

    def forward(self, images: Any, tokens: Any) -> tuple[Tensor, Tensor]:
        """Unit rows (n, D) float32 of both sides, from whatever rows the module gives."""
        rows: Any = self.model(images, tokens)
        sides = rows if isinstance(rows, tuple | list) else (rows,)
        shapes = [tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__ for side in sides]
        if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[0] != shapes[1]:
            raise InputError(f"{self.name}: returned {shapes}; two tensors (n, D) of the same n and D are expected")
        return F.normalize(rows[0].float(), dim=1), F.normalize(rows[1].float(), dim=1)


class GivenObjective(nn.Module):
    """A caller's loss of two (N, D) matrices of unit rows; each rank computes the global loss, so gradients average."""

    contrast, hopfield, bias = "given", False, None

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        parameters = inspect.signature(loss.forward).parameters
        self._takes_ids = "ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        hopfield: bool | None = None,
        trusted: Layout | None = None,
    ) -> Tensor:
        if world_size() > 1:
            layout = trusted or Layout(tuple(gather_objects(len(x))))
            x, y = gather_rows(torch.cat([x, y], 1), layout).tensor_split(2, 1)
            ids = None if ids is None else gather_rows(ids, layout)
        value = self.loss(x, y, ids=ids) if self._takes_ids else self.loss(x, y)
        if not isinstance(value, Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{type(self.loss).__qualname__}: returned {found}; a 0-d tensor is expected")
        return value

    def clamp_(self) -> None:
        """Does nothing: bounds of its scales are the loss's business."""

    def scale_values(self) -> dict[str, float | Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        """Nothing that another objective could be made of."""
        return {}


def as_objective(loss: nn.Module) -> ContrastiveObjective:
    """A given loss as the loop calls it. One that extends the family is not of it: it may compute something else."""
    if type(loss) is ContrastiveObjective:
        loss.gather = world_size() > 1
        return loss
    return GivenObjective(loss)  # type: ignore[return-value] # has the part of it that training uses
