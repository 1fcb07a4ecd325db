"""``fit_heads``: two matrices in memory or mapped, and what is known of their rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cloob.data.matrices import not_negative
from cloob.data.vectors import VectorPairs, usable_pairs
from cloob.errors import InputError, counted
from cloob.functional.ids import id_digest
from cloob.heads.choose import choose
from cloob.heads.cleaning import suspicious_pairs, without
from cloob.heads.fit import OnEpoch
from cloob.heads.fitted import FittedHeads
from cloob.heads.matrix import as_matrix
from cloob.heads.settings import HeadSettings

MISSING = ("None", "nan", "NaT", "<NA>")
HeldOut = float | tuple[Any, Any] | tuple[Any, Any, Any]


def fit_heads(
    a: Any,
    b: Any,
    ids: Any = None,
    held_out: HeldOut = 0.1,
    settings: HeadSettings | None = None,
    *,
    groups: Any = None,
    weights: Any = None,
    folder: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> FittedHeads:
    """Fits heads that bring the rows of two matrices together.

    Args:
        a: (N, F) numbers: an array, also mapped, a tensor, or a sparse matrix.
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
        The heads, their history, and what held-out pairs decided.

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
    chosen_by: VectorPairs | None = None
    if isinstance(held_out, tuple):
        chosen_by = pairs_of(*held_out)
    elif held_out:
        pairs, chosen_by = split(pairs, held_out)
    if settings.clean is not None:
        left_out = suspicious_pairs(pairs, settings.clean)
        pairs = without(pairs, left_out, settings.clean)
    return choose(pairs, chosen_by, settings, folder=folder, on_epoch=on_epoch)


def pairs_of(
    a: Any,
    b: Any,
    ids: Any = None,
    groups: Any = None,
    weights: Any = None,
    names: tuple[str, str] = ("a", "b"),
) -> VectorPairs:
    """The pairs of two matrices; InputError for a row that cannot be used."""
    a, b = as_matrix(names[0], a), as_matrix(names[1], b)
    n = a.shape[0]
    if b.shape[0] != n:
        raise InputError(
            f"{names[0]} has {n:,} rows, {names[1]} has {b.shape[0]:,}; row i of one"
            " belongs to row i of the other"
        )
    labels = None if ids is None else texts_of("ids", ids, n)
    pairs = usable_pairs(names, " and ".join(names), a, b, labels)
    if pairs.skipped:
        first = pairs.skipped[0]
        raise InputError(
            f"{pairs.name}: {counted(len(pairs.skipped), 'rows')} of {n:,} cannot be"
            f" used, such as {first.key}: {first.detail}"
        )
    columns: dict[str, np.ndarray] = {}
    if groups is not None:
        digests = [id_digest(text) for text in texts_of("groups", groups, n)]
        columns["groups"] = np.array(digests)
    if weights is not None:
        columns["weights"] = weights_of("weights", weights, n)
    return dataclasses.replace(pairs, **columns)  # type: ignore[arg-type]


def split(pairs: VectorPairs, share: float) -> tuple[VectorPairs, VectorPairs]:
    """The training pairs, and those of a share of the ids or groups."""
    if not 0 < share < 1:
        raise InputError(f"val_split is {share}; it must be a share below 1, or 0")
    n = len(np.unique(pairs.units()))
    if n < 4:
        kind = "ids" if pairs.groups is None else "groups"
        raise InputError(
            f"{pairs.name}: {counted(n, kind)}; 2 to train on and 2 to hold out are"
            " needed"
        )
    return pairs.split(share)


def texts_of(name: str, values: Iterable[Any], n: int) -> list[str]:
    """Ids or groups as texts; InputError where one is missing."""
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != n:
        raise InputError(f"{name} has {len(values):,} entries for {n:,} rows")
    texts = [str(value) for value in values]
    missing = [
        row
        for row, text in enumerate(texts)
        if not text or (text in MISSING and not isinstance(values[row], str))
    ]
    if missing:
        others = f", as have {len(missing) - 1:,} others" if missing[1:] else ""
        raise InputError(
            f"{name}: row {missing[0]} has none{others}; give every row one, a unique"
            " one where it is unknown"
        )
    return texts


def weights_of(name: str, values: Any, n: int) -> np.ndarray:
    """(N,) float64 weights of 0 or more."""
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    try:
        weights = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: a number for every row is expected") from None
    if weights.shape != (n,):
        raise InputError(f"{name} has shape {weights.shape}; ({n},) is expected")
    not_negative(name, weights)
    if not (weights > 0).sum() > 1:
        raise InputError(
            f"{name}: fewer than two weights are not zero; nothing can be learned"
        )
    return weights
