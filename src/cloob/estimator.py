"""Two heads as an estimator in the convention of scikit-learn's
``cross_decomposition``, trained by ``train``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cloob.data.vectors import usable_pairs
from cloob.errors import InputError, TrainingFailed
from cloob.family import OBJECTIVES
from cloob.functional.ranking import mutual_ranks
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.runs import EPOCHS_FILE, read_lines
from cloob.recipes import get_recipe
from cloob.training.loop import train
from cloob.training.progress import preserved_rng
from cloob.training.run_folder import check_fraction
from cloob.training.select import TEMPORARY, read_choice

_CPU = torch.device("cpu")
_MISSING = ("None", "nan", "NaT", "<NA>")
_SCALES = ("inv_tau", "beta", "learnable_inv_tau")  # None leaves them to the objective
_SAME = (
    "head",
    "members",
    "standardise",
    "weight_decay",
    "epochs",
    "batch_size",
    "patience",
    "device",
    "precision",
)
_OTHER = {"n_components": "embed_dim", "dropout": "head_dropout", "learning_rate": "lr"}
_LEAVES = {
    **_OTHER,
    "validation_fraction": "val_split",
    **dict(zip(_SAME, _SAME, strict=True)),
}
"""The configuration's leaves by the names of parameters."""


@dataclasses.dataclass(eq=False, repr=False)
class ContrastiveHeads(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Heads for two matrices, which brings paired rows together: ``cloob train
    vectors`` in memory.

    Matrices are numpy arrays, tensors, data frames or scipy's sparse matrices. The
    second one takes the place of the targets, so ``cross_val_score`` and
    ``GridSearchCV`` split both.

    Args:
        objective: ``"auto"``: held-out pairs choose one, and join its heads with
            others; else a member of the family, or ``"cca"``, linear heads in closed
            form.
        inv_tau: Inverse temperature of the contrast; None: 10 for InfoLOOB and CLIP, 30
            for CLOOB.
        beta: Inverse temperature of the Hopfield retrieval; None for the objective's.
        learnable_inv_tau: Whether it is learned; None: as the objective does, but for
            CLIP, where it stays.
        members: Heads of other first weights, side by side with the closed form; None:
            1, with ``"auto"`` 2.
        clean: ``"auto"`` leaves out pairs that do not seem to belong together, a share
            such as 0.2 as many of them.
        head: ``"mlp"`` or ``"linear"``.
        n_components: Dimension of the shared space, to which joined heads are cut;
            None: 256 a head, and no cut.
        dropout: As ``head_dropout`` of the configuration.
        standardise: ``"column"`` divides every column by its spread, ``"one"`` all by
            one number, ``"none"`` divides by none; ``"auto"`` chooses ``"column"`` for
            columns of unlike units.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's.
        epochs: Passes over the pairs.
        batch_size: Pairs a step; 0 fits it to their number.
        validation_fraction: Share of the ids for validation, which chooses the epoch;
            0: the last epoch.
        patience: Stop after so many epochs without improvement; 0 never.
        device: As in :func:`cloob.train`.
        precision: As in :func:`cloob.train`.
        random_state: Seed of weights and order; with a number two fits are equal, bit
            for bit.

    Attributes:
        encoder_: The two heads, as ``load_model`` gives them.
        objective_: The objective's settings.
        history_: A line of numbers per epoch.
        objectives_: With ``objective="auto"`` what was tried, and what was chosen.
        n_features_in_: Columns of X.

    Example:
        >>> import numpy as np
        >>> from cloob import ContrastiveHeads
        >>> cause = np.random.default_rng(0).normal(size=(300, 4))
        >>> X, Y = np.tanh(cause @ np.ones((4, 9))), cause ** 3
        >>> heads = ContrastiveHeads(n_components=8, epochs=2, random_state=0).fit(X, Y)
        >>> x, y = heads.transform(X, Y)
        >>> x.shape, y.shape
        ((300, 8), (300, 8))
    """

    objective: str = "auto"
    _: dataclasses.KW_ONLY
    inv_tau: float | None = None
    beta: float | None = None
    learnable_inv_tau: bool | None = None
    members: int | None = None
    clean: str | float | None = None
    head: Literal["linear", "mlp"] = "mlp"
    n_components: int | None = None
    dropout: float = 0.1
    standardise: Literal["auto", "column", "one", "none"] = "auto"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 60
    batch_size: int = 0
    validation_fraction: float = 0.1
    patience: int = 5
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    random_state: int | np.random.RandomState | None = None

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Trains the heads.

        Args:
            X: (N, F) numbers.
            y: (N, F') numbers; row i belongs to row i of X. A vector is a matrix of one
                column.
            groups: (N,) ids. Pairs of one id are no negatives of each other, and are
                held out together.

        Raises:
            ValueError: A matrix or a parameter is not right.
            TrainingFailed: As of :func:`cloob.train`; also where a signal ended it.
        """
        X = validate_data(
            self, _array(X), accept_sparse="csr", order="C", ensure_min_samples=4
        )
        Y, ids = _second(y), None if groups is None else _ids(groups)
        check_consistent_length(X, Y, ids)
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31 - 1)
        with (
            tempfile.TemporaryDirectory(prefix="cloob-") as folder,
            preserved_rng(_CPU),
            _own_names(),
        ):
            pairs = usable_pairs(("X", "y"), "X and y", X, Y, ids)
            check_fraction(pairs.name, "pairs", pairs.skipped, X.shape[0], 0.0)
            member = next((name for name in OBJECTIVES if name == self.objective), None)
            config = get_recipe("vectors", objective=member).override(
                objective=self.objective
            )
            values = self.get_params(deep=False)
            values = {
                name: x.item() if isinstance(x, np.generic) else x
                for name, x in values.items()
            }  # as of a grid
            leaves = {leaf: values[name] for name, leaf in _LEAVES.items()}
            leaves |= {
                name: values[name] for name in _SCALES if values[name] is not None
            }
            leaves["clean"] = None if self.clean is None else str(self.clean)
            leaves |= {
                **TEMPORARY,
                "max_bad_fraction": 0.0,
                "seed": int(seed),
                "out": f"{folder}/run",
            }
            leaves["patience"] = leaves["patience"] if self.validation_fraction else 0
            result = train(config.override(**leaves), pairs=pairs)
            if result.stopped:
                raise TrainingFailed(
                    f"stopped by {result.stopped} after step {result.steps:,}"
                )
            self.encoder_: Any = load_model(result.run, self.device).eval()
            is_closed = self.objective == "cca"
            self.objective_ = (
                self.encoder_.objective_config
                if is_closed
                else self.encoder_.make_objective().config()
            )
            self.history_ = read_lines(result.run / EPOCHS_FILE)
            self.objectives_ = read_choice(result.run)
        self._n_features_out = self.encoder_.embed_dim
        return self

    def transform(self, X: Any, y: Any = None) -> Any:
        """The (N, D) float32 unit rows of X; with y a tuple of those of both, with X
        None those of y alone.
        """
        check_is_fitted(self)
        of_y = (
            None if y is None else _encoded(self.encoder_.encode_b, _second(y)).numpy()
        )
        if X is None and y is not None:
            return of_y
        of_x = _encoded(self.encoder_.encode_a, self._checked(X)).numpy()
        return of_x if y is None else (of_x, of_y)

    def score(self, X: Any, y: Any) -> float:
        """The mean of recall@1 in both directions.

        Equal rows of a matrix are one answer.
        """
        check_is_fitted(self)
        X, y = self._checked(X), _second(y)
        check_consistent_length(X, y)
        (first, place), (first_y, place_y) = _distinct(X), _distinct(y)
        rows, rows_y = (
            _encoded(self.encoder_.encode_a, X[first]),
            _encoded(self.encoder_.encode_b, y[first_y]),
        )
        ranks, ranks_y = mutual_ranks(
            rows, rows_y, torch.from_numpy(np.stack([place, place_y], 1))
        )
        return float(
            (
                (ranks[place] < 1).double().mean()
                + (ranks_y[place_y] < 1).double().mean()
            )
            / 2
        )

    def save(self, folder: str | Path) -> None:
        """Writes the heads, so that ``load_model``, ``cloob eval`` and ``cloob embed``
        read the folder.
        """
        check_is_fitted(self)
        save_model(Path(folder), self.encoder_, self.objective_)

    def _checked(self, X: Any) -> Any:
        return validate_data(
            self, _array(X), reset=False, accept_sparse="csr", order="C"
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = []  # float32 always
        return tags


def _array(matrix: Any) -> Any:
    return (
        matrix.detach().cpu().float().numpy() if isinstance(matrix, Tensor) else matrix
    )


def _second(matrix: Any) -> Any:
    if matrix is None:
        raise ValueError(
            "ContrastiveHeads requires y to be passed, but the target y is None"
        )
    matrix = check_array(
        _array(matrix), accept_sparse="csr", order="C", input_name="y", ensure_2d=False
    )
    return matrix.reshape(-1, 1) if matrix.ndim == 1 else matrix


def _ids(groups: Any) -> list[str]:
    """Groups as texts; ValueError where one is missing."""
    ids = [str(group) for group in groups]
    texts = [isinstance(group, str) for group in groups]
    if missing := [
        row
        for row, id in enumerate(ids)
        if not id or (id in _MISSING and not texts[row])
    ]:
        rows = f"row {missing[0]} has none" + (
            f", as have {len(missing) - 1:,} others" if missing[1:] else ""
        )
        raise ValueError(
            f"groups: {rows}; give every row an id, a unique one where it is unknown"
        )
    return ids


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Inside, an InputError calls the configuration's leaves as the estimator does."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for name, leaf in _LEAVES.items():
            message = re.sub(rf"^{leaf} is ", f"{name} is ", message)
        raise InputError(
            message.replace("--val-split", "validation_fraction")
        ) from None


def _blocks(matrix: Any) -> Iterator[np.ndarray]:
    """The rows, dense, four million numbers at a time."""
    size = max(1, (1 << 22) // matrix.shape[1])
    for start in range(0, matrix.shape[0], size):
        rows = matrix[start : start + size]
        yield rows.toarray() if hasattr(rows, "toarray") else rows


def _encoded(encode: Callable[[np.ndarray], Tensor], matrix: Any) -> Tensor:
    return torch.cat([encode(rows).cpu() for rows in _blocks(matrix)])


def _distinct(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row stands first, and the number of every row's distinct
    one.
    """
    digests = [hash(row.tobytes()) for rows in _blocks(matrix) for row in rows]
    _, first, place = np.unique(digests, return_index=True, return_inverse=True)
    return first, place
