"""The metrics per user against plain loops over their definitions, and against scikit-learn."""

import math
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from torchrec_deepfm.evaluation.ranking import UserMetrics, user_metrics

Rows = list[tuple[int, float, int]]
ROWS = st.lists(st.tuples(st.integers(-2, 3), st.integers(-2, 2).map(float), st.integers(0, 1)), max_size=40)


def compute(rows: Rows, ks: list[int]) -> dict[str, UserMetrics]:
    users, logits, labels = ([row[i] for row in rows] for i in range(3))
    return dict(user_metrics(np.array(users, np.int64), np.float32(logits), np.float32(labels), ks))


def by_user(rows: Rows) -> dict[int, list[tuple[float, int]]]:
    found = defaultdict(list)
    for user, logit, label in rows:
        found[user].append((logit, label))
    return found


def by_loops(rows: Rows, k: int) -> dict[str, float | None]:
    weighted, sizes, ndcg, recall, precision = [], [], [], [], []
    for listed in by_user(rows).values():
        clicks, others = [z for z, y in listed if y], [z for z, y in listed if not y]
        if clicks and others:
            wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in clicks for b in others)
            weighted.append(len(listed) * wins / (len(clicks) * len(others)))
            sizes.append(len(listed))
        if not clicks:
            continue
        shown = [y for _, y in sorted(listed, key=lambda row: (-row[0], row[1]))][:k]
        best = min(k, len(clicks))
        ideal = sum(1 / math.log2(place + 1) for place in range(1, best + 1))
        ndcg.append(sum(y / math.log2(place + 1) for place, y in enumerate(shown, 1)) / ideal)
        recall.append(sum(shown) / len(clicks))
        precision.append(sum(sum(shown[:place]) / place for place, y in enumerate(shown, 1) if y) / best)
    mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
    return {
        "gauc": sum(weighted) / sum(sizes) if sizes else None,
        f"ndcg@{k}": mean(ndcg),
        f"recall@{k}": mean(recall),
        f"map@{k}": mean(precision),
    }


@given(ROWS, st.integers(1, 5))
def test_every_metric_is_its_definition(rows: Rows, k: int) -> None:
    found = {name: metric.mean() for name, metric in compute(rows, [k]).items()}
    assert found == pytest.approx(by_loops(rows, k), abs=1e-12)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: Rows, rng: random.Random) -> None:
    shuffled = rng.sample(rows, len(rows))
    for name, metric in compute(rows, [1, 3]).items():
        assert metric.mean() == compute(shuffled, [1, 3])[name].mean()


def test_scikit_learn_agrees() -> None:
    rng = np.random.default_rng(0)
    users, labels = rng.integers(0, 60, 3_000), (rng.random(3_000) < 0.2).astype(np.float32)
    logits = rng.permutation(3_000).astype(np.float32)  # no ties
    rows = list(zip(users.tolist(), logits.tolist(), labels.astype(int).tolist(), strict=True))
    lists = by_user(rows).values()
    aucs = [(len(one), roc_auc_score([y for _, y in one], [z for z, _ in one])) for one in lists]
    ndcgs = [ndcg_score([[y for _, y in one]], [[z for z, _ in one]], k=10) for one in lists]
    found = compute(rows, [10])
    assert found["gauc"].mean() == pytest.approx(sum(n * auc for n, auc in aucs) / 3_000, abs=1e-12)
    assert found["ndcg@10"].mean() == pytest.approx(np.mean(ndcgs), abs=1e-12)


def test_a_constant_model_gains_nothing() -> None:
    """Rows sorted by click, as logs with sampled negatives often are."""
    rows = [(user, 0.0, int(i == 0)) for user in range(5) for i in range(4)]
    assert {name: metric.mean() for name, metric in compute(rows, [1]).items()} == {
        "gauc": 0.5,
        "ndcg@1": 0.0,
        "recall@1": 0.0,
        "map@1": 0.0,
    }


@given(ROWS)
def test_who_is_drawn_twice_counts_twice(rows: Rows) -> None:
    times = np.arange(len({user for user, _, _ in rows})) % 3
    names = sorted({user for user, _, _ in rows})
    repeated = [
        (user * 10 + copy, logit, label) for user, logit, label in rows for copy in range(int(times[names.index(user)]))
    ]
    for name, metric in compute(rows, [2]).items():
        assert metric.mean(times) == pytest.approx(compute(repeated, [2])[name].mean(), abs=1e-12)
