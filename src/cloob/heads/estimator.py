"""Two heads as an estimator in the convention of scikit-learn's
``cross_decomposition``: a face over ``fit_heads``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
)
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cloob.data.table import Matrix, Table, TableEncoding, Unencoded, is_table
from cloob.distributed import resolve_device
from cloob.errors import InputError
from cloob.functional.bootstrap import bootstrap_interval
from cloob.heads.arrays import fit_heads
from cloob.heads.fitted import recalls_of_ids
from cloob.heads.matrix import as_array, as_rows, pairs_of
from cloob.heads.pipeline import piped_rows
from cloob.heads.settings import CLOSED_FORMS, HeadSettings
from cloob.models.folder import save_model
from cloob.models.load import load_model
from cloob.models.vectors import VectorEncoder, embed_rows, require_vectors

SETTINGS = {
    "n_components": "embed_dim",
    "learning_rate": "lr",
    "validation_fraction": "val_split",
    "random_state": "seed",
}
"""Names of settings, by the parameters that are called otherwise."""
ROWS = 4096  # that are compared at once
Float32 = npt.NDArray[np.float32]


@dataclasses.dataclass(eq=False, repr=False)
class ContrastiveHeads(
    ClassNamePrefixFeaturesOutMixin,  # type: ignore[misc]
    TransformerMixin,  # type: ignore[misc]
    BaseEstimator,  # type: ignore[misc]
):
    """Heads for two matrices, which bring paired rows together: ``cloob train vectors``
    in memory.

    Matrices are numpy arrays, tensors or scipy's sparse matrices; or data frames, whose
    dates, categories and missing cells become numbers as the training rows say. The
    second one takes the place of the targets, so ``cross_val_score`` and
    ``GridSearchCV`` split both.

    Args:
        objective: ``"auto"``: held-out pairs choose one, and join its heads with
            others; else a member of the family, or ``"cca"``, linear heads in closed
            form, or ``"kcca"``, the same of random waves of the columns.
        inv_tau: Inverse temperature of the contrast; None: 10 for InfoLOOB and CLIP, 30
            for CLOOB.
        beta: Inverse temperature of the Hopfield retrieval; None for the objective's.
        learnable_inv_tau: Whether it is learned; None: as the objective does, but for
            CLIP, where it stays.
        members: Heads of other first weights, side by side with the closed form; None:
            1, with ``"auto"`` 2.
        clean: ``"auto"`` leaves out pairs that are more probably wrong than right.
        head: ``"mlp"`` or ``"linear"``; None: ``"mlp"``.
        n_components: Dimension of the shared space, to which joined heads are cut;
            None: 256 a head, and no cut.
        dropout: Before a linear head's matrix, or in an mlp's hidden layer; None: 0.1.
        standardise: ``"column"`` divides every column by its spread, ``"one"`` all by
            one number, ``"none"`` divides by none; ``"auto"`` chooses, and whether a
            closed form takes roots, logarithms or ranks.
        start: ``"closed-form"``: heads begin with the matrices of ``"cca"``;
            ``"random"``; None: random, ``"auto"`` tries both.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's.
        epochs: Passes over the pairs.
        batch_size: Pairs a step; 0 fits it to their number, and the patience to few
            columns.
        validation_fraction: Share of the ids or groups for validation, which chooses
            the epoch; 0: the last epoch.
        patience: Stop after so many epochs without improvement; 0 never. None: 5
            where pairs are held out.
        refit: After choosing, fit anew on all pairs; None: where pairs are held out.
            ``history_`` has the recall of the held-out pairs before that.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
        random_state: Seed of weights and order; with a number two fits are equal, bit
            for bit. The closed form draws nothing.
        x_pipeline: A transformer of scikit-learn that makes numbers of X; a clone is
            fitted to the training rows, without the held-out ones.
        y_pipeline: The same for y.

    Attributes:
        encoder_: The two heads, as ``load_model`` gives them.
        objective_: The objective's settings.
        history_: A line of numbers per epoch.
        decisions_: What held-out pairs chose: the closed form's ridge; with
            ``objective="auto"`` what was tried, chosen and joined.
        embedded_y_: (N, D) unit rows of the fitted y, which ``predict`` looks among.
        x_pipeline_: The fitted pipeline of X; None without one.
        y_pipeline_: That of y.
        n_features_in_: Columns of X.

    Example:
        >>> import numpy as np
        >>> from cloob import ContrastiveHeads
        >>> cause = np.random.default_rng(0).normal(size=(300, 4))
        >>> X, Y = np.tanh(cause @ np.ones((4, 9))), cause**3
        >>> heads = ContrastiveHeads("infoloob", n_components=8, epochs=2).fit(X, Y)
        >>> x, y = heads.transform(X, Y)
        >>> x.shape, y.shape, heads.predict(X).shape
        ((300, 8), (300, 8), (300,))
    """

    objective: str = "auto"
    _: dataclasses.KW_ONLY
    inv_tau: float | None = None
    beta: float | None = None
    learnable_inv_tau: bool | None = None
    members: int | None = None
    clean: Literal["auto"] | None = None
    head: Literal["linear", "mlp"] | None = None
    n_components: int | None = None
    dropout: float | None = None
    standardise: Literal["auto", "column", "one", "none"] = "auto"
    start: Literal["closed-form", "random"] | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 60
    batch_size: int = 0
    validation_fraction: float = 0.1
    patience: int | None = None
    refit: bool | None = None
    device: str = "auto"
    random_state: int | np.random.RandomState | None = None
    x_pipeline: object = None
    y_pipeline: object = None

    def fit(
        self,
        X: object,
        y: object,
        ids: object = None,
        groups: object = None,
        sample_weight: object = None,
    ) -> Self:
        """Fits the heads.

        Args:
            X: (N, F) numbers, a data frame, or what ``x_pipeline`` takes.
            y: (N, F') numbers, or as X; row i belongs to row i of X. A vector is a
                matrix of one column.
            ids: (N,) integers or texts: rows of one id are one sample. They are no
                negatives of each other, any of them is a right answer, and they are
                held out together. None: equal rows of a side are one.
            groups: (N,) integers or texts: rows of one group (patient, plate, week) are
                held out together, and are negatives and answers as any others.
            sample_weight: (N,) numbers of 0 or more, how much every pair counts.

        Raises:
            ValueError: A matrix or a parameter is not right.
            TrainingFailed: The loss is not finite.
        """
        rows_x, rows_y = self._rows_of_x(X, reset=True), self._rows_of_y(y)
        check_consistent_length(X, y, ids, groups, sample_weight)
        with _parameter_names():
            fitted = fit_heads(
                rows_x,
                rows_y,
                ids,
                self.validation_fraction,
                self._settings(),
                groups=groups,
                weights=sample_weight,
            )
        of_x, of_y = fitted.encodings
        # what a fitted pipeline encodes by is the pipeline itself
        self.x_pipeline_ = None if self.x_pipeline is None else of_x
        self.y_pipeline_ = None if self.y_pipeline is None else of_y
        encoder = VectorEncoder(*fitted.heads, fitted.objective, fitted.encodings)
        self.encoder_ = encoder.to(resolve_device(self.device)).eval()
        self.objective_ = fitted.objective
        self.history_ = fitted.history
        self.decisions_ = fitted.decisions
        embedded_y = embed_rows(self.encoder_, "b", rows_y)
        self.embedded_y_: Float32 | None = embedded_y.numpy()
        return self

    def transform(
        self, X: object, y: object = None
    ) -> Float32 | tuple[Float32, Float32]:
        """The (N, D) float32 unit rows of X; with y a tuple of those of both, with X
        None those of y alone.
        """
        check_is_fitted(self)
        if X is None and y is not None:
            return self._unit_rows_of_y(y).numpy()
        of_x = self._unit_rows_of_x(X).numpy()
        return of_x if y is None else (of_x, self._unit_rows_of_y(y).numpy())

    def predict(self, X: object, y: object = None) -> npt.NDArray[np.int64]:
        """(N,) int64: the row of the fitted y, or of the one that is given, that is
        nearest to every row of X.
        """
        check_is_fitted(self)
        of_x = self._unit_rows_of_x(X)
        if y is not None:
            gallery = self._unit_rows_of_y(y)
        elif self.embedded_y_ is not None:
            gallery = torch.from_numpy(self.embedded_y_)
        else:
            raise ValueError("a loaded model has no fitted y; give predict one")
        places = [(block @ gallery.T).argmax(1) for block in torch.split(of_x, ROWS)]
        return torch.cat(places).numpy()

    def score_samples(self, X: object, y: object) -> Float32:
        """(N,) float32 cosines of paired rows: how well each pair belongs together."""
        check_is_fitted(self)
        of_x, of_y = self._unit_rows_of_x(X), self._unit_rows_of_y(y)
        check_consistent_length(of_x, of_y)
        return (of_x * of_y).sum(1).numpy()

    def score(self, X: object, y: object, ids: object = None) -> float:
        """The mean of recall@1 in both directions, over ids.

        Rows of one id are one answer; without ids equal rows of a side are one. Other
        rows that score the same as the right one are ahead of it.
        """
        return self.score_interval(X, y, ids)[0]

    def score_interval(
        self, X: object, y: object, ids: object = None, groups: object = None
    ) -> tuple[float, float, float]:
        """``score`` with its 95 % bootstrap interval: (score, low, high). It is over
        ids, or over groups (patients, plates, weeks) where these are given.
        """
        check_is_fitted(self)
        check_consistent_length(X, y, ids, groups)
        rows_x, rows_y = self._rows_of_x(X), self._rows_of_y(y)
        pairs = pairs_of(rows_x, rows_y, ids, groups, names=("X", "y"))
        of_x = embed_rows(self.encoder_, "a", rows_x)
        of_y = embed_rows(self.encoder_, "b", rows_y)
        ids = torch.from_numpy(pairs.ids)
        recall = recalls_of_ids(of_x, of_y, ids, at=[1]).mean(0)
        low, high = bootstrap_interval(recall, groups=pairs.units_of_ids())
        return float(recall.mean()), low, high

    def save(self, folder: str | Path) -> None:
        """Writes the heads, so that ``load_model``, ``cloob eval`` and ``cloob embed``
        read the folder.
        """
        check_is_fitted(self)
        save_model(Path(folder), self.encoder_, self.objective_)

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Self:
        """The heads of a run of ``cloob train vectors``, or of a folder that ``save``
        wrote; ``predict`` needs a y then.
        """
        encoder = require_vectors(load_model(folder, device).eval())
        heads = cls(device=device)
        heads.encoder_ = encoder
        heads.objective_ = encoder.objective_config
        heads.history_, heads.decisions_ = [], {}
        heads.embedded_y_ = None
        heads.n_features_in_ = encoder.heads[0].options["features"]
        table = encoder.encodings[0]
        if isinstance(table, TableEncoding):
            names = [column.name for column in table.columns]
            heads.n_features_in_ = len(names)
            heads.feature_names_in_ = np.array(names, object)
        return heads

    @property
    def _n_features_out(self) -> int:
        """What scikit-learn calls the columns of the rows that come out by."""
        return self.encoder_.embed_dim

    def _settings(self) -> HeadSettings:
        """The settings of a fit from scikit-learn's parameters, of which three depend
        on others where they are left out.
        """
        values = self.get_params(deep=False)
        for name in ("x_pipeline", "y_pipeline", "validation_fraction"):
            del values[name]
        for name, value in values.items():
            if isinstance(value, np.generic):  # as of a grid
                values[name] = value.item()
        is_closed = self.objective in CLOSED_FORMS
        holds_out = bool(self.validation_fraction)
        if self.refit is None:
            values["refit"] = holds_out
        if self.patience is None:  # a closed form takes its default alone
            values["patience"] = 5 if holds_out or is_closed else 0
        values["random_state"] = 0 if is_closed else _seed_of(self.random_state)
        return HeadSettings(**{SETTINGS.get(k, k): v for k, v in values.items()})

    def _rows_of_x(self, X: object, *, reset: bool = False) -> Matrix | Unencoded:
        """X as numbers, as a table or as what its pipeline takes; scikit-learn checks
        it, and with ``reset`` notes its columns.
        """
        if self.x_pipeline is None and not is_table(X):
            matrix: Matrix = validate_data(
                self,
                _without_tensor(X),
                reset=reset,
                accept_sparse="csr",
                order="C",
                ensure_min_samples=4 if reset else 1,
            )
            return matrix
        validate_data(self, X, reset=reset, skip_check_array=True)
        if self.x_pipeline is not None:
            return piped_rows("X", X, self.x_pipeline)
        return Table.of("X", X)

    def _rows_of_y(self, y: object) -> Matrix | Unencoded:
        """Y as numbers, as a table or as what its pipeline takes."""
        if y is None:
            raise ValueError(
                "ContrastiveHeads requires y to be passed, but the target y is None"
            )
        if self.y_pipeline is not None:
            return piped_rows("y", y, self.y_pipeline)
        if not is_table(y):
            y = check_array(
                _without_tensor(y),
                accept_sparse="csr",
                order="C",
                input_name="y",
                ensure_2d=False,
            )
        return as_rows("y", y)

    def _unit_rows_of_x(self, X: object) -> Tensor:
        """(n, D) on the CPU."""
        return embed_rows(self.encoder_, "a", self._rows_of_x(X))

    def _unit_rows_of_y(self, y: object) -> Tensor:
        """(n, D) on the CPU."""
        return embed_rows(self.encoder_, "b", self._rows_of_y(y))

    def __sklearn_tags__(self) -> object:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.required = tags.target_tags.multi_output = True
        tags.transformer_tags.preserves_dtype = []  # float32 always
        return tags


def _seed_of(random_state: int | np.integer | np.random.RandomState | None) -> int:
    """A number that stays, or one that is drawn."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _without_tensor(matrix: object) -> object:
    return as_array(matrix) if isinstance(matrix, Tensor) else matrix


@contextlib.contextmanager
def _parameter_names() -> Iterator[None]:
    """Inside, an InputError that begins with the name of a setting begins with that of
    the estimator's parameter.
    """
    try:
        yield
    except InputError as error:
        setting, _, problem = str(error).partition(" is ")
        for parameter, name in SETTINGS.items():
            if name == setting:
                raise InputError(f"{parameter} is {problem}") from None
        raise
