"""``BalancedPlanner`` and plan files for a model of one's own: real ranks, through ``DistributedModelParallel``.

The model has two collections of bags, one of them weighted, sequences, and a tower. The oracle is plain torch: every
look-up of the global batch by ``nn.functional.embedding``.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec.distributed.comm
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_tower import EmbeddingTower

from tests.support.ranks import CPU, one_rank, run_ranks
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table, criteo_tables
from torchrec_deepfm.sharding.inputs.topology import topology
from torchrec_deepfm.sharding.plan.io import load_plan, save_plan
from torchrec_deepfm.sharding.plan.plan import Objective
from torchrec_deepfm.sharding.runtime.balanced_planner import BalancedPlanner
from torchrec_deepfm.sharding.runtime.module_plan import load_sharding_plan, save_sharding_plan
from torchrec_deepfm.sharding.search import best_plan
from torchrec_deepfm.sharding.search.plan_tables import plan_tables

META = torch.device("meta")
WIDTH, SAMPLES, RANKS = 16, 8, 4
ROWS = {"plain": (40, 300, 90), "weighted": (70, 50), "tower": (30, 60, 45)}


class Interaction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(len(ROWS["tower"]) * WIDTH, 4)

    def forward(self, embeddings: KeyedTensor) -> Tensor:
        keys = [f"tower{n}" for n in range(len(ROWS["tower"]))]
        return self.linear(torch.cat([embeddings[key] for key in keys], dim=1))  # type: ignore[no-any-return]


def bags(part: str) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=f"t_{part}{n}", feature_names=[f"{part}{n}"], num_embeddings=rows, embedding_dim=WIDTH)
        for n, rows in enumerate(ROWS[part])
    ]
    return EmbeddingBagCollection(tables=tables, device=META, is_weighted=part == "weighted")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # of the tower's dense part, equal on every rank
        self.plain, self.weighted = bags("plain"), bags("weighted")
        tables = [EmbeddingConfig(name="t_seq", feature_names=["seq"], num_embeddings=80, embedding_dim=8)]
        self.sequences = EmbeddingCollection(tables=tables, device=META)
        self.tower = EmbeddingTower(bags("tower"), Interaction())

    def forward(self, parts: dict[str, KeyedJaggedTensor]) -> dict[str, Tensor]:
        plain, weighted = self.plain(parts["plain"]), self.weighted(parts["weighted"])
        return {
            **{key: plain[key] for key in plain.keys()},  # noqa: SIM118 (a KeyedTensor)
            **{key: weighted[key] for key in weighted.keys()},  # noqa: SIM118
            "seq": self.sequences(parts["seq"])["seq"].values(),
            "tower": self.tower(parts["tower"]) * 1.0,  # waits
        }


class CpuTowerSharder(EmbeddingTowerSharder):
    """TorchRec gives a tower's DDP ``device_ids=[cpu]``, which DDP refuses; without a device it gives none."""

    def shard(self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: Any = None) -> Any:
        return super().shard(module, params, env, None, module_fqn)


def ids(key: str, rows: int, sample: int) -> list[int]:
    """1 to 3 ids of a sample."""
    start = sum(map(ord, key)) + 7 * sample
    return [(start + 11 * n) % rows for n in range(1 + (start % 3))]


def weight(sample: int, number: int) -> float:
    return 0.5 + ((sample + 2 * number) % 5) / 4


def table(name: str, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def inputs(samples: range) -> dict[str, KeyedJaggedTensor]:
    found = {}
    for part, sizes in {**ROWS, "seq": (80,)}.items():
        keys = {"seq": 80} if part == "seq" else {f"{part}{n}": rows for n, rows in enumerate(sizes)}
        listed = [ids(key, rows, sample) for key, rows in keys.items() for sample in samples]
        weights = [weight(sample, n) for key, rows in keys.items() for sample in samples
                   for n in range(len(ids(key, rows, sample)))]  # fmt: skip
        found[part] = KeyedJaggedTensor(
            keys=list(keys),
            values=torch.tensor([number for each in listed for number in each]),
            lengths=torch.tensor([len(each) for each in listed]),
            weights=torch.tensor(weights) if part == "weighted" else None,
        )
    return found


def expected(samples: range) -> dict[str, Tensor]:
    def pooled(part: str, n: int, rows: int) -> Tensor:
        key = f"{part}{n}"
        whole, found = table(f"t_{key}", rows, WIDTH), []
        for sample in samples:
            weights = torch.tensor([weight(sample, n) if part == "weighted" else 1.0
                                    for n in range(len(ids(key, rows, sample)))])  # fmt: skip
            found.append(weights @ nn.functional.embedding(torch.tensor(ids(key, rows, sample)), whole))
        return torch.stack(found)

    by_key = {f"{part}{n}": pooled(part, n, rows) for part, sizes in ROWS.items() for n, rows in enumerate(sizes)}
    torch.manual_seed(0)
    linear = nn.Linear(len(ROWS["tower"]) * WIDTH, 4)
    towers = torch.cat([by_key.pop(f"tower{n}") for n in range(len(ROWS["tower"]))], dim=1)
    sequence = torch.cat([table("t_seq", 80, 8)[ids("seq", 80, sample)] for sample in samples])
    return {**by_key, "seq": sequence, "tower": linear(towers).detach()}


def run(model: nn.Module, plan: ShardingPlan, sharders: list[Any]) -> dict[str, Tensor]:
    """What this rank gets for its part of the batch, with known rows in the tables."""
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    for name, value in sharded.state_dict().items():
        if (found := name.removesuffix(".weight").rpartition(".")[2]).startswith("t_"):
            whole = table(found, *value.size())
            shards = value.local_shards() if hasattr(value, "local_shards") else []
            for shard in shards:
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                shard.tensor.copy_(whole[row : row + rows, column : column + columns])
            if not shards and not hasattr(value, "local_shards"):
                value.detach().copy_(whole)
    share = SAMPLES // RANKS
    mine = range(share * dist.get_rank(), share * (dist.get_rank() + 1))
    return {key: each.detach() for key, each in sharded(inputs(mine)).items()}


def places(plan: ShardingPlan) -> dict[str, dict[str, tuple[str, list[int]]]]:
    return {
        path: {name: (each.sharding_type, list(each.ranks)) for name, each in tables.items()}  # type: ignore[attr-defined]
        for path, tables in plan.plan.items()
    }


def program(file: Path) -> dict[str, Any]:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank() % 2)}  # two hosts of two
    torchrec.distributed.comm._INTRA_PG = torchrec.distributed.comm._CROSS_PG = None
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(), CpuTowerSharder()]
    model = Model()
    planner = BalancedPlanner(batch_size=SAMPLES // RANKS)
    plan = planner.collective_plan(model, sharders)
    if dist.get_rank() == 0:
        save_sharding_plan(
            plan, file, model, world_size=RANKS, local_world_size=2, search=str(planner.search), sharders=sharders
        )
    dist.barrier()
    loaded = load_sharding_plan(file, model, device=CPU, sharders=sharders)
    reported = {"places": places(plan), "again": places(loaded), "equal": loaded == plan}
    return reported | {"out": run(model, plan, sharders), "loaded": run(Model(), loaded, sharders)}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(program, RANKS, tmp_path_factory.mktemp("plan") / "plan.json")


def test_every_kind_of_collection_looks_up_what_plain_torch_does(reported: list[dict[str, Any]]) -> None:
    share = SAMPLES // RANKS
    for rank, each in enumerate(reported):
        wanted = expected(range(share * rank, share * (rank + 1)))
        for which in ("out", "loaded"):
            assert set(each[which]) == set(wanted)
            for key, value in wanted.items():
                assert torch.allclose(each[which][key], value, atol=1e-5), (which, rank, key)


def test_all_tables_are_planned_and_a_tower_has_one_host(reported: list[dict[str, Any]]) -> None:
    plan = reported[0]["places"]
    assert set(plan) == {"plain", "weighted", "sequences", "tower"}
    assert {path: len(tables) for path, tables in plan.items()} == {
        "plain": 3,
        "weighted": 2,
        "sequences": 1,
        "tower": 3,
    }
    assert len({rank // 2 for _, ranks in plan["tower"].values() for rank in ranks}) == 1


def test_a_file_gives_the_same_plan_on_every_rank(reported: list[dict[str, Any]]) -> None:
    assert all(each["equal"] and each["again"] == reported[0]["places"] for each in reported)


def test_never_worse_than_torchrecs_planner() -> None:
    """By the critical path of all terms, summed here from the options of both."""
    at = Topology(world_size=8, local_world_size=4, compute_device="cuda")
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder(), EmbeddingTowerSharder()]
    torchrec_planner = EmbeddingShardingPlanner(
        topology=at,
        batch_size=512,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        stats=NoopEmbeddingStats(),
    )
    torchrec_planner.plan(Model(), sharders)
    balanced = BalancedPlanner(at, 512)
    balanced.plan(Model(), sharders)

    def slowest(options: Any) -> float:
        ms = [0.0] * 8
        for option in options:
            for shard in option.shards:
                perf = shard.perf
                ms[shard.rank] += perf.fwd_compute + perf.fwd_comms + perf.bwd_compute + perf.bwd_comms
                ms[shard.rank] += perf.prefetch_compute + perf.input_dist_comms
        return max(ms)

    assert balanced.critical_path_ms == pytest.approx(slowest(balanced.options))
    assert slowest(balanced.options) <= slowest(torchrec_planner._best_plan) * (1 + 1e-9)


def test_the_planner_finds_what_the_command_finds() -> None:
    tables = criteo_tables(64)
    at = topology(PRESETS["h100"], 16)
    configs = [
        EmbeddingBagConfig(
            name=each.name, feature_names=[each.name], num_embeddings=each.num_embeddings, embedding_dim=64
        )
        for each in tables
    ]
    objectives: tuple[Objective, ...] = ("all", "total")
    for objective in objectives:
        planner = BalancedPlanner(at, 8192, objective=objective)
        planner.plan(EmbeddingBagCollection(tables=configs, device=META), [EmbeddingBagCollectionSharder()])  # type: ignore[list-item]
        plan = plan_tables(tables, PRESETS["h100"], 16, batch_size=8192, objective=objective)
        assert plan.predicted is not None
        assert planner.critical_path_ms == pytest.approx(plan.predicted.slowest_ms(objective), rel=0.01)


def test_torchrecs_plan_is_found_where_the_search_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any number of ranks: the search is crippled, it finds nothing."""
    at = topology(PRESETS["torchrec"], 32)
    monkeypatch.setattr(best_plan.BestPlan, "balanced", lambda *_, **__: None)
    model = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t{n}", feature_names=[f"f{n}"], num_embeddings=10**5, embedding_dim=64)
            for n in range(10)
        ],
        device=META,
    )
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    torchrecs = EmbeddingShardingPlanner(
        topology=at,
        batch_size=512,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        stats=NoopEmbeddingStats(),
    )
    torchrecs.plan(model, sharders)
    slowest = [0.0] * 32
    for option in torchrecs._best_plan or []:
        for shard in option.shards:
            assert shard.perf is not None
            slowest[shard.rank or 0] += shard.perf.total + shard.perf.input_dist_comms
    for again in (2**17, 0):  # with TorchRec's enumerator, and without
        monkeypatch.setattr(best_plan, "_ENUMERATE_AGAIN", again)
        planner = BalancedPlanner(at, 512)
        planner.plan(model, sharders)
        assert planner.search == "torchrec"
        assert planner.critical_path_ms is not None
        assert planner.critical_path_ms <= max(slowest) * (1 + 1e-9)


def test_constraints_and_lack_of_memory() -> None:
    model = bags("plain")
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    at = Topology(world_size=4, local_world_size=4, compute_device="cuda")
    rules = {"t_plain1": ParameterConstraints(sharding_types=["row_wise"])}
    assert BalancedPlanner(at, 8, rules).plan(model, sharders).plan[""]["t_plain1"].sharding_type == "row_wise"  # type: ignore[index]
    small = Topology(world_size=4, local_world_size=4, compute_device="cuda", hbm_cap=2000, ddr_cap=100)
    with pytest.raises(UserError, match=r"table t_plain0: 40 x 16 .*use more ranks \(world_size\)") as caught:
        BalancedPlanner(small, 8).plan(model, sharders)
    assert "\n" not in str(caught.value)
    assert BalancedPlanner(at, 8).plan(nn.Linear(2, 2), sharders).plan == {}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = bags("plain"), bags("plain")


def test_a_plan_of_the_command_loads_by_name_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tables = [
        Table(name=f"t_plain{n}", num_embeddings=rows, embedding_dim=WIDTH) for n, rows in enumerate(ROWS["plain"])
    ]
    file = tmp_path / "plan.json"
    plan = plan_tables(tables, PRESETS["cpu"], 1, batch_size=8)
    save_plan(plan, file)
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    with one_rank() as device:
        loaded = load_sharding_plan(file, nn.ModuleDict({"bags": bags("plain")}), device=device)
        assert {name: len(each) for name, each in loaded.plan.items()} == {"bags": 3}  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"table t_plain0 is in one and two.*\"module\": \"one\""):
            load_sharding_plan(file, Twice(), device=device)
        with pytest.raises(UserError, match=r"table t_plain0 does not exist here"):
            load_sharding_plan(file, bags("tower"), device=device)
        both = BalancedPlanner(Topology(world_size=1, compute_device="cpu"), 8).plan(Twice(), sharders)
        save_sharding_plan(both, file, Twice(), world_size=1, local_world_size=1)
        assert load_plan(file).tables[0].label == "one.t_plain0"
        assert load_sharding_plan(file, Twice(), device=device) == both
        file.write_text(file.read_text().replace('"module": "two"', '"module": "three"'))
        with pytest.raises(UserError, match=r"table three.t_plain0 does not exist here"):
            load_sharding_plan(file, Twice(), device=device)
        save_plan(replace(plan, tables=plan.tables[:2]), file)
        with pytest.raises(UserError, match="lacks table t_plain2"):
            load_sharding_plan(file, bags("plain"), device=device)
        save_plan(plan_tables(tables, PRESETS["cpu"], 2, batch_size=8), file)
        with pytest.raises(UserError, match=r"made for 2 rank\(s\), but there are 1"):
            load_sharding_plan(file, bags("plain"), device=device)
