"""A caller's towers and loss, as the loop knows its own.

Towers whose ``forward`` has a parameter ``batch`` are called with the whole batch, and
a loss whose ``forward`` has one with the features by name and the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.data.batch import leaves_of
from cloob.distributed import Layout, gather_objects, gather_rows, world_size
from cloob.errors import InputError
from cloob.functional.private import tree_unflatten
from cloob.models.encoder import DualEncoder, EncoderConfig
from cloob.models.importing import import_open_clip
from cloob.models.pixels import EvalTransform
from cloob.models.tokenizer import ClipTokenizer
from cloob.training.step import at_least_float32


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's ``forward`` has a parameter of this name."""
    return name in inspect.signature(module.forward).parameters


class GivenTowers(DualEncoder):
    """A caller's module as a ``DualEncoder``; of captions it takes (n, 77) int64 tokens
    of CLIP's tokenizer.
    """

    def __init__(self, module: nn.Module, image_size: int | None = None) -> None:
        nn.Module.__init__(self)  # a DualEncoder's asks for open_clip's towers
        self.name = type(module).__qualname__
        self.model = module
        self.takes_batch = takes(module, "batch")
        self.config = EncoderConfig("module", 0, 0, {"class": self.name})
        self.objective_config = {}
        self.image_size = image_size or 224
        self._causal_tower = None  # texts come with all of their padding

    @cached_property
    def preprocess(self) -> EvalTransform:  # type: ignore[override]
        return EvalTransform({"size": self.image_size})

    @cached_property
    def tokenizer(self) -> ClipTokenizer:  # type: ignore[override]
        return ClipTokenizer.of(import_open_clip(".tokenizer").SimpleTokenizer())

    def set_channels_last(self, enabled: bool) -> None:
        """Does nothing: the module's layout is the caller's."""

    def forward(self, *inputs: object) -> Any:
        """Unit rows (n, D), float32 or float64, of both sides, from whatever rows the
        module gives; or the tensors (n, …) that it gives by name, as they are.
        """
        rows = self.model(*inputs)
        if isinstance(rows, Mapping):
            named = {name: _shape(side) for name, side in rows.items()}
            if not _have_sides(list(named.values())):
                raise InputError(
                    f"{self.name}: returned {named}; tensors of n rows are expected,"
                    " the first two (n, D) of the same D"
                )
            return dict(rows)
        sides = rows if isinstance(rows, tuple | list) else (rows,)
        shapes = list(map(_shape, sides))
        if len(shapes) != 2 or not _have_sides(shapes):
            raise InputError(
                f"{self.name}: returned {shapes}; two tensors (n, D) of the same n and"
                " D are expected"
            )
        a, b = (F.normalize(at_least_float32(side), dim=1) for side in sides)
        return a, b


def _have_sides(shapes: Sequence[tuple[int, ...] | str]) -> bool:
    """Whether the first two shapes are one (n, D), and all have n rows."""
    if len(shapes) < 2:
        return False
    first = shapes[0]
    is_matrix = len(first) == 2 and first == shapes[1]
    return is_matrix and all(shape[:1] == first[:1] for shape in shapes)


def _shape(side: object) -> tuple[int, ...] | str:
    return tuple(side.shape) if isinstance(side, Tensor) else type(side).__name__


class GivenObjective(nn.Module):
    """A caller's loss of two (N, D) matrices of unit rows; every rank computes the
    global loss.
    """

    hopfield = False
    sees_batch = False

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        parameters = inspect.signature(loss.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes_ids = "ids" in parameters or takes_any

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        hopfield: bool | None,
        trusted: Layout,
    ) -> Tensor:
        x, y, ids = (gather_rows(rows, trusted) for rows in (x, y, ids))
        if self._takes_ids:
            return self._checked(self.loss(x, y, ids=ids))
        return self._checked(self.loss(x, y))

    def _checked(self, value: object) -> Tensor:
        if isinstance(value, Tensor) and not value.ndim:
            return value
        result = _shape(value)
        shown = f"shape {result}" if isinstance(value, Tensor) else result
        raise InputError(
            f"{type(self.loss).__qualname__}: returned {shown}; a 0-d tensor is"
            " expected"
        )

    def clamp_(self) -> None:
        """Does nothing: the bounds of its scales are the loss's."""

    def scale_values(self) -> dict[str, float | Tensor]:
        return {}

    def config(self) -> dict[str, object]:
        return {}  # nothing that another objective could be made of


class BatchObjective(GivenObjective):
    """A caller's loss of features by name, of tensors (N, …), and of the batch that
    they were made of; both of all ranks.
    """

    sees_batch = True

    def forward(  # type: ignore[override]
        self,
        features: Mapping[str, Tensor],
        batch: object,
        hopfield: bool | None,
        trusted: Layout,
    ) -> Tensor:
        if world_size() > 1:
            features = {
                name: _gathered(side, trusted) for name, side in features.items()
            }
            is_named = isinstance(batch, Mapping)
            kind = GatheredNames if is_named else GatheredParts
            batch = kind(batch, trusted)
        return self._checked(self.loss(features, batch))


def _gathered(rows: Tensor, layout: Layout) -> Tensor:
    """The rows of all ranks, with their gradient."""
    if rows.dtype == torch.bool:  # which gloo does not send
        return gather_rows(rows.to(torch.uint8), layout).to(torch.bool)
    return gather_rows(rows, layout)


class GatheredBatch:
    """A batch whose parts come from all ranks when the loss first asks for them, which
    it does on all ranks alike: pictures that only the towers need do not travel.
    """

    def __init__(self, parts: Any, layout: Layout) -> None:
        self._parts, self._layout = parts, layout
        self._of_all_ranks: dict[object, object] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, key: Any) -> Any:
        if key not in self._of_all_ranks:
            leaves, spec = leaves_of(self._parts[key])
            gathered = [self._gather(key, leaf) for leaf in leaves]
            self._of_all_ranks[key] = tree_unflatten(gathered, spec)
        return self._of_all_ranks[key]

    def _gather(self, key: object, leaf: Any) -> object:
        """A part of the batch of all ranks: rows of a tensor with their gradient, or a
        list.
        """
        own = self._layout.local
        kinds = gather_objects(_kind(leaf, own.stop - own.start))
        if None in kinds or len(set(kinds)) > 1:
            raise InputError(
                f"the batch's part {key!r} cannot be gathered over ranks: a row for"
                f" every pair, of one kind and shape, is expected, not {kinds}"
            )
        if isinstance(leaf, Tensor):
            return _gathered(leaf, self._layout)
        return list(chain.from_iterable(gather_objects(leaf)))


def _kind(leaf: Any, rows: int) -> object:
    """What a part's rows look like; None where it has not so many."""
    if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows:
        return str(leaf.dtype), tuple(leaf.shape[1:])
    is_list = isinstance(leaf, list | tuple) and len(leaf) == rows
    return "texts" if is_list else None


class GatheredNames(GatheredBatch, Mapping[str, Any]):
    """A batch by name."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)


class GatheredParts(GatheredBatch, Sequence[Any]):
    """A batch as a tuple."""
