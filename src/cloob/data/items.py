"""Pairs of a map-style torch ``Dataset``, whose items are (a, b) or (a, b, id) of anything that can be collated.

The generators of python, numpy and torch are seeded by (seed, epoch, number) before an item is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from cloob.data.batch import Batch, Skip, tensors_of
from cloob.data.loader import Loader, WorkerPool
from cloob.data.order import EpochOrder, Part, sample_generator
from cloob.data.source import Fingerprint
from cloob.errors import InputError, one_line
from cloob.functional.ids import ids as ids_of

_PROBED = 100  # items among which one that can be used is looked for


class Items:
    """A ``Dataset`` as training knows its pairs: a name, a length, and a fingerprint of what an item looks like."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset: Any = dataset
        self.name = type(dataset).__name__
        self.collate: Callable[[list[Any]], Any] = getattr(dataset, "collate_fn", None) or default_collate
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(f"{self.name}: has no length; a map-style Dataset is needed, with __len__ and __getitem__")

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> Fingerprint:
        """The number of pairs and the kind of the first that can be used: contents may be drawn anew at each look."""
        return {"pairs": len(self), "kinds of items": str([_kind(part) for part in self.first() or ()])}

    def first(self) -> tuple[Any, ...] | None:
        """The first item that can be used; None where there is none among the first hundred."""
        items = map(partial(_ItemBuilder(self, 0).item, 0), range(min(len(self), _PROBED)))
        return next((tuple(item) for item in items if not isinstance(item, Skip)), None)


class ItemLoader(Loader):
    """This rank's batches of a ``Dataset``; ``train``: a new order in every epoch, without the last, smaller batch."""

    by_id = True

    def __init__(
        self, items: Items, batch_size: int, *, seed: int, train: bool, rank: int, world_size: int, workers: int
    ) -> None:
        order = EpochOrder([Part((len(items),))], seed=seed, shuffle=train)
        super().__init__(items.name, order, batch_size, drop_last=train, rank=rank, world_size=world_size)
        first = items.first() if workers else None
        tensors = [] if first is None else tensors_of(items.collate([first]))
        batch_bytes = sum(tensor.nbytes for tensor in tensors) * -(-batch_size // world_size)
        self._pool = WorkerPool(_ItemBuilder(items, seed), workers, batch_bytes)


class _ItemBuilder(Dataset[Batch]):
    def __init__(self, items: Items, seed: int) -> None:
        self._items, self._seed = items, seed

    def item(self, epoch: int, index: int) -> Any:
        """An item, or the Skip of one that raised."""
        number = sample_generator(self._seed, epoch, index).initial_seed() % 2**32
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 - what an item may draw from
        torch.default_generator.manual_seed(number)
        try:
            return self._items.dataset[index]
        except Exception as error:
            return Skip(str(index), "item raised an error", f"{type(error).__name__}: {one_line(error)}")

    def __getitem__(self, request: tuple[int, np.ndarray]) -> Batch:
        epoch, indices = request
        drawn = {index: self.item(epoch, index) for index in indices.tolist()}
        skipped = tuple(item for item in drawn.values() if isinstance(item, Skip))
        items = {index: item for index, item in drawn.items() if not isinstance(item, Skip)}
        if not items:
            return Batch(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), (), skipped)
        try:
            a, b, *ids = self._items.collate(list(items.values()))
        except (TypeError, ValueError, RuntimeError) as error:
            advice = "an item is (a, b) or (a, b, id), and the Dataset may have a collate_fn of its own"
            raise InputError(f"{self._items.name}: items cannot be collated ({one_line(error)}); {advice}") from error
        numbers = torch.tensor(list(items)) if not ids else ids[0] if isinstance(ids[0], Tensor) else ids_of(ids[0])
        return Batch(a, b, numbers.to(torch.int64), tuple(map(str, items)), skipped)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return str({key: _kind(part) for key, part in value.items()})
    return type(value).__name__
