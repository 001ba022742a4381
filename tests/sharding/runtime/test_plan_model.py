"""The planner for CUDA, on ``meta`` and without a GPU: kernels, quantised communication, and why there is no plan."""

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import GridSearchProposer
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import CommOp
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_deepfm import embedding_tables
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.estimate import predict_plan
from torchrec_deepfm.sharding.inputs.constraints import in_device_memory, parse_constraints
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES, SparseOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.inputs.topology import topology as hardware_topology
from torchrec_deepfm.sharding.plan.io import save_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedShard, PlannedTable
from torchrec_deepfm.sharding.plan.torchrec_plan import to_sharding_plan
from torchrec_deepfm.sharding.runtime.plan_model import check_replicated, plan_model, read_fitting_plan
from torchrec_deepfm.sharding.runtime.planner_errors import explain_planner_error
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder, make_sharder
from torchrec_deepfm.sharding.search.plan_tables import plan_tables
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import fuse_sparse_optimizer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GIB = 2**30
SIZES = {"C1": 5_000_000, "C2": 300_000, "C3": 4_000}  # of 32 columns


class Model(nn.Module):
    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        fuse_sparse_optimizer(self.ebc.parameters(), TrainConfig(sparse_optimizer="sgd"))


def topology(ranks: int, hbm: int, device: str = "cuda") -> Topology:
    """Four ranks per host; 15% of the memory is not for tables."""
    memory: dict[str, Any] = {"hbm_cap": hbm, "ddr_cap": 0} if device == "cuda" else {"ddr_cap": hbm}
    return Topology(world_size=ranks, local_world_size=min(ranks, 4), compute_device=device, **memory)


def plan(
    rules: list[str], sizes: dict[str, int] = SIZES, ranks: int = 4, hbm: int = 80 * GIB, *, ema: bool = False
) -> PlanFile:
    tables = embedding_tables(sizes, factor_dim=31)
    there = topology(ranks, hbm)
    if any("uvm" in rule for rule in rules):
        there = Topology(world_size=ranks, local_world_size=4, compute_device="cuda", hbm_cap=hbm, ddr_cap=hbm)
    return plan_model(
        Model(tables),
        tables,
        replicated=set(),
        batch_size=256,
        device=CUDA,
        sharder=make_sharder(CUDA),
        constraints=parse_constraints(rules, tables, compute_device="cuda", world_size=ranks, local_world_size=4),
        topology=there,
        ema=ema,
    )


def by_name(found: PlanFile) -> dict[str, Any]:
    return {table.name: table for table in found.tables}


@pytest.mark.parametrize("kind", SHARDING_TYPES)
def test_a_constraint_chooses_the_type(kind: str) -> None:
    found = by_name(plan([f"*={kind}"]))
    assert {table.sharding_type for table in found.values()} == {kind}
    widths = {shard.sizes[1] for table in found.values() for shard in table.shards}
    # Without a width of the user's, columns are cut in two: TorchRec by itself would leave 32 columns whole.
    assert widths == ({16} if kind in ("column_wise", "table_column_wise", "grid_shard") else {32})


@pytest.mark.parametrize(("hardware", "winner"), [("h100", "balanced"), ("cpu", "torchrec")])
def test_the_planner_that_predicts_the_faster_step_for_known_hardware(hardware: str, winner: str) -> None:
    """Eight H100: TorchRec's planner never cuts 32 columns by itself. One table for two CPU ranks: a draw."""
    sizes, ranks = ({"C1": 5_000_000, "C2": 300_000}, 8) if hardware == "h100" else ({"C1": 40}, 2)
    tables, at = embedding_tables(sizes, factor_dim=31), PRESETS[hardware]
    device = torch.device(at.compute_device)
    options: dict[str, Any] = {
        "replicated": set(), "batch_size": 4096, "device": device, "sharder": make_sharder(device),
        "topology": hardware_topology(at, ranks),
    }  # fmt: skip
    if hardware == "cpu":
        options["constraints"] = parse_constraints(["C1=table_wise"], tables, compute_device="cpu", world_size=2)
    alone = plan_model(Model(tables), tables, **options)
    found = plan_model(Model(tables), tables, hardware=at, optimizer="sgd", **options)
    sizes_of = [Table(name=f"t_{name}", num_embeddings=rows, embedding_dim=32) for name, rows in sizes.items()]
    torchrecs = predict_plan(alone, sizes_of, at, optimizer="sgd").critical_path_ms
    assert found.predicted is not None
    assert (found.search == "balanced") == (winner == "balanced")
    assert (found.predicted.critical_path_ms < 0.99 * torchrecs) == (winner == "balanced")
    if winner == "torchrec":
        assert found.without_predictions().tables == alone.tables


def test_kernels_in_the_hosts_memory() -> None:
    rules = ["C1=table_wise:kernel=fused_uvm_caching:cache_load_factor=0.125", "C2=row_wise:kernel=fused_uvm"]
    found = plan(rules)
    tables = by_name(found)
    kernels = {name: table.compute_kernel for name, table in tables.items()}
    assert kernels == {"t_C1": "fused_uvm_caching", "t_C2": "fused_uvm", "t_C3": "fused"}
    assert dict(tables["t_C1"].kernel_options) == {"cache_load_factor": 0.125}
    cache = to_sharding_plan(found, "ebc", CUDA).plan["ebc"]["t_C1"].cache_params  # type: ignore[index]
    assert cache.load_factor == 0.125


@pytest.mark.parametrize(("forward", "backward"), [("bf16", "fp16"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_quantised_communication(forward: str, backward: str) -> None:
    registry = make_sharder(CUDA, forward, backward).qcomm_codecs_registry  # type: ignore[arg-type]
    assert registry is not None
    width = {"fp16": torch.float16, "bf16": torch.bfloat16}
    for operation in (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER):
        codecs = registry[operation.name]
        assert codecs.forward.quantized_dtype == width[forward]
        assert codecs.backward.quantized_dtype == width[backward]
        values = torch.tensor([1.0, 1.00390625, -3.14159])  # the second lies between two bfloat16
        assert torch.equal(codecs.forward.encode(values).float(), values.to(width[forward]).float())


def test_without_quantisation_there_is_no_codec() -> None:
    assert make_sharder(CUDA).qcomm_codecs_registry is None
    assert make_sharder(CPU, "fp32", "fp32").qcomm_codecs_registry is None
    assert CommType("bf16") == CommType.BF16


def test_quantised_communication_on_cpu() -> None:
    with pytest.raises(UserError) as raised:
        make_sharder(CPU, "bf16", "fp32")
    assert str(raised.value) == (
        "--qcomms bf16 fp32: quantised communication needs GPUs, these are cpu ranks; leave the option out"
    )


def test_the_sharder_offers_every_type_everywhere() -> None:
    for device in ("cpu", "cuda"):
        assert set(AllTypesSharder().sharding_types(device)) == set(SHARDING_TYPES)


def test_what_adam_trains_is_replicated() -> None:
    tables = embedding_tables(SIZES, factor_dim=31)
    check_replicated({"t_C3"}, {"t_C3": ["data_parallel"], "t_C1": ["row_wise"]}, tables, "--plan p.json")
    with pytest.raises(UserError) as raised:
        check_replicated({"t_C2", "t_C3"}, {"t_C2": ["row_wise"], "t_C3": ["table_wise"]}, tables, "--plan p.json")
    assert str(raised.value) == (
        "--plan p.json: table t_C3 is to be table_wise, but has 4,000 rows, and --data-parallel-rows leaves tables of "
        "so few rows to Adam, which trains them data_parallel; lower it to 3999"
    )


def no_plan(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        plan(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_table_too_large_for_any_rank() -> None:
    """5,000,000 x 32 numbers of 4 bytes are 610.4 MiB, buffers come on top; a rank has 85% of 512 MiB."""
    message = no_plan(["C1=table_wise"], hbm=GIB // 2)
    assert message.startswith(
        f"table t_C1: 5,000,000 x 32 are {5_000_000 * 32 * 4 / 2**20:.1f} MiB of weights; at best, as table_wise (of "
        "table_wise), one rank holds 610.5 MiB of it with optimizer and buffers, but has 435.2 MiB of GPU memory for "
        "tables; use more ranks (-j), let it be row_wise or column_wise (--constraint), or take fewer rows or columns"
    )
    assert by_name(plan(["C1=row_wise"], hbm=GIB // 2))["t_C1"].sharding_type == "row_wise"


def test_tables_too_large_for_all_ranks() -> None:
    """Ten such tables are 6 GiB; four ranks have 4 x 0.85 of them, so that eight would do."""
    message = no_plan([], sizes={f"C{n}": 5_000_000 for n in range(10)}, hbm=GIB)
    assert message.startswith(
        "the 10 tables take 6.0 GiB with optimizer and buffers, but 4 rank(s) have 3.4 GiB of GPU"
    )
    assert message.endswith("for tables; use at least 8 ranks (-j), or take fewer rows or columns")


def test_tables_that_do_not_share_out() -> None:
    """Three of 0.6 GiB fit two ranks of 0.93 GiB in sum, and each fits one; but two of them no rank."""
    message = no_plan(["*=table_wise"], sizes=dict.fromkeys(["C1", "C2", "C3"], 5_000_000), ranks=2, hbm=int(1.1 * GIB))
    assert re.fullmatch(
        r"none of the [0-9]+ plans that the search tried fits the memory of the ranks \(the last left no room for a "
        r"part of table t_C[123]\), though each table by itself fits, and all take less than the ranks have; use "
        r"more ranks \(-j\), or let the large tables be row_wise \(--constraint\)",
        message,
    )


def test_the_moving_average_takes_memory_too() -> None:
    """0.6 GiB of weights fit the 85% of 1 GiB that tables may take; with an average as large they do not."""
    sizes = {"C1": 5_000_000}
    assert by_name(plan(["C1=table_wise"], sizes, hbm=GIB))["t_C1"].sharding_type == "table_wise"
    message = no_plan(["C1=table_wise"], sizes, hbm=GIB, ema=True)
    assert (
        "one rank holds 1.2 GiB of it with optimizer, moving average and buffers, but has 870.4 MiB of GPU" in message
    )
    assert message.endswith("or take fewer rows or columns, or train without --ema")
    table = by_name(plan([], sizes, hbm=GIB, ema=True))["t_C1"]
    assert len(table.shards) > 1, "no rank can hold all of it"
    message = no_plan([], {f"C{n}": 5_000_000 for n in range(4)}, hbm=GIB, ema=True)
    assert message.startswith(
        "the 4 tables take 4.8 GiB with optimizer, moving average and buffers, but 4 rank(s) have"
    )


def test_the_moving_average_stays_on_the_device() -> None:
    """TorchRec's planner may put what does not fit into host memory, where ``build_model`` refuses to average it."""
    tables = embedding_tables({"C1": 5_000_000}, factor_dim=31)
    with pytest.raises(UserError) as raised:
        in_device_memory(tables, {"t_C1": ParameterConstraints(compute_kernels=["fused_uvm"])})
    assert str(raised.value) == (
        "--constraint: table t_C1 has the kernel fused_uvm, which keeps rows in host memory, where --ema can't average "
        "them; leave one of the two out"
    )
    hardware = replace(PRESETS["a100-40"], hbm_bytes=GIB, ddr_bytes=GIB * 100)
    planned = [Table(name="t_C1", num_embeddings=5_000_000, embedding_dim=32)]
    for search in ("balanced", "torchrec"):
        made = plan_tables(planned, hardware, 2, batch_size=256, search=search, ema=True)  # type: ignore[arg-type]
        assert {table.compute_kernel for table in made.tables} == {"fused"}
        assert made.predicted is not None
        for rank, cost in enumerate(made.predicted.per_rank):
            weights = sum(math.prod(shard.sizes) * 4 for shard in made.tables[0].shards if shard.rank == rank)
            assert 2 * weights <= cost.hbm_bytes <= 0.85 * GIB


def test_a_saved_plan_must_fit_the_memory_at_hand(device: torch.device, tmp_path: Path) -> None:
    """A table of 60% of this machine's memory fits; with its moving average it does not. Nothing is allocated."""
    rows = int(0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (32 * 4))
    tables = embedding_tables({"C1": rows}, factor_dim=31)
    shard = PlannedShard(rank=0, offsets=(0, 0), sizes=(rows, 32))
    table = PlannedTable(
        name="t_C1", num_embeddings=rows, embedding_dim=32, sharding_type="table_wise", compute_kernel="fused",
        shards=(shard,),
    )  # fmt: skip
    path = tmp_path / "plan.json"
    save_plan(PlanFile(world_size=1, local_world_size=1, batch_size=256, search="torchrec", tables=(table,)), path)

    def read(optimizer: SparseOptimizer, *, ema: bool) -> PlanFile:
        return read_fitting_plan(
            path, tables, replicated=set(), device=device, batch_size=256, optimizer=optimizer, ema=ema
        )

    assert read("rowwise_adagrad", ema=False).tables == (table,)
    with pytest.raises(UserError) as raised:
        read("rowwise_adagrad", ema=True)
    assert re.fullmatch(
        rf"--plan {path}: rank 0 would hold [0-9.]+ GiB of tables with optimizer, moving average and buffers, but has "
        r"[0-9.]+ GiB of memory for tables; use more ranks, or make a plan for this memory with --ema, or train "
        "without it",
        str(raised.value),
    )
    with pytest.raises(UserError, match="of tables with optimizer and buffers, but has"):
        read("adagrad", ema=False)


def test_a_grid_search_that_proposes_nothing_is_not_short_of_memory() -> None:
    tables = embedding_tables({f"C{n}": 1000 for n in range(30)}, factor_dim=31)
    planner = EmbeddingShardingPlanner(
        topology=topology(16, 80 * GIB), batch_size=256, proposer=GridSearchProposer(max_proposals=1000)
    )
    with pytest.raises(PlannerError) as raised:
        planner.plan(Model(tables), [make_sharder(CUDA)])
    assert raised.value.error_type == PlannerErrorType.INSUFFICIENT_STORAGE  # 0.1 MiB a table, and 1,280 GB
    options = planner._enumerator.last_stored_search_space  # type: ignore[attr-defined]
    reserved = planner._storage_reservation.last_reserved_topology
    message = str(explain_planner_error(raised.value, options, reserved, proposals=planner._num_proposals))
    assert message.startswith(f"the search proposed no plan at all: {len(options)} options of 30 tables are more ")
    assert "\n" not in message
