"""Batches of a caller's torch ``Dataset``.

The generators that an item draws from depend on (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from cloob.data.batch import Batch, Skip
from cloob.data.loader import Loader
from cloob.data.order import EpochOrder, ShardSizes, seed_all
from cloob.data.sampler import SamplerOrder
from cloob.data.source import Fingerprint
from cloob.data.workers import Request, WorkerPool
from cloob.errors import InputError, one_line
from cloob.functional.ids import ids as ids_of


class Items:
    """A ``Dataset`` as training knows its pairs: a name, a length, and items."""

    def __init__(self, dataset: Dataset[object]) -> None:
        self.dataset: Any = dataset
        self.name = type(dataset).__name__
        whole: Any = dataset
        while isinstance(whole, Subset):  # as of random_split
            whole = whole.dataset
        collate = getattr(whole, "collate_fn", None) or default_collate
        self.collate: Callable[[list[object]], object] = collate
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{self.name}: has no length; a map-style Dataset is needed, with"
                " __len__ and __getitem__"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> Fingerprint:
        """The number of pairs: contents may be drawn anew every time."""
        return {"pairs": len(self)}

    def item(self, seed: int, epoch: int, index: int) -> object:
        """An item, or the Skip of one that raised."""
        seed_all(seed, epoch, index)
        try:
            return self.dataset[index]
        except Exception as error:
            detail = f"{type(error).__name__}: {one_line(error)}"
            return Skip(str(index), "item raised an error", detail)


class ItemLoader(Loader):
    """This rank's batches of a ``Dataset``; ``train``: a new order in every epoch,
    without the last, smaller batch.

    ``whole``: an item may be a mapping, or a tuple of any length, for towers or a loss
    that take the whole batch. ``order``: of a sampler.
    """

    by_id = True

    def __init__(
        self,
        items: Items,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        rank: int,
        world_size: int,
        workers: int,
        whole: bool = False,
        order: SamplerOrder | None = None,
    ) -> None:
        default = EpochOrder([ShardSizes((len(items),))], seed=seed, shuffle=train)
        super().__init__(
            items.name,
            default if order is None else order,
            batch_size,
            WorkerPool(_ItemBuilder(items, seed, whole), workers),
            drop_last=train,
            rank=rank,
            world_size=world_size,
        )


@dataclass(frozen=True)
class _ItemBuilder(Dataset[Batch]):
    items: Items
    seed: int
    whole: bool = False

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices = request
        rows: list[int] = []
        items: list[object] = []
        skipped: list[Skip] = []
        for index in indices.tolist():  # a sampler may give a row twice
            item = self.items.item(self.seed, epoch, index)
            if isinstance(item, Skip):
                skipped.append(item)
            else:
                rows.append(index)
                items.append(item)
        if not items:
            nothing = (torch.empty(0), torch.empty(0))
            no_ids = torch.empty(0, dtype=torch.int64)
            return Batch(nothing, no_ids, (), tuple(skipped))
        parts, ids = self._collated(items)
        if ids is None:
            ids = torch.tensor(rows)
        return Batch(parts, ids, tuple(map(str, rows)), tuple(skipped))

    def _collated(self, items: list[object]) -> tuple[Any, Tensor | None]:
        """The parts of a batch, and its ids if items have any."""
        name = self.items.name
        try:
            parts = self.items.collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{name}: items cannot be collated ({one_line(error)}); an item is (a,"
                " b) or (a, b, id), and the Dataset may have a collate_fn"
            ) from error
        if isinstance(parts, Mapping):
            ids = parts.get("id")
        elif isinstance(parts, tuple | list):
            parts = tuple(parts)
            ids = parts[2] if len(parts) > 2 else None
        else:
            raise InputError(
                f"{name}: items are collated to {type(parts).__name__}; a tuple or a"
                " mapping is expected"
            )
        if not self.whole:
            parts = self._two_sides(parts)
        return parts, None if ids is None else self._ids(ids)

    def _two_sides(self, parts: Any) -> tuple[Any, Any]:
        """The a and b of an item."""
        if isinstance(parts, Mapping):
            what = f"the names {', '.join(map(str, parts))}"
        elif len(parts) in (2, 3):
            return parts[0], parts[1]
        else:
            what = f"{len(parts)} parts"
        raise InputError(
            f"{self.items.name}: an item has {what}; (a, b) or (a, b, id) is expected"
            " where neither towers nor loss take `batch`"
        )

    def _ids(self, collated: Iterable[object]) -> Tensor:
        """(n,) int64 ids, of integers or texts."""
        if not isinstance(collated, Tensor):
            return ids_of(collated)
        if collated.is_floating_point() or collated.is_complex():
            raise InputError(
                f"{self.items.name}: ids are {collated.dtype}; integers or texts are"
                " expected"
            )
        return collated.to(torch.int64)
