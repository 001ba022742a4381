"""The benchmarks of the planner, at small sizes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams

from benchmarks.planner import dlrm_tasks, kernels, search
from benchmarks.planner.cases import Case
from benchmarks.planner.score import score
from tests.benchmarks.scripts import run
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.search.plan_tables import plan_tables


def test_search_compares_with_torchrec(tmp_path: Path) -> None:
    """And a second run of the command only prints the summary again."""
    command = ("--preset", "criteo", "--ranks", 16, "--rivals", "torchrec", "--output", tmp_path / "found.jsonl")
    run(search, *command)
    written = (tmp_path / "found.jsonl").read_bytes()
    row = json.loads(written)
    assert row["torchrec total"] == pytest.approx(10.5, abs=0.3)  # known before the search existed
    assert row["balanced total"] < row["balanced all"] < 8.5
    assert row["ran out of time"] == []
    run(search, *command)
    assert (tmp_path / "found.jsonl").read_bytes() == written


def test_the_benchmarks_own_equations_give_what_the_estimators_do() -> None:
    """Every sharding type and two hosts, weighted tables, kernels in host memory."""
    kinds = ["data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]
    tables = tuple(
        Table(
            name=f"t{n}",
            num_embeddings=1003 + n,
            embedding_dim=64,
            pooling_factor=3.0,
            weighted=n % 2 == 0,
        )
        for n in range(len(kinds) + 1)
    )
    rules = {
        table.name: ParameterConstraints(sharding_types=[kind], min_partition=16)
        for table, kind in zip(tables, kinds, strict=False)
    }
    rules["t5"] = ParameterConstraints(
        sharding_types=["grid_shard"],
        min_partition=16,
        compute_kernels=["fused_uvm_caching"],
        cache_params=CacheParams(load_factor=0.5),
    )
    rules["t6"] = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused_uvm"])
    hardware = replace(PRESETS["h100"], ranks_per_host=4)
    plan = plan_tables(tables, hardware, 8, batch_size=512, constraints=rules)
    assert plan.predicted is not None
    case = Case(tables=tables, hardware=hardware, ranks=8, batch_size=512, name="", memory="enough")
    placed = [
        (
            table,
            planned.sharding_type,
            (planned.compute_kernel, planned.kernel_options.get("cache_load_factor", 0.2)),
            [(shard.rank, *shard.sizes) for shard in planned.shards],
        )
        for table, planned in zip(tables, plan.tables, strict=True)
    ]
    assert {kind for _, kind, _, _ in placed} == set(kinds)
    scores = score(placed, case)
    for objective in search.OBJECTIVES:
        assert scores[objective] == pytest.approx(plan.predicted.slowest_ms(objective), rel=1e-6)


def test_tasks_of_the_dlrm_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    run(dlrm_tasks, "--tasks", 2, "--smallest", 4, "--largest", 6)
    assert "balanced worse in 0 of 2" in capsys.readouterr().out


def made_up(rng: np.random.Generator, costs: dict[str, float]) -> list[kernels.Kernel]:
    """Kernels whose look-up takes ``costs`` per bag, per distinct row and per looked-up byte; an update twice that."""
    found = []
    for rows, width, pooling, batch, skewed in itertools.product((100, 10**5), (16, 128), (1, 9), (64, 999), (0, 1)):
        distinct = min(rows, batch * pooling) * rng.uniform(0.5, 1.0)
        ns = costs["bag"] * batch + costs["row"] * distinct + costs["byte"] * batch * pooling * width * 4
        found.append(
            kernels.Kernel(
                rows=rows, width=width, pooling=pooling, batch_size=batch, skewed=bool(skewed), distinct=distinct,
                ms={"look-up": ns / 1e6, "update": 2 * ns / 1e6},
            )
        )  # fmt: skip
    return found


def test_the_fit_of_kernels_finds_planted_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """And predicts those held out; TorchRec's formula, which knows no distinct rows, can't."""
    planted = made_up(np.random.default_rng(1), {"bag": 3.0, "row": 20.0, "byte": 0.25})
    cost = dict(zip(kernels.FEATURES, kernels.fit(planted, "look-up"), strict=True))
    wanted = dict.fromkeys(kernels.FEATURES, 0.0) | {"bag": 3.0, "row": 20.0, "id byte": 0.25 * 1024}
    assert cost == pytest.approx(wanted, abs=1e-6)
    errors = kernels.report(planted, kernels.Options(widths=(16, 128), rows=(100, 10**5)))
    for found in errors.values():
        assert found["fitted"].max() < 1e-6
        assert found["TorchRec, bandwidth fitted"].mean() > 0.1
    assert "update : look-up, median 2.00" in capsys.readouterr().out


def test_kernels_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--rows", 50, "--widths", 16, 128, "--pooling", 1, 3, "--batch-sizes", 32, "--repetitions", 1)
    run(kernels, *words, "--output", tmp_path / "found.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["ms"]["look-up"] > 0 and row["ms"]["update"] > 0 for row in rows)
    assert all(0 < row["distinct"] <= min(50, 32 * row["pooling"]) for row in rows)
    assert "torchrec#2365 | 0.21 | 1.00" in capsys.readouterr().out


def test_skewed_ids_are_as_likely_as_one_by_their_number() -> None:
    """P(id < n) = log(n + 1) / log(rows + 1)."""
    kernel = kernels.Kernel(rows=1000, width=4, pooling=10, batch_size=20_000, skewed=True, distinct=0.0)
    ids = kernels.draw_ids(kernel, np.random.default_rng(0))
    for n in (1, 10, 100, 1000):
        assert np.mean(ids < n) == pytest.approx(np.log(n + 1) / np.log(1001), abs=0.01)
