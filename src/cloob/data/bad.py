"""How many pairs cannot be used, and whether that is too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cloob.data.batch import BadSample, Skip
from cloob.errors import InputError


def by_reason(skipped: Iterable[Skip | BadSample]) -> dict[str, int]:
    """The number of skipped pairs by reason, the most frequent first."""
    return dict(Counter(skip.reason for skip in skipped).most_common())


def check_fraction(
    source: str, kind: str, skips: Sequence[Skip], total: int, limit: float
) -> None:
    """Raises InputError where more than a share of a set cannot be used, or all of it;
    with examples.
    """
    leaves_none = len(skips) == total > 0
    if leaves_none or len(skips) > limit * total:
        examples: dict[str, str] = {}
        for skip in skips:
            example = f"{skip.key}: {skip.detail}" if skip.detail else skip.key
            examples.setdefault(skip.reason, example)
        message = f"{source}: {len(skips)} of {total} {kind}"
        raise too_many(message, leaves_none, limit, by_reason(skips), examples)


def too_many(
    message: str,
    leaves_none: bool,
    limit: float,
    reasons: Mapping[str, int],
    examples: Mapping[str, str],
) -> InputError:
    """The error that says so."""
    why = f"more than max_bad_fraction = {limit:g} allows"
    if leaves_none and limit == 1:
        why = "which leaves none"
    listed = "; ".join(
        f"{n} {reason} (e.g. {examples.get(reason, '?')})"
        for reason, n in reasons.items()
    )
    return InputError(f"{message} cannot be used, {why}: {listed}")
