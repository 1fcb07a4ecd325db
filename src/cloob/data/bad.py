"""How many pairs cannot be used, and whether that is too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cloob.data.batch import Skip
from cloob.errors import InputError


def by_reason(skipped: Iterable[Skip]) -> dict[str, int]:
    """The number of skipped pairs by reason, the most frequent first."""
    return dict(Counter(skip.reason for skip in skipped).most_common())


def check_fraction(
    source: str, kind: str, skips: Sequence[Skip], total: int, limit: float
) -> None:
    """Raises InputError where more than a share of a set cannot be used, or all of it;
    with examples.
    """
    nothing = len(skips) == total > 0
    if len(skips) > limit * total or nothing:
        first = {skip.reason: skip for skip in reversed(skips)}
        examples: dict[str, str] = {
            k: ": ".join(filter(None, (skip.key, skip.detail)))
            for k, skip in first.items()
        }
        raise too_many(
            f"{source}: {len(skips)} of {total} {kind}",
            nothing,
            limit,
            by_reason(skips),
            examples,
        )


def too_many(
    message: str,
    nothing: bool,
    limit: float,
    reasons: Mapping[str, int],
    examples: Mapping[str, str],
) -> InputError:
    """The error that says so."""
    why = (
        "which leaves none"
        if nothing and limit == 1
        else f"more than max_bad_fraction = {limit:g} allows"
    )
    listed = "; ".join(
        f"{n} {reason} (e.g. {examples.get(reason, '?')})"
        for reason, n in reasons.items()
    )
    return InputError(f"{message} cannot be used, {why}: {listed}")
