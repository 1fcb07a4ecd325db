"""Labels of pictures, zero-shot by the labels' names.

Legend: n pictures, C labels, D the width of a model's rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloob.errors import InputError
from cloob.search.matrix import Ids, Vectors
from cloob.search.models import IndexWithModel
from cloob.search.unrelated import margins, text_rows
from cloob.search.where import Filter

# prompts of a label when no templates are given
TEMPLATES = (
    "a photo of a {c}.",
    "{c}",
)
NONE = "none of these"
LABEL_CUTOFF = 1.75
DEFAULT_INV_TAU = (
    100.0  # CLIP's bound, where neither the model's objective nor its weights have τ⁻¹
)
# pictures times labels: the work on them takes up to 8.5 times their 0.8 GB
MAX_NUMBERS = 200_000_000


@dataclass(frozen=True)
class Labels:
    names: tuple[str, ...]  # C labels
    ids: Ids  # (n,)
    probabilities: Vectors  # (n, C); rows add up to 1
    margins: Vectors | None  # (n, C); None if the options need none
    # places in ``names`` per picture, best first; none where none fits
    chosen: tuple[tuple[int, ...], ...]
    inv_tau: float  # τ⁻¹ of the softmax
    # the model does not say its τ⁻¹, so that probabilities show an order alone
    by_default: bool = False

    def counts(self) -> dict[str, int]:
        """How many pictures every label has, ``NONE`` last."""
        names = (*self.names, NONE)
        counted = Counter(
            names[label]
            for chosen in self.chosen
            for label in chosen or [len(self.names)]
        )
        return {name: counted[name] for name in names}


@dataclass(frozen=True)
class LabelOptions:
    templates: tuple[str, ...] = TEMPLATES  # prompts with {c} in the place of the label
    multi: bool = False  # every label that fits, any number; else the best one
    none: bool = False  # the best label may not fit either
    cutoff: float = LABEL_CUTOFF  # margin of what fits, with ``none`` or ``multi``


def check_labels(names: Sequence[str], options: LabelOptions) -> tuple[str, ...]:
    """Labels without the white space around them; raises InputError if one of them, or
    an option, is wrong.
    """
    labels = tuple(" ".join(name.split()) for name in names)
    if not labels or not all(labels):
        raise InputError(
            "no labels, or an empty one; write them as cat,dog, or name a file"
        )
    if NONE in labels:
        raise InputError(f"the label {NONE!r} is what a picture gets that none fits")
    for label, count in Counter(labels).items():
        if count > 1:
            raise InputError(f"the label {label!r} is there twice")
    _check_templates(options.templates)
    if len(labels) == 1 and not (options.none or options.multi):
        raise InputError(
            "with one label every picture gets it; give more labels, or add --none"
        )
    return labels


def _check_templates(templates: Sequence[str]) -> None:
    if not templates:
        raise InputError("no templates; a label needs a prompt")
    for template in templates:
        if "{c}" not in template:
            raise InputError(
                f"template {template!r} has no {{c}} where the label belongs"
            )


def classify_index(
    index: IndexWithModel,
    labels: Sequence[str],
    options: LabelOptions,
    where: Filter | None,
) -> Labels:
    """Chooses labels for every picture that a filter lets through."""
    names = check_labels(labels, options)
    ids, rows = _filtered_rows(index, len(names), where)
    models_inv_tau = index.model().inv_tau
    inv_tau = models_inv_tau or DEFAULT_INV_TAU
    scores = rows @ _label_rows(index, names, options.templates).T
    label_margins = None
    if options.multi or options.none:
        label_margins = margins(scores, rows, text_rows(index))
    probabilities = _softmax(inv_tau * scores)
    chosen = _chosen(probabilities, label_margins, options)
    return Labels(
        names,
        ids,
        probabilities,
        label_margins,
        chosen,
        inv_tau,
        by_default=models_inv_tau is None,
    )


def _softmax(logits: Vectors) -> Vectors:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)


def _chosen(
    probabilities: Vectors, label_margins: Vectors | None, options: LabelOptions
) -> tuple[tuple[int, ...], ...]:
    """The places of the labels of every picture, best first, of those that fit."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    candidates = (order if options.multi else order[:, :1]).tolist()
    if label_margins is None:
        return tuple(map(tuple, candidates))
    fits = label_margins >= options.cutoff
    return tuple(
        tuple(label for label in row if fits[place, label])
        for place, row in enumerate(candidates)
    )


def _filtered_rows(
    index: IndexWithModel, n_labels: int, where: Filter | None
) -> tuple[Ids, Vectors]:
    """Ids and vectors of all pictures that a filter lets through; refuses too many."""
    ids = index.store.ids(where)
    if not len(ids):
        raise InputError(f"no picture: {index.store.why_none()}")
    if len(ids) * n_labels > MAX_NUMBERS:
        raise InputError(
            f"{len(ids):,} pictures by {n_labels:,} labels are too many at once;"
            " --where takes a part"
        )
    return ids, index.store.vectors(ids)


def _label_rows(
    index: IndexWithModel, names: Sequence[str], templates: Sequence[str]
) -> Vectors:
    """(C, D) unit rows of labels, each the ensemble of its prompts."""
    prompts = [
        template.replace("{c}", name) for name in names for template in templates
    ]
    rows = index.embedder().texts(prompts)
    means = rows.reshape(len(names), len(templates), -1).mean(1)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray(means / np.maximum(lengths, 1e-12), np.float32)
