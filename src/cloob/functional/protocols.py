"""What other people's tables show, from the ranks of :mod:`cloob.functional.ranking`.

Ranks are (Q,) int64, 0-based, the number of wrong candidates that score at least as
much as the best right one: a tie is lost everywhere here. (Programs that take an
``argmax``, or a sort, win or lose it by the order of the rows.) A function gives (Q,)
values, whose mean is the number of the table; ``size`` is how many candidates a query
has, the right one among them, a number or (Q,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cloob.functional.private import full_products, outside_autocast
from cloob.functional.ranking import UNRANKED, comparable

Size = int | Tensor
_PAIRS = 1 << 16  # of a query and a candidate, whose rows are multiplied at once


def reciprocal_ranks(ranks: Tensor) -> Tensor:
    """1 / (rank + 1), whose mean is the MRR; 0 of ``UNRANKED``."""
    return torch.where(ranks == UNRANKED, 0.0, 1 / (ranks.double() + 1))


def reciprocal_chance(size: Size) -> Tensor:
    """What chance reaches: the harmonic number of ``size`` by ``size``."""
    sizes = torch.as_tensor(size)
    harmonic = (1 / torch.arange(1, int(sizes.max()) + 1).double()).cumsum(dim=0)
    return harmonic[sizes - 1] / sizes


def top_share(ranks: Tensor, share: float, size: Size) -> Tensor:
    """Whether the right one is among the best share of the candidates, rounded up to
    whole ones (MolPhenix, arXiv:2409.08302: top 1 % of the molecules).
    """
    return ranks < share_size(share, size)


def share_size(share: float, size: Size) -> Tensor:
    """⌈share · size⌉, also where the product is a whole number but for rounding."""
    return (share * torch.as_tensor(size).double() - 1e-9).ceil().long().clamp_min(1)


def choose_one(ranks: Tensor, n_choices: int, size: int) -> Tensor:
    """The probability that the right one beats T − 1 wrong ones, drawn from all
    ``size`` − 1 without replacement (MoleculeSTM, arXiv:2212.10789: "T-choose-one").

    It is exact, the mean over all draws: C(size−1−rank, T−1) / C(size−1, T−1) with T =
    ``n_choices``.
    """
    if not 2 <= n_choices <= size:
        raise ValueError(f"n_choices is {n_choices}; 2 to {size} are there")
    beaten = (size - 1 - ranks.clamp_max(size)).double()
    chance = torch.ones_like(beaten)
    for drawn in range(n_choices - 1):
        chance *= (beaten - drawn).clamp_min(0) / (size - 1 - drawn)
    return chance


@outside_autocast
@full_products()
def candidate_ranks(
    query: Tensor, gallery: Tensor, listed: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """(Q,) ranks of every query's best right row among the rows listed for it, and how
    many those are, right ones as one (MassSpecGym, arXiv:2410.23326).

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
    listed, place = torch.unique(listed, dim=0, return_inverse=True)
    is_right = torch.zeros(len(listed), dtype=torch.bool)
    is_right[place[right]] = True
    of_query, row = listed.unbind(dim=1)
    _check_range("query", of_query, n)
    _check_range("gallery row", row, len(gallery))
    without = torch.bincount(of_query[is_right], minlength=n) == 0
    if without.any():
        raise ValueError(f"query {int(without.nonzero()[0])} has no right candidate")

    scores = _products(query, gallery, of_query, row).nan_to_num(nan=-torch.inf)
    best = scores.new_full((n,), -torch.inf)
    best.scatter_reduce_(0, of_query[is_right], scores[is_right], "amax")
    # Within the rounding of a product scores tie, as in ``ranking``.
    longest = gallery.norm(dim=1).nan_to_num().max()
    rounding = 8 * torch.finfo(scores.dtype).eps * longest
    least = best - rounding * query.norm(dim=1).nan_to_num()
    is_ahead = ~is_right & (scores >= least[of_query]) & (scores > -torch.inf)
    ahead = torch.bincount(of_query[is_ahead], minlength=n)
    sizes = torch.bincount(of_query[~is_right], minlength=n) + 1
    return torch.where(best > -torch.inf, ahead, UNRANKED), sizes


def _check_range(kind: str, places: Tensor, size: int) -> None:
    first, last = int(places.min()), int(places.max())
    if first < 0 or last >= size:
        raise ValueError(f"listed: {kind} {first} to {last} of {size}")


def _products(query: Tensor, gallery: Tensor, of_query: Tensor, row: Tensor) -> Tensor:
    """(P,) dot products of listed pairs, a part of them at once."""
    products = []
    for part in torch.split(torch.arange(len(row)), _PAIRS):
        pairs = query[of_query[part]] * gallery[row[part]]
        products.append(pairs.sum(dim=1))
    return torch.cat(products)


def median_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """An interval of the median of (N,) values by their order, whatever they are
    distributed as: its ends are those ranks between which Bin(N, ½) lies with at least
    that probability (Thompson 1936).
    """
    ordered = values.double().sort().values
    n = len(ordered)
    heads = torch.arange(n + 1).double()
    total = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
    logs = total - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
    at_most = (logs - n * math.log(2)).exp().cumsum(dim=0)
    n_outside = int((at_most <= (1 - level) / 2).sum())
    first = max(min(n_outside, (n + 1) // 2) - 1, 0)
    return float(ordered[first]), float(ordered[n - 1 - first])
