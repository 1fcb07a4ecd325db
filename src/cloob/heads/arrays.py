"""``fit_heads``: two matrices in memory or mapped, and what is known of their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cloob.data.vectors import hold_out
from cloob.heads.choose import choose
from cloob.heads.cleaning import suspicious_pairs, without
from cloob.heads.fitted import FittedHeads, OnEpoch
from cloob.heads.matrix import pairs_of
from cloob.heads.settings import HeadSettings

HeldOut = float | tuple[object, object] | tuple[object, object, object]


def fit_heads(
    a: object,
    b: object,
    ids: object = None,
    held_out: HeldOut = 0.1,
    settings: HeadSettings | None = None,
    *,
    groups: object = None,
    weights: object = None,
    folder: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> FittedHeads:
    """Fits heads that bring the rows of two matrices together.

    Args:
        a: (N, F) numbers: an array, also mapped, a tensor, or a sparse matrix; or a
            data frame or table of Arrow, whose dates, categories and missing cells
            become numbers as its training rows say.
        b: (N, F') numbers; row i belongs to row i of a.
        ids: (N,) integers or texts: rows of one id are one sample. They are no
            negatives of each other, and any of them is a right answer. None: equal
            rows of a side are one.
        held_out: The pairs that choose: a share of the ids or groups, (a, b) or (a, b,
            ids); 0 for none.
        settings: How; None: ``auto``.
        groups: (N,) integers or texts: rows of one group are held out together, and are
            negatives and answers as any others.
        weights: (N,) numbers, how much every pair counts.
        folder: Of the states of all fits: a fit that was killed goes on there, bit for
            bit.
        on_epoch: Called with the line of every epoch.

    Returns:
        The heads, their history, and what held-out pairs decided; ``encodings`` has
        how tables become numbers.

    Raises:
        InputError: A matrix, a column or a setting is not right.
        TrainingFailed: The loss is not finite.

    Example:
        >>> import numpy as np
        >>> import cloob
        >>> cause = np.random.default_rng(0).normal(size=(300, 4))
        >>> a, b = np.tanh(cause @ np.ones((4, 9))), cause**3
        >>> settings = cloob.HeadSettings("infoloob", epochs=2, embed_dim=8)
        >>> fitted = cloob.fit_heads(a, b, settings=settings)
        >>> [line["epoch"] for line in fitted.history]
        [1, 2]
    """
    settings = settings or HeadSettings()
    pairs = pairs_of(a, b, ids, groups, weights)
    own = pairs_of(*held_out) if isinstance(held_out, tuple) else held_out
    pairs, judges = hold_out(pairs, own)
    if settings.clean is not None:
        pairs = without(pairs, suspicious_pairs(pairs))
    fitted = choose(pairs, judges, settings, folder=folder, on_epoch=on_epoch)
    return replace(fitted, encodings=pairs.encodings)
