"""The benchmarks of the planner, at small sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams

from benchmarks.planner import dlrm_tasks, search
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
