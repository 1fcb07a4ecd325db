"""A head from a few examples: multinomial logistic regression on a model's rows, judged by cross-validation.

The head is numbers and names alone: a safetensors file, no pickle. Its accuracy is cross-validated with the penalty
chosen anew inside each fold, so that the choice does not flatter it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.files import write_whole
from cloob.search.sort.classify import softmax
from cloob.search.store import Vectors

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""C of scikit-learn that is chosen among: on unit rows much larger ones than on standardised features."""

_PLAIN = 100.0  # where there are too few examples to choose
_FOLDS, _INNER_FOLDS = 5, 3
_MAX_BYTES = 256 * 1024 * 1024
_FORMAT = "cloob-head-1"

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Judged:
    """What cross-validation says of a head.

    Attributes:
        accuracy: Share of the examples that are right while they are held out.
        per_label: The same, label by label.
        folds: How many parts were held out in turn.
        examples: N, how many there were.
    """

    accuracy: float
    per_label: tuple[float, ...]
    folds: int
    examples: int


@dataclass(frozen=True)
class Head:
    """A linear classifier on a model's rows.

    Attributes:
        names: C labels.
        weight: (C, D + 1) float32; the last column is the bias.
        strength: scikit-learn's C that it was fitted with.
        fingerprint: Of the model whose rows it takes.
        judged: How good it is.
    """

    names: tuple[str, ...]
    weight: Vectors
    strength: float
    fingerprint: str
    judged: Judged

    def probabilities(self, features: Vectors) -> Vectors:
        """(n, C) of (n, D) rows."""
        return softmax(features @ self.weight[:, :-1].T + self.weight[:, -1])


def fit_head(features: Vectors, labels: Integers, names: Sequence[str], fingerprint: str, seed: int = 0) -> Head:
    """Fits a head and judges it.

    Args:
        features: (N, D) unit rows of the examples.
        labels: (N,) in [0, C).
        names: C labels.
        fingerprint: Of the model.
        seed: Of the folds.

    Raises:
        InputError: Fewer than two labels, or fewer than two examples of one.
    """
    counts = np.bincount(labels, minlength=len(names))
    if len(names) < 2:
        raise InputError(f"examples of {len(names)} label; two or more are needed to tell them apart")
    if counts.min() < 2:
        name = names[int(counts.argmin())]
        raise InputError(
            f"{counts.min()} readable example of {name!r}; two or more are needed, one to fit and one to judge"
        )
    folds = int(min(_FOLDS, counts.min()))
    right = np.zeros(len(labels), bool)
    early = require("sklearn.exceptions", "train").ConvergenceWarning
    # Threads that wait for each other cost more than they bring on matrices of this size.
    with require("threadpoolctl", "train").threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", early)
        for fitted, held in _folds(labels, folds, seed):
            strength = _choose(features[fitted], labels[fitted], seed)
            weight = _fit(features[fitted], labels[fitted], len(names), strength)
            right[held] = _predict(weight, features[held]) == labels[held]
        strength = _choose(features, labels, seed)
        weight = _fit(features, labels, len(names), strength)
    per_label = tuple(float(right[labels == label].mean()) for label in range(len(names)))
    judged = Judged(float(right.mean()), per_label, folds, len(labels))
    return Head(tuple(names), weight, strength, fingerprint, judged)


def save_head(path: Path, head: Head) -> None:
    """Writes a head; whole or not at all."""
    facts = {
        "format": _FORMAT,
        "names": head.names,
        "strength": head.strength,
        "fingerprint": head.fingerprint,
        "accuracy": head.judged.accuracy,
        "per_label": head.judged.per_label,
        "folds": head.judged.folds,
        "examples": head.judged.examples,
    }
    content = require("safetensors.numpy", "train").save({"weight": head.weight}, {"head": json.dumps(facts)})
    write_whole(path, content)


def is_head(path: Path) -> bool:
    """Whether a file is what :func:`save_head` writes."""
    try:
        with require("safetensors", "train").safe_open(path, framework="numpy") as file:
            return bool(json.loads(file.metadata()["head"])["format"] == _FORMAT)
    except Exception:  # whatever another file makes the readers raise
        return False


def load_head(path: Path, fingerprint: str, dim: int) -> Head:
    """Reads a head that fits a model.

    Args:
        path: The file.
        fingerprint: Of the model.
        dim: D.

    Raises:
        InputError: No such file, no head, or one for another model.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such head; --examples DIR makes one")
    if path.stat().st_size > _MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes, too many for a head")
    safe_open = require("safetensors", "train").safe_open
    try:
        with safe_open(path, framework="numpy") as file:
            facts, weight = json.loads(file.metadata()["head"]), file.get_tensor("weight")
        judged = Judged(
            float(facts["accuracy"]), tuple(map(float, facts["per_label"])), int(facts["folds"]), int(facts["examples"])
        )
        names = tuple(map(str, facts["names"]))
        head = Head(names, weight, float(facts["strength"]), str(facts["fingerprint"]), judged)
        sound = facts["format"] == _FORMAT and weight.dtype == np.float32 and len(names) > 1
        sound = sound and weight.ndim == 2 and len(weight) == len(names) and bool(np.isfinite(weight).all())
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise InputError(f"{path}: no head, or damaged ({type(error).__name__})") from None
    if not sound:
        raise InputError(f"{path}: no head, or damaged (its numbers do not fit each other)")
    if head.fingerprint != fingerprint or weight.shape[1] != dim + 1:
        raise InputError(f"{path}: a head for another model; --examples DIR makes one for this")
    return head


def _folds(labels: Integers, folds: int, seed: int) -> list[tuple[Integers, Integers]]:
    selection = require("sklearn.model_selection", "train")
    splitter = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros((len(labels), 1)), labels))


def _choose(features: Vectors, labels: Integers, seed: int) -> float:
    """The penalty with the best accuracy on parts that are held out; the stronger one of equals."""
    present = np.bincount(labels)
    folds = int(min(_INNER_FOLDS, present[present > 0].min()))
    if folds < 2:
        return _PLAIN
    splits = _folds(labels, folds, seed)
    right = dict.fromkeys(STRENGTHS, 0)
    for strength in STRENGTHS:
        for fitted, held in splits:
            weight = _fit(features[fitted], labels[fitted], int(labels.max()) + 1, strength)
            right[strength] += int((_predict(weight, features[held]) == labels[held]).sum())
    return max(STRENGTHS, key=lambda strength: (right[strength], -strength))


def _predict(weight: Vectors, features: Vectors) -> Integers:
    logits = features @ weight[:, :-1].T + weight[:, -1]
    return np.asarray(logits.argmax(1), np.int64)


def _fit(features: Vectors, labels: Integers, n_labels: int, strength: float) -> Vectors:
    """(C, D + 1); scikit-learn keeps one row for two classes, which is split into two here."""
    linear = require("sklearn.linear_model", "train")
    model = linear.LogisticRegression(C=strength, max_iter=1000, solver="lbfgs")
    model.fit(features.astype(np.float64), labels)
    weight = np.concatenate([model.coef_, model.intercept_[:, None]], axis=1)
    if len(model.classes_) == 2:
        weight = np.concatenate([-weight / 2, weight / 2])
    placed = np.full((n_labels, weight.shape[1]), 0.0, np.float32)
    placed[:, -1] = -1e4  # a label without examples in a part is never chosen
    placed[model.classes_] = weight
    return placed
