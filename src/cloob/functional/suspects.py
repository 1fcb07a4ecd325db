"""Which pairs do not belong together: each scored by a closed form that has not seen
it.

Pairs are divided into folds by their ids. The canonical directions (``functional.cca``)
of the other folds give unit rows x and y of a fold. With h the mean cosine to the ten
nearest rows of other ids on the other side, a pair scores

    s_i = <x_i, y_i> - (h(x_i) + h(y_i)) / 2,

so that a row which is near to everything gains nothing by it (CSLS, arXiv:1710.04087).
Wrong pairs should score as pairs do that are mismatched on purpose: the scores of those
choose the ridge, and tell how many pairs are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cloob.functional.cca import CanonicalDirections, PairMoments, canonical_directions
from cloob.functional.checks import check_ids

_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
_NEAREST = 10
# rows among which the nearest are looked for, evenly spread where there are more
_CANDIDATES = 10_000
_ROWS = 1024  # at a time
_TAIL = 0.1


@dataclass(frozen=True)
class Suspicion:
    """The scores of n pairs, in their order."""

    scores: Tensor  # (n,) float32; the lowest pair is the most suspicious
    mismatched: (
        Tensor  # (n,) float32: scores of as many pairs that are known to be wrong
    )
    # (n,) int64: the pair whose b fits a best among those looked at; itself where none
    # fits better
    better: Tensor

    def count(self) -> int:
        """How many of the lowest pairs are more probably wrong than right.

        With the distributions F of the scores and G of the mismatched ones, F = π G +
        (1 - π) H for a share π of wrong pairs, estimated by F(q) / G(q) at the tenth
        percentile q of G. At the maximum of 2 π G - F a pair is as probably wrong as
        right.
        """
        scores, mismatched = self.scores.sort().values, self.mismatched.sort().values
        n = len(scores)
        wrong = min(
            1.0, float((scores <= mismatched.quantile(_TAIL)).double().mean()) / _TAIL
        )
        of_mismatched = torch.searchsorted(mismatched, scores, right=True).double()
        gain = 2 * wrong * of_mismatched - torch.arange(1, n + 1)
        return int(gain.argmax()) + 1 if float(gain.max()) > 0 else 0


def suspects(a: Any, b: Any, ids: Any = None, folds: int = 5) -> Tensor:
    """How well the two sides of every pair belong together; the lowest scores are the
    most suspicious pairs.

    Args:
        a: (n, F_a) finite numbers: a tensor, an array or a data frame.
        b: (n, F_b) finite numbers; row i belongs to row i of a, or is suspected not to.
        ids: (n,) integers (``cloob.ids`` makes them of texts); pairs of equal id are
            judged together, by the others.
        folds: Parts, each scored by the directions of the others.

    Returns:
        (n,) float32 scores, between -2 and 2. They compare pairs of one call alone.

    Raises:
        ValueError: Shapes do not fit, a number is not finite, or there are fewer than
            two distinct ids for a fold.

    Example:
        >>> import torch, cloob
        >>> a = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> b = a @ torch.ones(8, 5).triu()
        >>> b[[3, 4]] = b[[4, 3]]  # two wrong pairs
        >>> sorted(cloob.suspects(a, b).argsort()[:2].tolist())
        [3, 4]
    """
    ids = ids.cpu() if isinstance(ids, Tensor) else ids
    return suspicion(_matrix("a", a), _matrix("b", b), ids, folds).scores


def _matrix(name: str, rows: Any) -> Tensor:
    """Rows on the CPU; what float32 cannot hold is refused."""
    rows = rows.to_numpy() if hasattr(rows, "to_numpy") else rows
    matrix = (
        rows.detach().cpu() if isinstance(rows, Tensor) else torch.tensor(rows)
    )  # a copy: a mapped file is locked
    if matrix.is_complex():
        raise ValueError(f"{name} holds complex numbers; real ones are needed")
    for start, part in enumerate(
        torch.split(matrix, _ROWS) if matrix.ndim == 2 else ()
    ):
        if not (finite := part.float().isfinite().all(1)).all():
            row = start * _ROWS + int(finite.int().argmin())
            raise ValueError(
                f"{name}: row {row} holds NaN, infinity or a number that float32 cannot"
                " hold"
            )
    return matrix


@torch.no_grad()
def suspicion(a: Tensor, b: Tensor, ids: Any = None, folds: int = 5) -> Suspicion:
    """As ``suspects``, with the scores of mismatched pairs, and better partners."""
    n = len(a)
    if a.ndim != 2 or b.ndim != 2 or len(b) != n:
        raise ValueError(
            f"a is {tuple(a.shape)}, b is {tuple(b.shape)}; two matrices with as many"
            " rows are needed"
        )
    groups = torch.arange(n)
    if (checked := check_ids(ids, None, n, n, groups.device)) is not None:
        groups = checked[0]
    distinct, group = torch.unique(groups, return_inverse=True)
    if folds < 2 or len(distinct) < 2 * folds:
        few = f"{len(distinct)} distinct ids in {folds} folds"
        raise ValueError(f"{few}; 2 folds or more, of 2 ids or more, are needed")
    fold = (
        torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0))
        % folds
    )[group]
    moments = [PairMoments.of(a[fold == k], b[fold == k]) for k in range(folds)]
    result = Suspicion(torch.empty(n), torch.empty(n), torch.empty(n, dtype=torch.long))
    ridge, by_column = 0.0, False
    for k in range(folds):
        others = [part for j, part in enumerate(moments) if j != k]
        total, rows = sum(others[1:], others[0]), (fold == k).nonzero().squeeze(1)
        sides = a[rows], b[rows], group[rows]
        if (
            k == 0
        ):  # the first fold chooses what tells its pairs from mismatched ones best
            most = -1
            for columns in (False, True):
                tried = canonical_directions(total, _RIDGES, by_column=columns)
                for share, directions in zip(_RIDGES, tried, strict=True):
                    part = _judged(total, directions, *sides)
                    above = int(
                        torch.searchsorted(
                            part.mismatched.sort().values, part.scores
                        ).sum()
                    )
                    if above > most:
                        most, ridge, by_column = above, share, columns
        (directions,) = canonical_directions(total, [ridge], by_column=by_column)
        part = _judged(total, directions, *sides)
        result.scores[rows], result.mismatched[rows] = part.scores, part.mismatched
        result.better[rows] = rows[part.better]
    return result


def _judged(
    moments: PairMoments,
    directions: CanonicalDirections,
    a: Tensor,
    b: Tensor,
    group: Tensor,
) -> Suspicion:
    """The pairs of a fold by directions that have not seen them; ``better`` counts
    within the fold.
    """
    of_a, of_b = directions.weighted(1.0)
    x = F.normalize((a.double() - moments.mean_a).float() @ of_a.float(), dim=1)
    y = F.normalize((b.double() - moments.mean_b).float() @ of_b.float(), dim=1)
    hub_x, near, best = _neighbours(x, y, group)
    hub_y, *_ = _neighbours(y, x, group)
    right = (x * y).sum(1)
    other = torch.arange(len(x)).roll(len(x) // 2)
    wrong = (x * y[other]).sum(1) - (hub_x + hub_y[other]) / 2
    better = torch.where(near > right, best, torch.arange(len(x)))
    return Suspicion(right - (hub_x + hub_y) / 2, wrong, better)


def _neighbours(
    queries: Tensor, rows: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every query: the mean cosine of the nearest rows of other groups, the greatest
    one, and its row.
    """
    candidates = torch.arange(0, len(rows), max(1, -(-len(rows) // _CANDIDATES)))
    others, count = rows[candidates], min(_NEAREST, len(candidates))
    means, bests, places = [], [], []
    for some, of_group in zip(
        torch.split(queries, _ROWS), torch.split(group, _ROWS), strict=True
    ):
        cosines = (some @ others.T).masked_fill(
            of_group.unsqueeze(1) == group[candidates], -1.0
        )
        nearest = cosines.topk(count, dim=1)
        means.append(nearest.values.mean(1))
        bests.append(nearest.values[:, 0])
        places.append(candidates[nearest.indices[:, 0]])
    return torch.cat(means), torch.cat(bests), torch.cat(places)
