"""Zero-shot labels: which of some names a picture is nearest to, with which probability, and whether any fits.

Legend: n pictures, C labels, D the width of a model's rows.

A label's row is the mean of its prompts' rows, made a unit row again, as CLIP has it. Probabilities are the softmax of
τ⁻¹ · cosine over the labels: how the labels share a picture *if one of them is right*. Whether one is right is the
margin's question: how far a label's score lies above the scores of unrelated texts (:mod:`cloob.search.background`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError
from cloob.search.background import check_cutoff, margins
from cloob.search.find import rows_in_blocks, text_rows, why_none
from cloob.search.records import IndexedModel
from cloob.search.store import Ids, Vectors
from cloob.search.where import Filter

if TYPE_CHECKING:
    from cloob.models.encoding import Encoder
    from cloob.search.index import Index

TEMPLATES = ("a photo of a {c}.", "{c}")
"""Prompts of a label when no templates are given."""

NONE = "none of these"

LABEL_CUTOFF = 1.75
"""Margin below which a label does not fit a picture, with ``none`` or ``multi``."""

DEFAULT_INV_TAU = 100.0
"""τ⁻¹ where neither the model's objective nor its weights have one: CLIP's bound."""

MAX_LABELS = 100_000

MAX_NUMBERS = 200_000_000
"""Pictures times labels. The work on them takes up to 8.5 times the 0.8 GB of so many probabilities."""


@dataclass(frozen=True)
class Temperature:
    """The τ⁻¹ of a softmax over labels; with the default one probabilities show an order alone."""

    inv_tau: float
    origin: Literal["objective", "weights", "default", "given"]


@dataclass(frozen=True)
class Labels:
    """Labels of some pictures."""

    names: tuple[str, ...]  # C labels
    ids: Ids  # (n,)
    probabilities: Vectors  # (n, C); rows add up to 1
    margins: Vectors | None  # (n, C); None if they were not asked for
    chosen: tuple[tuple[int, ...], ...]  # places in ``names`` for each picture, best first; none where none fits
    temperature: Temperature | None = None  # None for a head, which was fitted at its own

    def counts(self) -> dict[str, int]:
        """How many pictures each label has, ``NONE`` last if it has some."""
        counted = dict.fromkeys((*self.names, NONE), 0)
        for labels in self.chosen:
            for name in [self.names[label] for label in labels] or [NONE]:
                counted[name] += 1
        return {name: count for name, count in counted.items() if count or name != NONE}


@dataclass(frozen=True)
class LabelOptions:
    """How labels are given."""

    templates: tuple[str, ...] = TEMPLATES  # prompts with {c} in the place of the label
    multi: bool = False  # each label that fits, any number; else the best one
    none: bool = False  # the best label may not fit either
    cutoff: float = LABEL_CUTOFF  # margin from which a label fits
    inv_tau: float | None = None  # τ⁻¹ in the place of the model's


def check_labels(names: Sequence[str], options: LabelOptions) -> tuple[str, ...]:
    """Labels without the white space around them; raises InputError if one of them, or an option, is wrong."""
    check_cutoff(options.cutoff)
    labels = tuple(" ".join(name.split()) for name in names)
    if not labels or not all(labels):
        raise InputError("no labels, or an empty one; write them as cat,dog, or name a file with one a line")
    if len(labels) > MAX_LABELS:
        raise InputError(f"{len(labels):,} labels; at most {MAX_LABELS:,} are taken")
    if len(set(labels)) < len(labels):
        twice = next(label for place, label in enumerate(labels) if label in labels[:place])
        raise InputError(f"the label {twice!r} is there twice")
    for template in options.templates:
        if "{c}" not in template:
            raise InputError(f"template {template!r} has no {{c}} where the label belongs")
    if not options.templates:
        raise InputError("no template; one with {c} is wanted, such as 'a photo of a {c}.'")
    if len(labels) == 1 and not (options.none or options.multi):
        raise InputError("with one label every picture gets it; give more labels, or add --none")
    if options.inv_tau is not None and not 0 < options.inv_tau < 1e6:
        raise InputError(f"τ⁻¹ is {options.inv_tau:g}; above 0 and below 1,000,000 is wanted")
    return labels


def label_index(
    index: Index,
    labels: Sequence[str],
    options: LabelOptions | None,
    condition: Filter | None,
    asked: IndexedModel,
) -> Labels:
    """See :meth:`cloob.search.index.Index.classify`."""
    options = options or LabelOptions()
    names = check_labels(labels, options)
    ids, rows = matching_rows(index, condition, asked, len(names))
    encoder = index.encoder(asked)
    tau = _temperature(encoder, options.inv_tau)
    others = text_rows(index, asked) if options.multi or options.none else None
    of_labels = label_rows(encoder, names, options.templates)
    scores = rows @ of_labels.T
    above = None if others is None else margins(scores, rows, others)
    return choose(Labels(names, ids, softmax(tau.inv_tau * scores), above, (), tau), options)


def matching_rows(
    index: Index, condition: Filter | None, asked: IndexedModel, n_labels: int = 1
) -> tuple[Ids, Vectors]:
    """Ids and vectors of all pictures that match."""
    count = index.store.count(condition)
    if count * n_labels > MAX_NUMBERS:
        raise InputError(f"{count:,} pictures by {n_labels:,} labels are too many at once; --where takes a part")
    blocks = list(rows_in_blocks(index, asked, condition))
    if not blocks:
        raise InputError(f"no picture to label: {why_none(index.store, asked.name, condition)}")
    return np.concatenate([ids for ids, _ in blocks]), np.concatenate([rows for _, rows in blocks])


def label_rows(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Vectors:
    """(C, D) unit rows of labels, each the ensemble of its prompts."""
    from cloob.models.encoding import evaluating  # torch: labels are checked without it

    prompts = [template.replace("{c}", name) for name in names for template in templates]
    with evaluating(encoder):
        rows = encoder.encode_text(prompts).float().cpu().numpy()
    means = rows.reshape(len(names), len(templates), -1).mean(1)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float32)


def choose(labels: Labels, options: LabelOptions) -> Labels:
    """Chooses the labels of each picture by its probabilities and margins."""
    order = np.argsort(-labels.probabilities, axis=1, kind="stable")
    taken = order if options.multi else order[:, :1]
    if not (options.multi or options.none):
        return replace(labels, chosen=tuple((int(row[0]),) for row in taken))
    assert labels.margins is not None
    fitting = labels.margins >= options.cutoff
    chosen = tuple(tuple(label for label in row if fitting[place, label]) for place, row in enumerate(taken.tolist()))
    return replace(labels, chosen=chosen)


def softmax(logits: npt.NDArray[np.floating]) -> Vectors:
    """(n, C) probabilities, float32."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)


def _temperature(encoder: object, given: float | None) -> Temperature:
    """The given τ⁻¹, else that of the model's objective, else that in its weights, else a default."""
    if given is not None:
        return Temperature(given, "given")
    inv_tau = getattr(encoder, "objective_config", {}).get("inv_tau")
    if isinstance(inv_tau, int | float) and 0 < inv_tau < 1e6:
        return Temperature(float(inv_tau), "objective")
    logarithm = getattr(getattr(encoder, "model", None), "logit_scale", None)
    if logarithm is not None and -7 < (value := float(logarithm.detach())) < 14:
        return Temperature(math.exp(value), "weights")
    return Temperature(DEFAULT_INV_TAU, "default")
