"""A caller's torch ``Dataset`` as pairs.

The generators that an item draws from depend on (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, default_collate

from cloob.data.batch import Batch, Skip
from cloob.data.order import seed_all
from cloob.data.pairs import Pairs
from cloob.data.source import Fingerprint
from cloob.errors import InputError, one_line
from cloob.functional.ids import ids as ids_of


class Items(Pairs):
    """A ``Dataset`` as pairs."""

    def __init__(self, dataset: Dataset[object], seed: int = 0) -> None:
        self.seed = seed
        self.dataset: Any = dataset
        self.name = type(dataset).__name__
        whole: object = dataset
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

    def groups(self) -> np.ndarray:
        """Every pair is held out by itself."""
        return np.arange(len(self))

    def item(self, epoch: int, index: int) -> object:
        """An item, or the Skip of one that raised."""
        seed_all(self.seed, epoch, index)
        try:
            return self.dataset[index]
        except Exception as error:
            detail = f"{type(error).__name__}: {one_line(error)}"
            return Skip(str(index), "item raised an error", detail)

    def batch(self, rows: np.ndarray, epoch: int = 0) -> Batch:
        """The items as they are collated."""
        good: list[int] = []
        items: list[object] = []
        skipped: list[Skip] = []
        for index in rows.tolist():  # a sampler may give a row twice
            item = self.item(epoch, index)
            if isinstance(item, Skip):
                skipped.append(item)
            else:
                good.append(index)
                items.append(item)
        if not items:
            nothing = (torch.empty(0), torch.empty(0))
            no_ids = torch.empty(0, dtype=torch.int64)
            return Batch(nothing, no_ids, (), tuple(skipped))
        parts, ids = self._collated(items)
        if ids is None:
            ids = torch.tensor(good)
        return Batch(parts, ids, tuple(map(str, good)), tuple(skipped))

    def _collated(self, items: list[object]) -> tuple[object, Tensor | None]:
        """The parts of a batch, and its ids if items have any."""
        try:
            parts = self.collate(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.name}: items cannot be collated ({one_line(error)}); an item is"
                " (a, b) or (a, b, id), and the Dataset may have a collate_fn"
            ) from error
        if isinstance(parts, Mapping):
            ids = parts.get("id")
        elif isinstance(parts, tuple | list):
            parts = tuple(parts)
            ids = parts[2] if len(parts) > 2 else None
        else:
            raise InputError(
                f"{self.name}: items are collated to {type(parts).__name__}; a tuple or"
                " a mapping is expected"
            )
        return parts, None if ids is None else self._ids(ids)

    def _ids(self, collated: Iterable[object]) -> Tensor:
        """(n,) int64 ids, of integers or texts."""
        if not isinstance(collated, Tensor):
            return ids_of(collated)
        if collated.is_floating_point() or collated.is_complex():
            raise InputError(
                f"{self.name}: ids are {collated.dtype}; integers or texts are expected"
            )
        return collated.to(torch.int64)
