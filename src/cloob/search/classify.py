"""Labels of pictures: zero-shot by the labels' names, or by a logistic regression that
was fitted to a few examples.

Legend: n pictures, C labels, D the width of a model's rows.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, refuse, require
from cloob.files import write_whole
from cloob.search.find import View, margins
from cloob.search.query import TorchEmbedder
from cloob.search.store import Ids, Vectors

TEMPLATES = (
    "a photo of a {c}.",
    "{c}",
)  # prompts of a label when no templates are given
NONE = "none of these"
DEFAULT_INV_TAU = (
    100.0  # CLIP's bound, where neither the model's objective nor its weights have τ⁻¹
)
# pictures times labels: the work on them takes up to 8.5 times their 0.8 GB
MAX_NUMBERS = 200_000_000
STRENGTHS = (
    1.0,
    10.0,
    100.0,
    1000.0,
)  # scikit-learn's C to choose from, else the third: unit rows take large ones
_FOLDS = 5
_FORMAT = "cloob-head-1"


@dataclass(frozen=True)
class Labels:
    names: tuple[str, ...]  # C labels
    ids: Ids  # (n,)
    probabilities: Vectors  # (n, C); rows add up to 1
    margins: Vectors | None  # (n, C); None if the options need none
    chosen: tuple[
        tuple[int, ...], ...
    ]  # places in ``names`` per picture, best first; none where none fits
    inv_tau: float | None = None  # None for a head, which was fitted at one
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
    cutoff: float = 1.75  # margin from which a label fits, with ``none`` or ``multi``
    inv_tau: float | None = None  # τ⁻¹ in the place of the model's


@dataclass(frozen=True)
class LabelHead:
    names: Sequence[str]  # C labels
    weight: Vectors  # (C, D + 1) float32; the last column is the bias
    strength: float  # scikit-learn's C
    fingerprint: str  # of the model
    accuracy: float  # over the examples, cross-validated
    folds: int
    examples: int


def check_labels(names: Sequence[str], options: LabelOptions) -> tuple[str, ...]:
    """Labels without the white space around them; raises InputError if one of them, or
    an option, is wrong.
    """
    labels = tuple(" ".join(name.split()) for name in names)
    twice = [label for label, count in Counter(labels).items() if count > 1]
    without = [template for template in options.templates if "{c}" not in template]
    alone = len(labels) == 1 and not (options.none or options.multi)
    refuse(
        {
            "no labels, or an empty one; write them as cat,dog, or name a file": (
                not all(labels or [""])
            ),
            f"the label {''.join(twice[:1])!r} is there twice": twice,
            f"template {''.join(without[:1])!r} has no {{c}} where the label belongs": (
                without or not options.templates
            ),
            "with one label every picture gets it; give more labels, or add --none": (
                alone
            ),
        }
    )
    return labels


def label_index(view: View, labels: Sequence[str], options: LabelOptions) -> Labels:
    names = check_labels(labels, options)
    ids, rows = _all_rows(view, len(names))
    encoder = view.models.encoder(view.model)
    logarithm = getattr(getattr(encoder, "model", None), "logit_scale", None)
    in_weights = 0 if logarithm is None else math.exp(float(logarithm.detach()))
    known = (
        options.inv_tau
        or getattr(encoder, "objective_config", {}).get("inv_tau")
        or in_weights
    )
    inv_tau = float(known or DEFAULT_INV_TAU)
    scores = rows @ _label_rows(encoder, names, options.templates).T
    above = (
        margins(scores, rows, view.text_rows())
        if options.multi or options.none
        else None
    )
    return Labels(
        names, ids, *_chosen(inv_tau * scores, above, options), inv_tau, not known
    )


def label_by_head(view: View, head: LabelHead) -> Labels:
    ids, rows = _all_rows(view, len(head.names))
    logits = rows @ head.weight[:, :-1].T + head.weight[:, -1]
    return Labels(tuple(head.names), ids, *_chosen(logits, None, LabelOptions()))


def _chosen(
    logits: Any, above: Vectors | None, options: LabelOptions
) -> tuple[Vectors, Vectors | None, Any]:
    """The softmax of logits (n, C), the margins, and the labels that these choose."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probabilities = np.asarray(shifted / shifted.sum(1, keepdims=True), np.float32)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    chosen = (order if options.multi else order[:, :1]).tolist()
    if above is not None:
        fits = above >= options.cutoff
        chosen = [
            [label for label in row if fits[place, label]]
            for place, row in enumerate(chosen)
        ]
    return probabilities, above, tuple(map(tuple, chosen))


def _all_rows(view: View, n_labels: int = 1) -> tuple[Ids, Vectors]:
    """Ids and vectors of all pictures."""
    count = view.store.count(view.where)
    if count * n_labels > MAX_NUMBERS:
        raise InputError(
            f"{count:,} pictures by {n_labels:,} labels are too many at once; --where"
            " takes a part"
        )
    blocks = list(view.blocks())
    view.check_some(len(blocks))
    ids = np.array([item.id for items, _ in blocks for item in items], np.int64)
    return ids, np.concatenate([rows for _, rows in blocks])


def _label_rows(
    encoder: Any, names: Sequence[str], templates: Sequence[str]
) -> Vectors:
    """(C, D) unit rows of labels, each the ensemble of its prompts."""
    prompts = [
        template.replace("{c}", name) for name in names for template in templates
    ]
    means = (
        TorchEmbedder(encoder)
        .texts(prompts)
        .reshape(len(names), len(templates), -1)
        .mean(1)
    )
    return np.asarray(
        means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12),
        np.float32,
    )


def fit_head(
    rows: Vectors, labels: npt.NDArray[np.int64], names: Sequence[str], fingerprint: str
) -> LabelHead:
    """Fits a head to (N, D) unit rows with (N,) labels in [0, C), and judges it."""
    counts = np.bincount(labels, minlength=len(names))
    if len(names) < 2 or counts.min() < 2:
        name = names[int(counts.argmin())]
        raise InputError(
            f"{counts.min()} readable example of {name!r}; two labels with two examples"
            " each are needed"
        )
    selection, folds = (
        require("sklearn.model_selection", "train"),
        int(min(_FOLDS, counts.min())),
    )
    model = require("sklearn.linear_model", "train").LogisticRegression(
        C=STRENGTHS[2], max_iter=1000
    )
    outer, inner = (
        selection.StratifiedKFold(n, shuffle=True, random_state=0) for n in (folds, 3)
    )
    if counts.min() > _FOLDS:  # each inner fold has one of every label
        model = selection.GridSearchCV(model, {"C": STRENGTHS}, cv=inner)
    # Threads that wait for each other cost more than they bring on matrices of this
    # size.
    with (
        require("threadpoolctl", "train").threadpool_limits(1),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter(
            "ignore", require("sklearn.exceptions", "train").ConvergenceWarning
        )
        right = (
            selection.cross_val_predict(
                model, rows.astype(np.float64), labels, cv=outer
            )
            == labels
        )
        model.fit(rows.astype(np.float64), labels)
    best = getattr(model, "best_estimator_", model)
    weight = np.concatenate([best.coef_, best.intercept_[:, None]], axis=1)
    if len(weight) == 1:  # scikit-learn keeps one row for two classes
        weight = np.concatenate([-weight / 2, weight / 2])
    weight = np.ascontiguousarray(weight, np.float32)
    return LabelHead(
        tuple(names),
        weight,
        float(best.C),
        fingerprint,
        float(right.mean()),
        folds,
        len(labels),
    )


def head_of(view: View, folder: Path) -> tuple[LabelHead, float]:
    """A head from an index of a folder with a sub-folder per label, and zero-shot's
    accuracy on the examples.
    """
    ids, rows = _all_rows(view)
    root = os.path.abspath(folder)  # noqa: PTH100
    names: list[str] = []
    for item in view.store.items(ids):
        label, _, below = os.path.relpath(item.path, root).partition(os.sep)
        if not below or label == os.pardir:
            raise InputError(
                f"{item.path}: lies in no folder of a label; {folder} has to hold a"
                " folder for each label"
            )
        names.append(label)
    labels, numbers = np.unique(names, return_inverse=True)
    head = fit_head(rows, numbers, labels.tolist(), view.model.fingerprint)
    spoken = [label.replace("_", " ").replace("-", " ") for label in labels.tolist()]
    of_labels = _label_rows(view.models.encoder(view.model), spoken, TEMPLATES)
    return head, float(((rows @ of_labels.T).argmax(1) == numbers).mean())


def save_head(path: Path, head: LabelHead) -> None:
    facts = {
        name: value for name, value in asdict(head).items() if name != "weight"
    } | {"format": _FORMAT}
    write_whole(
        path,
        require("safetensors.numpy", "train").save(
            {"weight": head.weight}, {"head": json.dumps(facts)}
        ),
    )


def read_head(path: Path) -> LabelHead | None:
    """The head in a file; None for any other file."""
    try:
        with require("safetensors", "train").safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["head"]) | {
                "weight": file.get_tensor("weight")
            }
        return LabelHead(**facts) if facts.pop("format") == _FORMAT else None
    except Exception:  # whatever another file makes the readers raise
        return None


def load_head(path: Path, fingerprint: str) -> LabelHead:
    head = read_head(path)
    if head is None or head.fingerprint != fingerprint:
        raise InputError(
            f"{path}: no such head for this model (or damaged); --examples DIR"
            " makes one"
        )
    return head
