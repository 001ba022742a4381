"""``DeepFMClassifier``: the estimator of scikit-learn's pipelines, searches and cross-validation.

Shape letters: n rows, m columns of X.
"""

import io
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from torchrec_deepfm import console
from torchrec_deepfm.data.raw.frames import as_arrow, frame_columns
from torchrec_deepfm.data.schema import Schema, parse_schema, read_schema, toml_text
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.notebook.fit import TrainedRun, fit, inferred
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run import folder as run_folder

# Fewer rows have no validation split: a tenth of them would say nothing.
_MIN_ROWS: Final = 500
# Updates that a small table needs; the epochs without a validation split follow from it.
_STEPS: Final = 300
_MOST_EPOCHS: Final = 50


class DeepFMClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """DeepFM as a binary classifier of scikit-learn.

    X holds m columns: a pandas or polars DataFrame, an Arrow table, or an array, whose columns are named ``x0``,
    ``x1``, ... Categories may be text, integers or lists; missing values are allowed. All columns are used, also those
    that ``schema infer`` would leave out; numbers without any category are cut into buckets.

    Args:
        schema: The columns, or a TOML file with them; inferred from X by default. Its label is not used.
        recipe: Options of the training, or the name of a recipe; by default as in ``fit``.
        epochs: Passes over the rows; with validation rows the most, until two in a row are no better. ``None``: 20 with
            validation rows, else as many as 300 steps need, 3 to 50.
        batch_size: Rows per step; ``None`` leaves it to the recipe, like the options that follow.
        factor_dim: K, the width of the latent vectors.
        over_arch_layer_sizes: Hidden layers of the MLP.
        dropout: Of the MLP.
        sparse_lr: Learning rate of the tables.
        dense_lr: Learning rate of everything else.
        min_count: Values seen less often in training share an embedding.
        options: Further options of ``train`` and ``prepare`` by name.
        validation_fraction: Share of the rows that choose the epoch, from 500 rows on; 0 for none.
        random_state: Seed of weights, order and validation rows.
        verbose: Print schema, progress and metrics.

    Attributes:
        classes_: [2], the labels; column 1 of ``predict_proba`` is of the second.
        n_features_in_: m.
        feature_names_in_: Names of the columns, where X had text names.
        run_: The trained run, with its metrics and report.

    Example:
        >>> import pandas as pd
        >>> X = pd.DataFrame({"user": [f"u{i % 7}" for i in range(2000)], "item": [i % 5 for i in range(2000)]})
        >>> y = ["yes" if i % 7 + i % 5 > 5 else "no" for i in range(2000)]
        >>> model = DeepFMClassifier(epochs=3).fit(X, y)
        >>> model.classes_.tolist(), model.predict_proba(X).shape, model.score(X, y) > 0.9
        (['no', 'yes'], (2000, 2), True)
    """

    def __init__(
        self,
        *,
        schema: Schema | Path | str | None = None,
        recipe: TrainConfig | str | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        factor_dim: int | None = None,
        over_arch_layer_sizes: tuple[int, ...] | None = None,
        dropout: float | None = None,
        sparse_lr: float | None = None,
        dense_lr: float | None = None,
        min_count: int = 2,
        options: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.1,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.schema = schema
        self.recipe = recipe
        self.epochs = epochs
        self.batch_size = batch_size
        self.factor_dim = factor_dim
        self.over_arch_layer_sizes = over_arch_layer_sizes
        self.dropout = dropout
        self.sparse_lr = sparse_lr
        self.dense_lr = dense_lr
        self.min_count = min_count
        self.options = options
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Train on rows.

        Args:
            X: n rows.
            y: [n] labels of two classes.
            sample_weight: [n] weights of the rows in the loss and in the choice of the epoch.

        Returns:
            This estimator.

        Raises:
            UserError: y has not two classes, or a column or an option does not fit.
            ValueError: X or y is not what scikit-learn takes.
        """
        table = self._table(X, reset=True)
        targets = self._targets(y, len(table))
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        label = _free_name("label", table)
        table = table.append_column(label, pa.array(targets))
        schema, text = self._schema(table, label)
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, np.empty(len(table)), ensure_non_negative=True)
            name = _free_name("weight", table)
            schema, text = replace(schema, weight=name), f"weight = {toml_text(name)}\n{text}"
            table = table.append_column(name, pa.array((weights / weights.mean()).astype(np.float32)))
        validation = _validation_rows(targets, self.validation_fraction, random)
        rows = table.filter(pa.array(~validation))
        held_out = {"validation": table.filter(pa.array(validation))} if validation.any() else {"split": "none"}
        if self.verbose:
            console.say(text)
        given = {name: getattr(self, name) for name in _TRAINING if getattr(self, name) is not None}
        if "batch_size" in given:
            given["batch_size"] = min(given["batch_size"], len(rows))
        if self.recipe is None and not validation.any():
            steps = max(len(rows) // given.get("batch_size", 64), 1)
            given.setdefault("epochs", min(max(-(-_STEPS // steps), 3), _MOST_EPOCHS))
        options = {"min_count": self.min_count, "seed": seed, **given, **held_out, **(self.options or {})}
        run = fit(rows, schema=schema, recipe=self.recipe, show=self.verbose, **options)
        self.run_: TrainedRun = replace(run, schema=text)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Predict probabilities.

        Args:
            X: n rows.

        Returns:
            [n, 2], in the order of ``classes_``.

        Raises:
            UserError: A column is absent or of another type.
            ValueError: X is not what scikit-learn takes.
        """
        check_is_fitted(self)
        positive = self.run_.predict(self._table(X, reset=False)).astype(np.float64)
        return np.stack([1.0 - positive, positive], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """Predict the more probable class of n rows, [n]; see ``predict_proba``."""
        positive = self.predict_proba(X)[:, 1] > 0.5  # raises before fit
        return np.asarray(self.classes_[positive.astype(int)])

    def __sklearn_tags__(self) -> Any:
        """Say what scikit-learn may give to this estimator."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Put the files of the trained run into the pickle."""
        state = dict(super().__getstate__())
        run = state.pop("run_", None)
        if run is not None:
            state["run_files"] = _packed(run.folder)
            state["run_about"] = (run.schema, dict(run.summary))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpack the run into a temporary folder."""
        files, about = state.pop("run_files", None), state.pop("run_about", None)
        super().__setstate__(state)
        if files is not None:
            keep = TemporaryDirectory(prefix="torchrec_deepfm-run-")
            folder = Path(keep.name) / "run"
            with zipfile.ZipFile(io.BytesIO(files)) as archive:
                archive.extractall(folder)  # leaves out .. and absolute names
            self.run_ = TrainedRun(folder=folder, schema=about[0], summary=about[1], _keeps=(keep,))

    def _table(self, X: Any, *, reset: bool) -> pa.Table:  # noqa: N803
        """The columns as an Arrow table; those of an array by place."""
        if not frame_columns(X):
            array = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite=False)
            if array.dtype.kind == "f" and np.isinf(array).any():
                raise UserError("Input X contains infinity", remedy="give numbers, or NaN where one is missing")
            names = [f"x{j}" for j in range(array.shape[1])]
            columns = [column.tolist() if column.dtype == object else column for column in array.T]
            return as_arrow(pl.DataFrame(dict(zip(names, columns, strict=True)), strict=False), names)
        validate_data(self, X, reset=reset, skip_check_array=True)
        table = as_arrow(X, frame_columns(X))
        if not len(table):
            raise UserError("0 sample(s) in X", remedy="give 1 or more")
        return table

    def _targets(self, y: Any, rows: int) -> NDArray[np.int8]:
        """The labels as 0 and 1; sets ``classes_``."""
        if y is None:
            raise UserError("this estimator requires y to be passed, but the target y is None")
        if isinstance(y, pa.Array | pa.ChunkedArray | pl.Series):
            y = y.to_pandas() if not isinstance(y, pl.Series) else y.to_numpy()
        y = column_or_1d(check_array(y, ensure_2d=False, dtype=None, input_name="y"), warn=True)
        check_consistent_length(y, np.empty(rows))
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise UserError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
                f"{len(self.classes_)} classes",
                remedy="train a model per class, or wrap it in OneVsRestClassifier",
            )
        if len(self.classes_) < 2:
            raise UserError(f"y has 1 class, {self.classes_[0]!r}", remedy="give rows of two")
        return places.astype(np.int8)

    def _schema(self, table: pa.Table, label: str) -> tuple[Schema, str]:
        if self.schema is None:
            text = inferred(table, label, keep=True)
            return parse_schema(text, Path("schema")), text
        schema = self.schema if isinstance(self.schema, Schema) else read_schema(self.schema)
        return Schema.from_json({**schema.to_json(), "label": label}), repr(schema)


_TRAINING: Final = (
    "epochs", "batch_size", "factor_dim", "over_arch_layer_sizes", "dropout", "sparse_lr", "dense_lr",
)  # fmt: skip


def _free_name(name: str, table: pa.Table) -> str:
    while name in table.column_names:
        name += "_"
    return name


def _validation_rows(targets: NDArray[np.int8], fraction: float, random: np.random.RandomState) -> NDArray[np.bool_]:
    """Choose the rows to hold out; none where they are few or of one class."""
    if not 0.0 <= fraction < 1.0:
        raise UserError("must lie in [0, 1)", where=f"validation_fraction={fraction}")
    chosen = np.zeros(len(targets), np.bool_)
    if len(targets) >= _MIN_ROWS:
        chosen[random.permutation(len(targets))[: int(fraction * len(targets))]] = True
    both = len(np.unique(targets[chosen])) == len(np.unique(targets[~chosen])) == 2
    return chosen if both else np.zeros_like(chosen)


def _packed(folder: Path) -> bytes:
    """The files of a run that predictions and reports need."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and name.parts[0] != run_folder.CHECKPOINTS:
                archive.write(path, str(name))
    return content.getvalue()
