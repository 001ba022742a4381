"""``DeepFMClassifier`` among scikit-learn's own tools."""

import pickle
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from torchrec_deepfm import DeepFMClassifier
from torchrec_deepfm.errors import UserError

QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 50, "over_arch_layer_sizes": (8,), "sparse_lr": 0.1}


def table(rows: int, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    user, item, price = rng.integers(0, 20, rows), rng.integers(0, 10, rows), rng.normal(size=rows)
    logit = 2.0 * (user % 3 - 1.0) * (item % 3 - 1.0) + price
    label = np.where(rng.random(rows) < 1 / (1 + np.exp(-logit)), "yes", "no")
    return pd.DataFrame({"user": [f"u{i}" for i in user], "item": item, "price": price}), label


@pytest.fixture(scope="module")
def fitted() -> DeepFMClassifier:
    return DeepFMClassifier(**QUICK).fit(*table(1500))


# A row of weight 2 is in one batch, the same row given twice in two.
NOT_BY_STEPS = {"check_sample_weight_equivalence_on_dense_data": "training goes by batches of so many rows each"}


def test_the_contract_of_scikit_learn() -> None:
    model = DeepFMClassifier(**{**QUICK, "batch_size": 16})
    found = check_estimator(model, on_fail=None, on_skip=None, expected_failed_checks=NOT_BY_STEPS)
    assert [(one["check_name"], one["exception"]) for one in found if one["status"] == "failed"] == []
    assert [one["check_name"] for one in found if one["status"] == "skipped"] == ["check_array_api_input"]
    assert len(found) > 50


def test_it_learns_from_any_kind_of_frame(fitted: DeepFMClassifier) -> None:
    frame, label = table(800, 1)
    chances = fitted.predict_proba(frame)
    assert chances.shape == (800, 2)
    assert chances.sum(axis=1) == pytest.approx(np.ones(800))
    assert fitted.classes_.tolist() == ["no", "yes"]
    assert roc_auc_score(label == "yes", chances[:, 1]) > 0.75
    assert fitted.predict(frame).tolist() == np.where(chances[:, 1] > 0.5, "yes", "no").tolist()
    assert fitted.score(frame, label) == np.mean(fitted.predict(frame) == label)
    assert fitted.feature_names_in_.tolist() == ["user", "item", "price"]
    other = pl.from_pandas(frame)
    for same in (other, other.to_arrow(), frame[["price", "item", "user"]][["user", "item", "price"]]):
        assert fitted.predict_proba(same).tobytes() == chances.tobytes()
    again = DeepFMClassifier(**QUICK).fit(pl.from_pandas(table(1500)[0]).to_arrow(), table(1500)[1].tolist())
    assert again.predict_proba(other.to_arrow()).tobytes() == chances.tobytes()
    of_array = DeepFMClassifier(**QUICK).fit(table(1500)[0].to_numpy(), table(1500)[1])
    assert of_array.n_features_in_ == 3
    assert roc_auc_score(label == "yes", of_array.predict_proba(frame.to_numpy())[:, 1]) > 0.75


def test_a_pickle_holds_the_model(fitted: DeepFMClassifier) -> None:
    copy = pickle.loads(pickle.dumps(fitted))
    frame, _ = table(50, 2)
    assert copy.predict_proba(frame).tobytes() == fitted.predict_proba(frame).tobytes()
    assert copy.run_.folder != fitted.run_.folder
    assert copy.run_.metrics == fitted.run_.metrics
    assert copy.run_.report().path.exists()


def test_weights_of_rows() -> None:
    """Rows of little weight have the wrong label."""
    frame, label = table(1500)
    wrong = np.random.default_rng(3).random(len(label)) < 0.5
    given = np.where(wrong, np.where(label == "yes", "no", "yes"), label)
    model = DeepFMClassifier(**QUICK).fit(frame, given, sample_weight=np.where(wrong, 0.1, 20.0))
    rows, expected = table(800, 1)
    assert roc_auc_score(expected == "yes", model.predict_proba(rows)[:, 1]) > 0.7
    assert model.run_.schema.startswith('weight = "weight"')


def test_in_a_pipeline_and_in_cross_validation() -> None:
    frame, label = table(2400)
    pipeline = make_pipeline(FunctionTransformer(lambda rows: rows.assign(twice=2 * rows["price"])), DeepFMClassifier())
    pipeline.set_params(deepfmclassifier__factor_dim=4, **{f"deepfmclassifier__{name}": QUICK[name] for name in QUICK})
    scores = cross_val_score(pipeline, frame, label, cv=2, scoring="roc_auc")
    assert min(scores) > 0.65
    assert clone(pipeline[-1]).get_params()["factor_dim"] == 4
    assert pipeline.fit(frame, label).predict(frame[:3]).shape == (3,)
    assert pipeline[-1].run_.schema.count('"twice",') == 1


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({}, lambda y: [*y[:-1], "perhaps"], ("^Only binary classification is supported. The type of the target is "
         "multiclass: 3 classes; train a model per class, or wrap it in OneVsRestClassifier$")),
        ({}, lambda y: ["no"] * len(y), "^y has 1 class, .*'no'.*; give rows of two$"),
        ({"validation_fraction": 1.0}, lambda y: y, r"^validation_fraction=1.0: must lie in \[0, 1\)$"),
        ({"epochs": 0}, lambda y: y, "^--epochs 0: must be at least 1$"),
        ({"options": {"epoch": 3}}, lambda y: y, r"^fit: unknown option 'epoch' \(did you mean 'epochs'\?\)$"),
    ],
)  # fmt: skip
def test_bad_input(options: dict[str, Any], labels: Any, message: str) -> None:
    frame, label = table(100)
    with pytest.raises(UserError, match=message) as refused:
        DeepFMClassifier(**{**QUICK, **options}).fit(frame, labels(label))
    assert "\n" not in str(refused.value)
