"""The searches for settings, on a few generated rows; the update rules against other optimizers."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks._lib import commands
from benchmarks._lib.commands import ROOT
from benchmarks.quality import datasets, large_batches
from benchmarks.quality.search import row_rules, small_table
from benchmarks.quality.search.row_rules import Rule
from benchmarks.quality.workers.prepared_arrays import Arrays, Split
from tests.benchmarks.scripts import forked, run
from tests.benchmarks.test_movielens import PAGE, write_atomic
from torchrec_deepfm.training.recipes import small_table as small_recipe

ROWS, BATCH = 6, 10


def test_the_mean_gap_is_to_the_best_of_each_set() -> None:
    aucs = [(0.7, 0.9), (0.8, 0.6), (0.75, 0.85)]
    scores = [{name: {"auc": auc} for name, auc in zip("ab", one, strict=True)} for one in aucs]
    assert small_table.mean_gaps(scores) == pytest.approx([0.05, 0.15, 0.05])


@pytest.mark.parametrize(
    ("rows", "steps", "batch"), [(100, 64, 64), (40_000, 64, 512), (40_000, 300, 128), (10**6, 64, 2048)]
)
def test_batches_are_as_large_as_the_steps_allow(rows: int, steps: int, batch: int) -> None:
    config = small_table.make_config(rows, {"steps": steps, "dropout": 0.1}, seed=4)
    assert (config.batch_size, config.dropout, config.seed) == (batch, 0.1, 4)
    settings = {"steps": steps, "prior": 250, "linear_prior": 25, "sparse_optimizer": "adam"}
    config = small_table.make_config(rows, settings, seed=4)
    assert (config.embedding_l2, config.linear_l2) == (250 / rows, 25 / rows)


@pytest.mark.parametrize("rows", [100, 4800, 9600, 202_027])
def test_the_recipe_is_among_the_candidates(rows: int) -> None:
    settings = small_table.START | small_table.STAGES["c"][6]
    found = replace(small_table.make_config(rows, settings, seed=0), precision="float32", checkpoint_every=0)
    assert found == replace(small_recipe(rows), checkpoint_every=0)


def test_the_search_takes_the_better_settings_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On generated ratings alone: the other sets are absent."""
    monkeypatch.setattr(datasets, "products", lambda *_, **__: None)
    monkeypatch.setattr(
        small_table, "STAGES", {"one": [{"dropout": 0.0}, {"sparse_lr": 1e-6}], "two": [{"factor_dim": 2}]}
    )
    write_atomic(tmp_path)
    words = ("--output", tmp_path / "out", "--shared", tmp_path, "--atomic", tmp_path, "--finalists", 1)
    with forked(commands):
        run(small_table, *words, "--seeds", 0, 1, "--most-epochs", 1)
    text = capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    found: dict[str, Any] = {}
    for key, figures in kept.items():
        _, settings, seed = json.loads(key)
        if seed == 0:
            found[json.dumps(settings)] = settings, figures["auc"]
    first, *candidates, last = found.values()
    finalists = {json.dumps(first[0]), json.dumps(max(found.values(), key=lambda one: one[1])[0])}
    assert len(kept) == 4 + len(finalists)  # the best and the first with another seed
    best = max([first, *candidates], key=lambda one: one[1])[0]
    assert last[0] == best | {"factor_dim": 2}
    assert f"| {max(auc for _, auc in found.values()):.4f}, " in text
    assert "| logistic regression |" in text
    with mock.patch.object(small_table, "train", side_effect=AssertionError):
        run(small_table, *words, "--seeds", 0, 1, "--most-epochs", 1)  # every training is kept


def test_the_schema_is_that_of_the_page() -> None:
    [schema] = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert tomllib.loads(datasets._MOVIELENS) == tomllib.loads(schema)


def test_products_are_those_of_the_quickstart(tmp_path: Path) -> None:
    cell = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"][1]
    source = "".join(cell["source"])
    assert source.count("rows = 6_000") == 1
    names: dict[str, Any] = {}
    exec(source.replace("rows = 6_000", "rows = 14_800"), names)
    with forked(commands):
        folder = datasets.products(tmp_path)
    labels = [np.load(folder / f"{name}_0_labels.npy").ravel() for name in ("day", "validation")]
    assert [len(one) for one in labels] == [4800, 10_000]
    np.testing.assert_array_equal(np.concatenate(labels), names["clicks"]["click"].to_numpy())
    dense, price = np.load(folder / "validation_0_dense.npy").ravel(), names["price"]
    np.testing.assert_allclose(dense, (price[4800:] - price[:4800].mean()) / price[:4800].std(), rtol=1e-3, atol=1e-3)


def _walk(rule: Rule, table: torch.Tensor, gradients: list[torch.Tensor], seen: list[torch.Tensor]) -> torch.Tensor:
    table = table.clone().requires_grad_()
    optimizer = row_rules.RowOptimizer(table, rule)
    for gradient, counts in zip(gradients, seen, strict=True):
        table.grad = gradient.clone()
        optimizer.step(counts, BATCH)
    return table.detach()


@pytest.fixture
def steps() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Rows of width 44 (K 40), and five steps with the gradients and counts of the rows seen."""
    torch.manual_seed(0)
    seen = [torch.tensor(counts).float() for counts in np.random.default_rng(0).integers(0, 3, (5, ROWS))]
    gradients = [torch.randn(ROWS, 44) * counts.bool().unsqueeze(1) for counts in seen]
    return torch.randn(ROWS, 44), gradients, seen


def test_rules_that_other_optimizers_have(steps: Any) -> None:
    table, gradients, seen = steps
    assert any((counts == 0).any() for counts in seen)
    for rule, make in (
        (Rule(kind="adam", rate=0.1, whole=0.3), lambda rows: torch.optim.Adam(rows, lr=0.1, weight_decay=0.3)),
        (
            Rule(kind="adagrad", rate=0.1, whole=0.3),
            lambda rows: torch.optim.Adagrad(rows, lr=0.1, weight_decay=0.3, eps=1e-8),
        ),
        (Rule(kind="rowwise_adagrad", rate=0.1), lambda rows: RowWiseAdagrad(rows, lr=0.1, eps=1e-8)),
        (Rule(kind="adam", rate=0.1), lambda rows: torch.optim.SparseAdam(rows, lr=0.1)),
    ):
        expected = table.clone().requires_grad_()
        optimizer = make([expected])
        for gradient, counts in zip(gradients, seen, strict=True):
            lazy = isinstance(optimizer, torch.optim.SparseAdam)
            rows = counts.nonzero().T
            expected.grad = (
                torch.sparse_coo_tensor(rows, gradient[rows[0]], gradient.shape) if lazy else gradient.clone()
            )
            optimizer.step()
        torch.testing.assert_close(_walk(rule, table, gradients, seen), expected.detach(), rtol=1e-3, atol=1e-4)


def test_what_the_rules_add(steps: Any) -> None:
    """A touched penalty is a gradient per look-up; shrinking moves all v towards 0, decay all rows."""
    table, gradients, seen = steps
    pulled = [gradients[0].clone()]
    pulled[0][:, :40] += 0.5 * (seen[0] / BATCH).unsqueeze(1) * table[:, :40]
    touched = _walk(Rule(kind="rowwise_adagrad", rate=0.1, touched=0.5), table, gradients[:1], seen[:1])
    torch.testing.assert_close(touched, _walk(Rule(kind="rowwise_adagrad", rate=0.1), table, pulled, seen[:1]))
    plain = _walk(Rule(kind="adam", rate=0.1), table, gradients[:1], seen[:1])
    decayed = _walk(Rule(kind="adam", rate=0.1, decay=0.25), table, gradients[:1], seen[:1])
    torch.testing.assert_close(decayed, 0.75 * plain)
    shrunk = _walk(Rule(kind="adam", rate=0.1, shrink=0.5), table, gradients[:1], seen[:1])
    torch.testing.assert_close(shrunk[:, :40], torch.nn.functional.softshrink(plain[:, :40], 0.5))
    torch.testing.assert_close(shrunk[:, 40:], plain[:, 40:])
    late = [torch.zeros(ROWS), torch.ones(ROWS)]  # first seen in the second step: corrected as a first step
    moved = _walk(Rule(kind="adam", rate=0.1, row_steps=True), table, [torch.zeros_like(table), gradients[0]], late)
    torch.testing.assert_close(moved, _walk(Rule(kind="adam", rate=0.1), table, gradients[:1], late[1:]))


def test_a_rule_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 4, (4000, 2))
    labels = (ids.sum(axis=1) % 2 > 0).astype(np.int64)
    splits = {
        name: Split(dense=np.zeros((len(rows), 0), np.float32), sparse=ids[rows], labels=labels[rows])
        for name, rows in (("train", range(3000)), ("validation", range(3000, 4000)))
    }
    arrays = Arrays(numeric=(), num_embeddings={"a": 4, "b": 4}, splits=splits)
    small = replace(row_rules._CONFIG, over_arch_layer_sizes=(16,), batch_size=100, ema=0.5)
    monkeypatch.setattr(row_rules, "_CONFIG", small)
    found = row_rules.train(arrays, Rule(kind="rowwise_adagrad", rate=0.1), seed=0, epochs=4)
    assert found["auc"] > 0.99
    assert found["epoch"] <= 4


def test_clipped_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a small ratio the limit is CowClip's bound, which most gradients exceed."""
    words = ("--output", tmp_path, "--rows", 3000, "--batches", 256, "--rules", "unscaled", "cowclip", "--epochs", 2)
    run(large_batches, *words, "--ratio", 1e-6)
    unscaled, cowclip = capsys.readouterr().out.splitlines()[-2:]
    assert unscaled.endswith("|  |")
    first, last = (float(share) for share in re.findall(r"([\d.]+)%", cowclip))
    assert 50 < first <= 100
    assert 0 < last <= 100
