"""What other people's tables show, from the ranks of :mod:`cloob.functional.ranking`.

Ranks are (Q,) int64, 0-based, the number of wrong candidates that score at least as
much as the best right one: a tie is lost everywhere here. (Programs that take an
``argmax``, or a sort, win or lose it by the order of the rows.) A function gives (Q,)
values, whose mean is the number of the table; ``size`` is how many candidates a query
has, all its right ones as one, a number or (Q,).

:func:`numbers` gives all of them, with intervals and what chance reaches.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cloob.functional.bootstrap import bootstrap_interval, group_means
from cloob.functional.private import in_full_precision
from cloob.functional.ranking import (
    UNRANKED,
    check_places,
    comparable,
    least_tied,
    pair_scores,
)

Size = int | Tensor
Numbers = dict[str, object]
"""Numbers and, under ``…_interval``, their ends."""
WAYS = ("a_to_b", "b_to_a")


def reciprocal_ranks(ranks: Tensor) -> Tensor:
    """1 / (rank + 1), whose mean is the MRR; 0 of ``UNRANKED``."""
    return torch.where(ranks == UNRANKED, 0.0, 1 / (ranks.double() + 1))


def top_share(ranks: Tensor, share: float, size: Size) -> Tensor:
    """Whether the right one is among the best share of the candidates, rounded up to
    whole ones (MolPhenix, arXiv:2409.08302: top 1 % of the molecules).
    """
    # a product that is whole but for rounding is whole
    n_best = (share * torch.as_tensor(size).double() - 1e-9).ceil().clamp_min(1)
    return ranks < n_best


def choose_one(ranks: Tensor, n_choices: int, size: Size) -> Tensor:
    """The probability that the right one beats T − 1 wrong ones, drawn from all
    ``size`` − 1 without replacement (MoleculeSTM, arXiv:2212.10789: "T-choose-one").

    It is exact, the mean over all draws: C(size−1−rank, T−1) / C(size−1, T−1) with T =
    ``n_choices``.
    """
    size = torch.as_tensor(size)
    least = int(size.min())
    if not 2 <= n_choices <= least:
        raise ValueError(f"n_choices is {n_choices}; 2 to {least} are there")
    beaten = (size - 1 - ranks.clamp_max(int(size.max()))).double()
    chance = torch.ones_like(beaten)
    for drawn in range(n_choices - 1):
        chance *= (beaten - drawn).clamp_min(0) / (size - 1 - drawn)
    return chance


def chance_of_ranks(n_right: int, n_wrong: int) -> Tensor:
    """(``n_wrong`` + 1,) the probability of every rank where scores mean nothing: that
    the first r of a random order are wrong, and the next one is right.
    """
    rank = torch.arange(n_wrong + 1).double()
    probability = n_right / (n_right + n_wrong - rank)
    for place in range(1, n_right + 1):
        probability *= (n_wrong + place - rank) / (n_wrong + place)
    return probability


class Ranked(NamedTuple):
    """Ranks of (Q,) queries among rows of which some are right and all others wrong."""

    ranks: Tensor  # (Q,)
    n_right: Tensor  # (Q,) int64, 1 or more
    n_wrong: Tensor  # (Q,) int64


@dataclass(frozen=True)
class Table:
    """Which numbers a table shows, besides the MRR."""

    recalls: tuple[int, ...] = (1, 5, 10)
    shares: tuple[str, ...] = ("0.1%", "1%", "5%")
    choices: tuple[int, ...] = (4, 10, 20)

    def values(self, ranked: Ranked) -> dict[str, Tensor]:
        """(Q,) values by the end of their key: ``@k``, ``_mrr``, ``@1%``,
        ``_choose_4``. A choice of more than there are is left out.
        """
        ranks, size = ranked.ranks, ranked.n_wrong + 1
        values = {f"@{k}": ranks < k for k in self.recalls}
        values["_mrr"] = reciprocal_ranks(ranks)
        for share in self.shares:
            part = float(share.rstrip("%")) / 100
            values[f"@{share}"] = top_share(ranks, part, size)
        for n_choices in self.choices:
            if n_choices <= int(size.min()):
                chosen = choose_one(ranks, n_choices, size)
                values[f"_choose_{n_choices}"] = chosen
        return values


def numbers(
    way: str,
    ranked: Ranked,
    ids: Tensor,
    table: Table = Table(),
    *,
    level: float = 0.95,
    seed: int = 0,
    units: Tensor | None = None,
) -> Numbers:
    """All numbers of one way, by key: ``{way}@k`` …, ``…_interval`` and ``chance@k`` ….

    The median rank, of the ids' mean ranks, counts from 1. Its interval is by order,
    which knows of no units: there is none where ids are resampled together.

    Args:
        way: What the keys begin with.
        ranked: The ranks of Q queries.
        ids: (Q,) integers: queries of one id are one sample.
        table: Which numbers.
        level: Coverage of the intervals, which are bootstrap ones.
        seed: Of the bootstrap.
        units: (distinct ids, ascending) integers: ids of one unit are resampled
            together; None: each by itself.
    """
    found: Numbers = {}
    values = table.values(ranked)
    for end, of_queries in values.items():
        of_ids = group_means(of_queries, ids)
        interval = bootstrap_interval(of_ids, level=level, seed=seed, groups=units)
        found[f"{way}{end}"] = float(of_ids.mean())
        found[f"{way}{end}_interval"] = list(interval)
    infinite = ranked.ranks == UNRANKED
    ranks = ranked.ranks.double().masked_fill(infinite, math.inf)
    of_ids = group_means(ranks, ids)
    found[f"{way}_median_rank"] = median(of_ids) + 1
    if units is None or len(torch.unique(units)) == len(units):
        low, high = median_interval(of_ids, level)
        found[f"{way}_median_rank_interval"] = [low + 1, high + 1]
    return found | chance_numbers(ranked, ids, table, values)


def chance_numbers(
    ranked: Ranked, ids: Tensor, table: Table, ends: Collection[str]
) -> Numbers:
    """What chance reaches of every number, by key: ``chance@k`` …."""
    means = dict.fromkeys((f"chance{end}" for end in ends), 0.0)
    probabilities = torch.zeros(int(ranked.n_wrong.max()) + 1, dtype=torch.float64)
    counts = torch.stack([ranked.n_right, ranked.n_wrong], dim=1)
    distinct, kind_of_query = torch.unique(counts, dim=0, return_inverse=True)
    for kind, (n_right, n_wrong) in enumerate(distinct.tolist()):
        share_of_ids = group_means(kind_of_query == kind, ids).mean()
        of_kind = share_of_ids * chance_of_ranks(n_right, n_wrong)
        probabilities[: n_wrong + 1] += of_kind
        ranks = torch.arange(n_wrong + 1)
        values = table.values(Ranked(ranks, ranks, torch.full_like(ranks, n_wrong)))
        for end in ends:
            means[f"chance{end}"] += float(of_kind @ values[end].double())
    # either side of ½, as a median may lie between two ranks
    halves = torch.tensor([0.5 - 1e-9, 0.5 + 1e-9], dtype=torch.float64)
    median_rank = torch.searchsorted(probabilities.cumsum(0), halves).double().mean()
    return {**means, "chance_median_rank": float(median_rank) + 1}


def pair_numbers(
    ranks: tuple[Tensor, Tensor],
    ids: Tensor,
    *,
    level: float = 0.95,
    seed: int = 0,
    units: Tensor | None = None,
) -> Numbers:
    """The numbers of n pairs in both ways, from their ranks
    (:func:`cloob.functional.ranking.mutual_ranks_of_ids`): an id is one sample, and the
    gallery has one row an id, its first.

    ``ids`` are (n,) integers; ``units`` as for :func:`numbers`.
    """
    n_ids = len(torch.unique(ids))
    found: Numbers = {"n": len(ids), "n_ids": n_ids}
    if units is not None and len(torch.unique(units)) < n_ids:
        found["n_groups"] = len(torch.unique(units))
    ones = torch.ones_like(ids)
    for way, of_way in zip(WAYS, ranks, strict=True):
        ranked = Ranked(of_way, ones, ones * (n_ids - 1))
        found |= numbers(way, ranked, ids, level=level, seed=seed, units=units)
    by_chance = {key: found.pop(key) for key in [*found] if key.startswith("chance")}
    return found | by_chance


@in_full_precision
def candidate_ranks(
    query: Tensor, gallery: Tensor, listed: Tensor, right: Tensor
) -> Ranked:
    """The rank of every query's best right row among the rows listed for it
    (MassSpecGym, arXiv:2410.23326).

    Args:
        query: (Q, D) rows.
        gallery: (G, D) rows of the same dtype.
        listed: (P, 2) int64 pairs (query, gallery row), in any order; one that is there
            twice counts once.
        right: (P,) bool, whether the row answers the query; every query has one.

    Raises:
        ValueError: A query without a right row, or an index that is out of range.
    """
    query, gallery = comparable(query, gallery)
    n = len(query)
    listed, listed_index = torch.unique(listed, dim=0, return_inverse=True)
    is_right = torch.zeros(len(listed), dtype=torch.bool)
    is_right[listed_index[right]] = True
    of_query, row = listed.unbind(dim=1)
    check_places(listed, n, len(gallery))
    n_right = torch.bincount(of_query[is_right], minlength=n)
    n_wrong = torch.bincount(of_query[~is_right], minlength=n)
    if not n_right.all():
        raise ValueError(f"query {int(n_right.argmin())} has no right candidate")

    scores = pair_scores(query, gallery, of_query, row)
    best = scores.new_full((n,), -torch.inf)
    best.scatter_reduce_(0, of_query[is_right], scores[is_right], "amax")
    least = least_tied(best, query, gallery)
    is_ahead = ~is_right & (scores >= least[of_query]) & (scores > -torch.inf)
    ahead = torch.bincount(of_query[is_ahead], minlength=n)
    ahead.masked_fill_(best == -torch.inf, UNRANKED)
    return Ranked(ahead, n_right, n_wrong)


def median(values: Tensor) -> float:
    """The median of (N,) values, which may be infinite."""
    ordered = values.double().sort().values
    n = len(ordered)
    return float(ordered[[(n - 1) // 2, n // 2]].mean())


def median_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """An interval of the median of (N,) values by their order, whatever they are
    distributed as: its ends are those ranks between which Bin(N, ½) lies with at least
    that probability (Thompson 1936).
    """
    ordered = values.double().sort().values
    n = len(ordered)
    n_below = torch.arange(n + 1).double()
    log_n_factorial = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
    log_choices = (
        log_n_factorial - torch.lgamma(n_below + 1) - torch.lgamma(n - n_below + 1)
    )
    at_most = (log_choices - n * math.log(2)).exp().cumsum(dim=0)
    n_outside = int((at_most <= (1 - level) / 2).sum())
    first = max(min(n_outside, (n + 1) // 2) - 1, 0)
    return float(ordered[first]), float(ordered[n - 1 - first])
