"""How sure a mean is: bootstrap intervals over the samples that it was taken over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cloob.functional.checks import as_vector


def bootstrap_interval(
    values: Tensor,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    *,
    groups: Tensor | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Where all values are 1, or all 0, every resample is the same: there the exact
    binomial interval stands in (Clopper and Pearson 1934), one end of which is α^(1/N),
    α = (1 − level) / 2.

    Args:
        values: (N,) per-sample values, e.g. 0/1 correctness.
        n: Number of resamples.
        level: Coverage, in (0, 1).
        seed: Equal seeds give equal intervals.
        groups: (N,) integer ids, where samples of one id depend on each other: groups
            are resampled whole. The mean is still that of all values.

    Returns:
        (low, high).

    Raises:
        ValueError: No values, a value that is not finite, n < 1, or a level outside (0,
            1).
    """
    samples = values if groups is None else by_group(values, groups)
    mean, low, high = stratified_bootstrap([samples], n, level, seed)
    if low == high and mean in (0, 1):
        tail = (1 - level) / 2
        open_end = tail ** (1 / len(samples))
        return (open_end, 1.0) if mean == 1 else (0.0, 1 - open_end)
    least, greatest = values.aminmax()
    return max(low, float(least)), min(high, float(greatest))


def by_group(values: Tensor, groups: Tensor) -> Tensor:
    """(G,) samples, one a group by ascending id, whose mean is that of the (N,) values.

    With sums s and counts c of the groups, and R = Σs/Σc: the linearised ratio R + (s −
    R c) / mean(c), which is s/c where all groups are as large.
    """
    means = group_means(values, groups)
    _, counts = torch.unique(groups.cpu(), return_counts=True)
    sizes = counts.double()
    if bool((sizes == sizes[0]).all()):
        return means
    mean = values.cpu().double().mean()
    samples: Tensor = mean + (means - mean) * sizes / sizes.mean()
    return samples


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """(G,) means of the (N,) values by their (N,) integer ids, float64 on the CPU, by
    ascending id.
    """
    if values.shape != groups.shape:
        shapes = f"{tuple(groups.shape)} and {tuple(values.shape)}"
        raise ValueError(f"expected a group for each value, got {shapes}")
    groups = groups.cpu()
    _, place, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    means: Tensor = torch.bincount(place, values.cpu().double()) / counts
    return means


def stratified_bootstrap(
    strata: Sequence[Tensor], n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The unweighted mean of the strata's means with its bootstrap interval: (mean,
    low, high).

    ``strata`` are (N_s,) per-sample values, e.g. of every test set. Samples are drawn
    within a stratum, strata are not.
    """
    if not 0 < level < 1 or n < 1 or not strata:
        raise ValueError(
            f"expected strata, n ≥ 1 and a level in (0, 1), got {len(strata)}, n={n},"
            f" level={level}"
        )
    generator = torch.Generator().manual_seed(seed)
    means = []
    resampled_means = []
    for values in strata:
        sample = as_vector(values, "values").detach().cpu().double()
        distinct, counts = torch.unique(sample, return_counts=True)
        if len(strata) == 1:
            draws = _cached_draws(n, seed, tuple(counts.tolist()))
        else:
            draws = _draws(n, generator, counts.tolist())
        means.append(sample.mean())
        resampled_means.append(_means_of(draws, distinct))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.stack(resampled_means).mean(0), ends).tolist()
    return float(torch.stack(means).mean()), low, high


def _means_of(draws: Tensor, distinct: Tensor) -> Tensor:
    """(n,) means of resamples in which each distinct value is drawn so often."""
    sums = torch.zeros(draws.shape[1], dtype=torch.float64)
    for value, of_value in zip(distinct.tolist(), draws, strict=True):
        sums += value * of_value.double()
    return sums / draws[:, 0].sum()


def _draws(n: int, generator: torch.Generator, counts: Sequence[int]) -> Tensor:
    """(distinct values, n) int32 how often each resample draws every value, of which a
    sample has so many.

    That is multinomial, drawn as a chain of conditional binomials: n times the number
    of distinct values (two for accuracies, three for their differences) in place of
    n·N draws.
    """
    n_left = sum(counts)
    left = torch.full((n,), float(n_left), dtype=torch.float64)
    drawn = torch.empty(len(counts), n, dtype=torch.int32)
    for place, count in enumerate(counts):
        share = torch.full_like(left, count / n_left)
        of_value = torch.binomial(left, share, generator=generator)
        drawn[place] = of_value
        left = left - of_value
        n_left -= count
    return drawn


@lru_cache(maxsize=4)
def _cached_draws(n: int, seed: int, counts: tuple[int, ...]) -> Tensor:
    """The draws of a fresh generator. Kept, as most numbers of one set of ranks (MRR,
    "choose 1 of T") have equal counts, and drawing is what their intervals cost.
    """
    return _draws(n, torch.Generator().manual_seed(seed), counts)
