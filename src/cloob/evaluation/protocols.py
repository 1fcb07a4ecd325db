"""Other people's tables of vectors: MRR, shares of the gallery, choose one of T, lists
of candidates; each with its interval and what chance reaches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cloob.errors import InputError
from cloob.functional import protocols, ranking
from cloob.functional.bootstrap import bootstrap_interval, group_means
from cloob.functional.ids import id_digest

if TYPE_CHECKING:  # it brings pyarrow
    from cloob.data.vectors import VectorPairs

SHARES = {"0.1%": 0.001, "1%": 0.01, "5%": 0.05}
CHOICES = (4, 10, 20)
CANDIDATE_RECALLS = (1, 5, 20)  # MassSpecGym's


def protocol_numbers(
    way: str, ranks: Tensor, ids: Tensor, size: int, **bootstrap: Any
) -> dict[str, Any]:
    """The numbers of one way, from (N,) ranks among ``size`` distinct ids; an id is one
    sample. See :mod:`cloob.functional.protocols`.
    """
    numbers = mean_and_interval(
        f"{way}_mrr", protocols.reciprocal_ranks(ranks), ids, bootstrap
    )
    for name, share in SHARES.items():
        hits = protocols.top_share(ranks, share, size)
        numbers |= mean_and_interval(f"{way}@{name}", hits, ids, bootstrap)
    for n_choices in CHOICES:
        if n_choices <= size:
            chosen = protocols.choose_one(ranks, n_choices, size)
            numbers |= mean_and_interval(
                f"{way}_choose_{n_choices}", chosen, ids, bootstrap
            )
    finite = torch.where(ranks == ranking.UNRANKED, math.inf, ranks.double())
    if len(torch.unique(bootstrap["groups"])) == size:  # order knows of no groups
        of_ids = group_means(finite, ids)
        low, high = protocols.median_interval(of_ids, bootstrap.get("level", 0.95))
        numbers[f"{way}_median_rank_interval"] = [low + 1, high + 1]
    return numbers


def protocol_chances(size: int) -> dict[str, float]:
    """What chance reaches among so many ids."""
    chances = {"chance_mrr": float(protocols.reciprocal_chance(size))}
    for name, share in SHARES.items():
        chances[f"chance@{name}"] = int(protocols.share_size(share, size)) / size
    chances |= {f"chance_choose_{n}": 1 / n for n in CHOICES if n <= size}
    return chances | {"chance_median_rank": (size + 1) / 2}


def mean_and_interval(
    key: str, values: Tensor, ids: Tensor, bootstrap: dict[str, Any]
) -> dict[str, Any]:
    """The mean of values over ids, with its interval."""
    of_ids = group_means(values, ids)
    low, high = bootstrap_interval(of_ids, **bootstrap)
    return {key: float(of_ids.mean()), f"{key}_interval": [low, high]}


@dataclass(frozen=True)
class Candidates:
    """For pairs of vectors the rows of b that every row of a is ranked among."""

    listed: Tensor  # (P, 2) int64: a pair's place, a row of b
    right: Tensor  # (P,) whether the row of b has the pair's id

    @property
    def rows(self) -> Tensor:
        """The rows of b that are listed, each once, ascending."""
        rows: Tensor = torch.unique(self.listed[:, 1])
        return rows


def read_candidates(
    path: Path, pairs: VectorPairs, names: Sequence[str] | None
) -> Candidates:
    """The lists of a file of JSON lines, one for every row of a, in its order.

    A line is a list of ids of b (``names``, of all its rows), or where there are none,
    of 0-based rows of b. The right one must be among them.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if len(lines) != pairs.a.shape[0]:
        raise InputError(
            f"{path}: has {len(lines):,} lines, and a has {pairs.a.shape[0]:,} rows"
        )
    rows_by_name = None
    if names is not None:
        rows_by_name = {name: row for row, name in reversed([*enumerate(names)])}
    ids_of_b = ids_of_rows(pairs, names)
    listed, right = [], []
    for place, (row_of_a, _) in enumerate(pairs.rows.tolist()):
        rows = read_list(path, row_of_a, lines[row_of_a], rows_by_name, len(ids_of_b))
        is_right = ids_of_b[rows] == pairs.ids[place]
        if not is_right.any():
            raise InputError(
                f"{path}: line {row_of_a + 1} does not list the row's own partner"
            )
        listed += [(place, row) for row in rows]
        right += is_right.tolist()
    return Candidates(torch.tensor(listed), torch.tensor(right))


def read_list(
    path: Path, row: int, line: str, rows_by_name: dict[str, int] | None, n_rows: int
) -> list[int]:
    """The rows of b that a line names."""
    where = f"{path}: line {row + 1}"
    try:
        names = json.loads(line)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not names:
        raise InputError(f"{where} is no list of candidates, as [3, 17, 4]")
    if rows_by_name is None:
        for name in names:
            if type(name) is not int or not 0 <= name < n_rows:
                raise InputError(
                    f"{where} names {name!r}; without ids candidates are rows of b, 0"
                    f" to {n_rows - 1}"
                )
        return names
    rows = [rows_by_name.get(str(name), -1) for name in names]
    if -1 in rows:
        unknown = names[rows.index(-1)]
        raise InputError(f"{where} names {unknown!r}, which b has not")
    return rows


def ids_of_rows(pairs: VectorPairs, names: Sequence[str] | None) -> np.ndarray:
    """(n',) the id of every row of b; of one without a partner one that no pair has."""
    if names is not None:
        return np.array([id_digest(name) for name in names], np.int64)
    ids = -1 - np.arange(pairs.b.shape[0])
    ids[pairs.rows[:, 1]] = pairs.ids
    return ids


def embed_listed(encoder: Any, pairs: VectorPairs, candidates: Candidates) -> Tensor:
    """The unit rows of all rows of b that are listed, on the CPU."""
    from cloob.data.vectors import as_numbers, gather
    from cloob.models.aligned.model import embed_rows

    parts = [part.numpy() for part in torch.split(candidates.rows, 4096)]
    return torch.cat(
        [embed_rows(encoder, "b", as_numbers(gather(pairs.b, part))) for part in parts]
    )


def candidate_numbers(
    a: Tensor, rows_of_b: Tensor, candidates: Candidates, ids: Tensor, **bootstrap: Any
) -> dict[str, Any]:
    """Hit rates and MRR among the listed candidates; ``rows_of_b`` are those of
    ``candidates.rows``.
    """
    place = torch.searchsorted(candidates.rows, candidates.listed[:, 1].contiguous())
    listed = torch.stack([candidates.listed[:, 0], place], dim=1)
    ranks, sizes = protocols.candidate_ranks(a, rows_of_b, listed, candidates.right)
    way = "candidates"
    numbers: dict[str, Any] = {f"{way}_mean_number": float(sizes.double().mean())}
    for k in CANDIDATE_RECALLS:
        numbers |= mean_and_interval(f"{way}@{k}", ranks < k, ids, bootstrap)
        chance = group_means(sizes.clamp_max(k) / sizes, ids)
        numbers[f"chance_{way}@{k}"] = float(chance.mean())
    reciprocal = protocols.reciprocal_ranks(ranks)
    numbers |= mean_and_interval(f"{way}_mrr", reciprocal, ids, bootstrap)
    chance = group_means(protocols.reciprocal_chance(sizes), ids)
    return numbers | {f"chance_{way}_mrr": float(chance.mean())}
