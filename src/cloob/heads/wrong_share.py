"""How many pairs are wrong, and how probably each is: a mixture whose one part is
known.

Scores of pairs that are known to be wrong have a distribution G; the given pairs mix
wrong ones, which score by G too, with right ones, which score by some H:

    F = π G + (1 - π) H.

By G alone π is not determined: H may hold as much of G as it likes. What helps is that
of two ranked classes one curve is nearly always true, whatever the scores are: against
z = Φ⁻¹(G(s)), where the wrong ones are standard normal, the right ones are normal too,

    H = Φ(β z - α)

(the binormal ROC curve, Hanley 1988, doi:10.1177/0272989X8800800308). It is held
against the given pairs in cells of G, of which the highest has no upper end, so that
nothing depends on how far above the wrong pairs the right ones lie. The likelihood of
the counts, on a grid of (π, α, β), with all π and α alike and β not far below one, is
summed to the distribution of π, its 95 % interval, and the probability of being wrong
in every cell. Where right pairs score nearly as wrong ones do, α and π explain one
another, and the interval says so: it is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ends of the cells: shares of the known wrong pairs below them
LOW_ENDS = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4)
HIGH_ENDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
ENDS = np.array(LOW_ENDS + HIGH_ENDS)
SHARES = 0.98 * np.linspace(0, 1, 161) ** 1.5
SHIFTS = np.arange(0, 7.01, 0.1)
SLOPES = np.geomspace(0.4, 2.5, 9)
SLOPE_BELOW_ONE = 0.2  # deviation of log β where it is below zero
# pairs that count: no curve is so true that more of them could narrow the interval
MAX_COUNTED = 2000
TAIL = 0.025
CLEAR = 0.88  # right above wrong, as often: what has to be so to leave pairs out
# how far the ends of the interval may lie apart
MAX_RATIO, MAX_WIDTH = 6.0, 0.3
MAX_SHARE = 0.8  # more wrong pairs than that look like sides that say nothing


@dataclass(frozen=True)
class WrongShare:
    """What the scores of n pairs say of how many are wrong."""

    share: float  # estimated share of wrong pairs
    interval: tuple[float, float]  # 95 % of it
    separation: float  # how often a right pair scores above a wrong one, estimated
    probability: Tensor  # (n,) float32, of being wrong; it falls with the score

    @property
    def is_certain(self) -> bool:
        """Whether pairs may be left out by it: right and wrong ones are told apart, the
        interval is narrow, and there are enough right ones.
        """
        lower, upper = self.interval
        is_narrow = upper <= MAX_RATIO * lower and upper - lower <= MAX_WIDTH
        return self.separation >= CLEAR and is_narrow and upper <= MAX_SHARE


def estimate_wrong_share(
    scores: Tensor, known_wrong: Tensor, n_ids: int | None = None
) -> WrongShare:
    """Estimates the share of wrong pairs.

    Args:
        scores: (n,) scores of the pairs as they are.
        known_wrong: (m,) scores of pairs that are known to be wrong.
        n_ids: Number of ids among the n pairs, where it is less than n: pairs of one id
            say the same.

    Returns:
        The share, its interval, and a probability for every given pair. Without known
        wrong pairs anything is possible: an interval from 0 to 1.
    """
    n, m = len(scores), len(known_wrong)
    if n == 0 or m == 0:
        return WrongShare(0.0, (0.0, 1.0), 0.5, torch.zeros(n))
    ordered = known_wrong.double().sort().values
    n_below = torch.searchsorted(ordered, scores.double()).numpy()
    n_not_above = torch.searchsorted(ordered, scores.double(), right=True).numpy()
    lower, upper = n_below / (m + 1), (n_not_above + 1) / (m + 1)

    counts = count_cells(lower, upper) * (min(n, MAX_COUNTED, n_ids or n) / n)
    grid = make_grid()
    log_posterior = np.log(grid.cells) @ counts + grid.log_prior
    posterior = np.exp(log_posterior - log_posterior.max())
    posterior /= posterior.sum()
    cumulated = posterior.sum(1).cumsum()
    low, median, high = (quantile(cumulated, at) for at in (TAIL, 0.5, 1 - TAIL))
    separation = float(posterior.sum(0) @ grid.separation)

    wrong_in_cell = np.einsum("sc,scl,sl->l", posterior, 1 / grid.cells, grid.wrong)
    # no pair is less probably wrong than one that scores higher
    wrong_in_cell = np.maximum.accumulate(wrong_in_cell[::-1])[::-1]
    edges = np.concatenate([[0.0], ENDS, [1.0]])
    centres = (edges[1:] + edges[:-1]) / 2
    probability = np.interp((lower + upper) / 2, centres, wrong_in_cell)
    return WrongShare(
        median, (low, high), separation, torch.from_numpy(probability).float()
    )


def quantile(cumulated: np.ndarray, share: float) -> float:
    """The share of wrong pairs up to which so much of the distribution lies."""
    place = int(np.searchsorted(cumulated, share))
    return float(SHARES[min(place, len(SHARES) - 1)])


class Grid(NamedTuple):
    """S shares, C curves of right pairs, L cells."""

    cells: np.ndarray  # (S, C, L): share of the given pairs in a cell
    wrong: np.ndarray  # (S, L): share of the given pairs in a cell and wrong
    separation: np.ndarray  # (C,): how often a right pair scores above a wrong one
    log_prior: np.ndarray  # (C,)


@cache
def make_grid() -> Grid:
    """The mixtures that are held against the given pairs."""
    shifts = torch.from_numpy(np.repeat(SHIFTS, len(SLOPES)))
    slopes = torch.from_numpy(np.tile(SLOPES, len(SHIFTS)))
    points = torch.special.ndtri(torch.from_numpy(ENDS))
    below = torch.special.ndtr(slopes[:, None] * points - shifts[:, None]).numpy()
    right = np.diff(below, axis=1, prepend=0.0, append=1.0)
    wrong = SHARES[:, None] * np.diff(ENDS, prepend=0.0, append=1.0)
    cells = wrong[:, None] + (1 - SHARES[:, None, None]) * right + 1e-12
    separation = torch.special.ndtr(shifts / (1 + slopes**2).sqrt()).numpy()
    deviation = slopes.log().clamp_max(0).numpy() / SLOPE_BELOW_ONE
    return Grid(cells, wrong, separation, -(deviation**2) / 2)


def count_cells(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """(L,) how many pairs lie in every cell, where a pair lies anywhere between two
    shares alike.
    """
    below = ((ENDS[:, None] - lower) / (upper - lower)).clip(0, 1).sum(1)
    return np.diff(below, prepend=0.0, append=len(lower))
