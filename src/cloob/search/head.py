"""A head from a few examples: logistic regression on a model's rows, judged by cross-validation.

A head is kept as numbers and names in a safetensors file. Its accuracy is cross-validated with the penalty chosen anew
inside each fold, so that the choice does not flatter it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cloob.errors import InputError, require
from cloob.files import write_whole
from cloob.search.classify import TEMPLATES, LabelOptions, Labels, choose, label_rows, matching_rows, softmax
from cloob.search.find import Where, read_filter
from cloob.search.store import Vectors

if TYPE_CHECKING:
    from cloob.search.index import Index

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""C of scikit-learn to choose from: on unit rows much larger ones than on standardised features."""

_DEFAULT_STRENGTH = 100.0  # with too few examples to choose
_FOLDS, _INNER_FOLDS = 5, 3
_FORMAT = "cloob-head-1"


@dataclass(frozen=True)
class Judged:
    """What cross-validation says of a head."""

    accuracy: float  # over the examples, each held out once
    per_label: tuple[float, ...]
    folds: int
    examples: int


@dataclass(frozen=True)
class Head:
    """A linear classifier on a model's rows."""

    names: tuple[str, ...]  # C labels
    weight: Vectors  # (C, D + 1) float32; the last column is the bias
    strength: float  # scikit-learn's C
    fingerprint: str  # of the model
    judged: Judged


def fit_head(rows: Vectors, labels: npt.NDArray[np.int64], names: Sequence[str], fingerprint: str) -> Head:
    """Fits a head to (N, D) unit rows with (N,) labels in [0, C), and judges it."""
    counts = np.bincount(labels, minlength=len(names))
    if len(names) < 2:
        raise InputError(f"examples of {len(names)} label; two or more are needed to tell them apart")
    if counts.min() < 2:
        name = names[int(counts.argmin())]
        raise InputError(
            f"{counts.min()} readable example of {name!r}; two or more are needed, one to fit and one to judge"
        )
    selection, folds = require("sklearn.model_selection", "train"), int(min(_FOLDS, counts.min()))
    plain = require("sklearn.linear_model", "train").LogisticRegression(C=_DEFAULT_STRENGTH, max_iter=1000)
    model, outer = plain, selection.StratifiedKFold(folds, shuffle=True, random_state=0)
    if counts.min() > _FOLDS:  # each inner fold has one of each label
        inner = selection.StratifiedKFold(_INNER_FOLDS, shuffle=True, random_state=0)
        model = selection.GridSearchCV(plain, {"C": STRENGTHS}, cv=inner)
    early = require("sklearn.exceptions", "train").ConvergenceWarning
    # Threads that wait for each other cost more than they bring on matrices of this size.
    with require("threadpoolctl", "train").threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", early)
        right = selection.cross_val_predict(model, rows.astype(np.float64), labels, cv=outer) == labels
        model.fit(rows.astype(np.float64), labels)
    per_label = tuple(float(right[labels == label].mean()) for label in range(len(names)))
    judged = Judged(float(right.mean()), per_label, folds, len(labels))
    best = getattr(model, "best_estimator_", model)
    return Head(tuple(names), _weight(best), float(best.C), fingerprint, judged)


def _weight(model: Any) -> Vectors:
    """(C, D + 1); scikit-learn keeps one row for two classes, which is split into two here."""
    weight = np.concatenate([model.coef_, model.intercept_[:, None]], axis=1)
    return np.ascontiguousarray(np.concatenate([-weight / 2, weight / 2]) if len(weight) == 1 else weight, np.float32)


def head_of(index: Index, folder: Path) -> tuple[Head, float]:
    """A head from an index of a folder with a sub-folder for each label, and zero-shot's accuracy on the examples."""
    asked = index.model()
    ids, rows = matching_rows(index, None, asked)
    root = Path(os.path.abspath(folder))  # noqa: PTH100 - as the index has it: links stay
    names: list[str] = []
    for item in index.items(ids.tolist()):
        path = root / item.path
        parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if len(parts) < 2:
            raise InputError(f"{item.path}: lies in no folder of a label; {folder} has to hold a folder for each label")
        names.append(parts[0])
    labels = sorted(set(names))
    numbers = np.array([labels.index(name) for name in names], np.int64)
    head = fit_head(rows, numbers, labels, asked.fingerprint)
    spoken = [label.replace("_", " ").replace("-", " ") for label in labels]
    of_labels = label_rows(index.encoder(asked), spoken, TEMPLATES)
    return head, float(((rows @ of_labels.T).argmax(1) == numbers).mean())


def label_by_head(index: Index, head: Head, *, where: Where = None, model: str | None = None) -> Labels:
    """The label of each picture that matches, by a head."""
    ids, rows = matching_rows(index, read_filter(index, where), index.model(model), len(head.names))
    probabilities = softmax(rows @ head.weight[:, :-1].T + head.weight[:, -1])
    return choose(Labels(head.names, ids, probabilities, None, ()), LabelOptions())


def save_head(path: Path, head: Head) -> None:
    """Writes a head; whole or not at all."""
    facts = {name: value for name, value in asdict(head).items() if name != "weight"} | {"format": _FORMAT}
    write_whole(path, require("safetensors.numpy", "train").save({"weight": head.weight}, {"head": json.dumps(facts)}))


def is_head(path: Path) -> bool:
    """Whether a file is what :func:`save_head` writes."""
    try:
        return bool(_read(path)[0]["format"] == _FORMAT)
    except Exception:  # whatever another file makes the readers raise
        return False


def load_head(path: Path, fingerprint: str, dim: int) -> Head:
    """Reads a head that fits a model of D = ``dim``."""
    if not path.is_file():
        raise InputError(f"{path}: no such head; --examples DIR makes one")
    try:
        facts, weight = _read(path)
        if facts.pop("format") != _FORMAT or weight.shape[0] != len(facts["names"]) or not np.isfinite(weight).all():
            raise ValueError("its numbers do not fit each other")
        judged = Judged(**facts["judged"] | {"per_label": tuple(facts["judged"]["per_label"])})
        head = Head(**facts | {"names": tuple(facts["names"]), "weight": weight, "judged": judged})
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise InputError(f"{path}: no head, or damaged ({type(error).__name__})") from None
    if head.fingerprint != fingerprint or weight.shape[1] != dim + 1:
        raise InputError(f"{path}: a head for another model; --examples DIR makes one for this")
    return head


def _read(path: Path) -> tuple[dict[str, Any], Vectors]:
    with require("safetensors", "train").safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["head"]), file.get_tensor("weight")
