"""Zero-shot labels: which of some names a picture is nearest to, how surely, and whether any fits.

Legend: n pictures, C labels, D the width of a model's rows, B unrelated texts.

A label's row is the mean of its prompts' rows, made a unit row again, as CLIP has it. Probabilities are the softmax of
τ⁻¹ · cosine over the labels: how the labels share a picture *given that one of them is right*. Whether one is, is
another question, and the margin answers it: how far a label's score stands above what unrelated texts reach with that
picture (:mod:`cloob.search.ask.background`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError
from cloob.search.ask.background import check_cutoff, levels
from cloob.search.store import Ids, Vectors

if TYPE_CHECKING:
    from cloob.models.encoding import Encoder

TEMPLATES = ("a photo of a {c}.", "{c}")
"""What is made of a label when no templates are given."""

NONE = "none of these"

LABEL_CUTOFF = 1.75
"""Margin below which a label does not fit a picture, with ``none`` or ``multi``."""

DEFAULT_INV_TAU = 100.0
"""τ⁻¹ where neither the model's objective nor its weights say one: CLIP's bound."""

MAX_LABELS = 100_000


@dataclass(frozen=True)
class Temperature:
    """The τ⁻¹ of a softmax over labels.

    Attributes:
        inv_tau: τ⁻¹.
        origin: ``"objective"`` that the model was trained with, ``"weights"`` (the ``logit_scale`` in them),
            ``"default"``, or ``"given"`` by the user. Only an order of the labels is known with the default.
    """

    inv_tau: float
    origin: Literal["objective", "weights", "default", "given"]


@dataclass(frozen=True)
class Labels:
    """Labels of some pictures.

    Attributes:
        names: C labels.
        ids: (n,) int64 of the pictures in an index; their places for pictures that are in none.
        probabilities: (n, C) float32; rows add up to 1.
        margins: (n, C) float32; None where no background was asked.
        chosen: For each picture the labels it gets, by place in ``names``, best first; none where none fits.
        temperature: Of the softmax; None for a head, which was fitted at its own.
    """

    names: tuple[str, ...]
    ids: Ids
    probabilities: Vectors
    margins: Vectors | None
    chosen: tuple[tuple[int, ...], ...]
    temperature: Temperature | None = None

    def counts(self) -> dict[str, int]:
        """How many pictures each label has, ``NONE`` last where it has some."""
        counted = dict.fromkeys(self.names, 0)
        for labels in self.chosen:
            for label in labels:
                counted[self.names[label]] += 1
        without = sum(not labels for labels in self.chosen)
        return counted | ({NONE: without} if without else {})


@dataclass(frozen=True)
class LabelOptions:
    """How labels are given.

    Attributes:
        templates: Prompts with ``{c}`` in the place of the label.
        multi: Each label that fits, any number; else the best one.
        none: The best label may not fit either.
        cutoff: The margin from which a label fits.
        inv_tau: τ⁻¹ in the place of the model's.
    """

    templates: tuple[str, ...] = TEMPLATES
    multi: bool = False
    none: bool = False
    cutoff: float = LABEL_CUTOFF
    inv_tau: float | None = None


def check_labels(names: Sequence[str], options: LabelOptions) -> tuple[str, ...]:
    """Labels without the white space around them.

    Raises:
        InputError: None, an empty one, two that are equal, one that no picture can do without, a template without
            ``{c}``, or a cutoff that is no number.
    """
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
    return labels


def temperature(encoder: object, given: float | None = None) -> Temperature:
    """The τ⁻¹ that a model's cosines are meant for: its objective's, else its weights' own, else a default.

    Raises:
        InputError: ``given`` is not positive and finite.
    """
    if given is not None:
        if not 0 < given < 1e6:
            raise InputError(f"τ⁻¹ is {given:g}; above 0 and below 1,000,000 is wanted")
        return Temperature(given, "given")
    inv_tau = getattr(encoder, "objective_config", {}).get("inv_tau")
    if isinstance(inv_tau, int | float) and 0 < inv_tau < 1e6:
        return Temperature(float(inv_tau), "objective")
    logarithm = getattr(getattr(encoder, "model", None), "logit_scale", None)
    if logarithm is not None and -7 < (value := float(logarithm.detach())) < 14:
        return Temperature(math.exp(value), "weights")
    return Temperature(DEFAULT_INV_TAU, "default")


def label_rows(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> Vectors:
    """(C, D) unit rows of labels, each the ensemble of its prompts."""
    from cloob.models.encoding import evaluating  # torch: labels are checked without it

    prompts = [template.replace("{c}", name) for name in names for template in templates]
    with evaluating(encoder):
        rows = encoder.encode_text(prompts).float().cpu().numpy()
    means = rows.reshape(len(names), len(templates), -1).mean(1)
    return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float32)


def label_pictures(
    ids: Ids,
    features: Vectors,
    names: Sequence[str],
    rows: Vectors,
    others: Vectors | None,
    options: LabelOptions,
    tau: Temperature,
) -> Labels:
    """Labels of pictures whose rows are there.

    Args:
        ids: (n,).
        features: (n, D) unit rows.
        names: C.
        rows: (C, D), see :func:`label_rows`.
        others: (B, D) of the background; wanted for ``multi`` and ``none``.
        options: How.
        tau: Of the softmax.

    Raises:
        InputError: D is another one for pictures and labels.
    """
    if features.shape[1] != rows.shape[1]:
        widths = f"{features.shape[1]} and {rows.shape[1]}"
        raise InputError(f"vectors of widths {widths}: the model is not the one of the index")
    scores = features @ rows.T
    probabilities = softmax(tau.inv_tau * scores)
    above = None
    if others is not None:
        above = levels(features, others).margins(scores)
    return chosen_labels(Labels(tuple(names), ids, probabilities, above, (), tau), options)


def chosen_labels(labels: Labels, options: LabelOptions) -> Labels:
    """The labels that each picture gets by its probabilities and margins."""
    order = np.argsort(-labels.probabilities, axis=1, kind="stable")
    taken = order if options.multi else order[:, :1]
    if not (options.multi or options.none):
        return replace(labels, chosen=tuple((int(row[0]),) for row in taken))
    assert labels.margins is not None
    fitting = labels.margins >= options.cutoff
    chosen = tuple(
        tuple(int(label) for label in row if fitting[place, label]) for place, row in enumerate(taken.tolist())
    )
    return replace(labels, chosen=chosen)


def softmax(logits: npt.NDArray[np.floating]) -> Vectors:
    """(n, C) probabilities, float32."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)
