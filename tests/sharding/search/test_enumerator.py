"""The options of tables: TorchRec's own, at every width, and with all that its enumerator knows of a model."""

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerCollectionSharder, EmbeddingTowerSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardingOption
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection

from torchrec_deepfm.sharding.search.enumerator import WidthEnumerator
from torchrec_deepfm.sharding.search.torchrec_parts import AllTermsPerfModel, BalancedPartitioner, BalancedProposer

META = torch.device("meta")
SHARDERS = [
    EmbeddingBagCollectionSharder(),
    EmbeddingCollectionSharder(),
    EmbeddingTowerSharder(),
    EmbeddingTowerCollectionSharder(),
]


def bags(prefix: str, count: int, width: int = 64, rows: int = 500_000) -> EmbeddingBagCollection:
    names = [f"{prefix}{number}" for number in range(count)]
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[f"f_{name}"], num_embeddings=rows, embedding_dim=width)
        for name in names
    ]
    return EmbeddingBagCollection(tables=tables, device=META)


class Model(nn.Module):
    """A collection, an unpooled one, a tower, and two towers in a collection of towers."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = bags("bag", 3)
        tables = [EmbeddingConfig(name="seq", feature_names=["f_seq"], num_embeddings=10_000, embedding_dim=32)]
        self.ec = EmbeddingCollection(tables=tables, device=META)
        self.tower = EmbeddingTower(bags("tower", 9), nn.Linear(9 * 64, 8))
        two = [EmbeddingTower(bags(f"two{name}_", 4), nn.Linear(4 * 64, 8)) for name in "ab"]
        self.towers = EmbeddingTowerCollection(two)


def described(option: ShardingOption) -> tuple[object, ...]:
    shards = tuple((*shard.size, *shard.offset) for shard in option.shards)
    return option.fqn, option.sharding_type, option.compute_kernel, option.dependency, option.is_pooled, shards


def test_every_option_is_one_that_torchrec_makes_for_some_width() -> None:
    at = Topology(world_size=8, local_world_size=4, compute_device="cuda")
    model = Model()
    enumerator = WidthEnumerator(at, 512)
    found = enumerator.enumerate(model, SHARDERS)  # type: ignore[arg-type]
    assert len({described(option) for option in found}) == len(found)
    torchrecs = set()
    names = {option.name for option in found}
    # The towers take two types, and TorchRec refuses a table whose constraint leaves none.
    kinds = ["table_wise", "row_wise", "column_wise", "data_parallel", "table_row_wise", "table_column_wise"]
    for width in (8, 16, 32, 64):
        for grid in ([], ["grid_shard"]):
            rules = {name: ParameterConstraints(min_partition=width, sharding_types=kinds + grid) for name in names}
            theirs = EmbeddingEnumerator(at, 512, rules)
            torchrecs |= {described(option) for option in theirs.enumerate(model, SHARDERS)}  # type: ignore[arg-type]
    assert {described(option) for option in found} <= torchrecs
    assert all(shard.perf and shard.storage for option in found for shard in option.shards)
    of_bag = {(each.sharding_type, each.shards[0].size[1]) for each in found if each.name == "bag0"}
    assert {width for kind, width in of_bag if kind == "column_wise"} == {8, 16, 32}
    assert ("grid_shard", 32) in of_bag  # without a constraint that asks for it
    tower = {(each.sharding_type, each.shards[0].size[1]) for each in found if each.name == "tower0"}
    assert {("table_row_wise", 64), ("table_column_wise", 16), ("table_column_wise", 32)} <= tower
    assert {kind for kind, _ in tower} == {"table_row_wise", "table_column_wise"}
    assert {each.is_pooled for each in found if each.name == "seq"} == {False}


def test_a_second_call_gives_copies() -> None:
    at = Topology(world_size=4, local_world_size=4, compute_device="cuda")
    enumerator, model = WidthEnumerator(at, 512), bags("bag", 2)
    first = enumerator.enumerate(model, SHARDERS)  # type: ignore[arg-type]
    first[0].shards[0].rank = 3
    again = enumerator.enumerate(model, SHARDERS)  # type: ignore[arg-type]
    assert [described(option) for option in again] == [described(option) for option in first]
    assert not {id(option) for option in again} & {id(option) for option in first}
    other = bags("other", 2)
    assert {option.name for option in enumerator.enumerate(other, SHARDERS)} == {"other0", "other1"}  # type: ignore[arg-type]


def test_the_tables_of_a_tower_stay_on_one_host() -> None:
    """As ``ShardedEmbeddingTower`` asserts; without ``dependency`` a tower of nine tables lands on two hosts."""
    at = Topology(world_size=16, local_world_size=8, compute_device="cuda")
    planner = EmbeddingShardingPlanner(
        topology=at,
        batch_size=512,
        enumerator=WidthEnumerator(at, 512),
        proposer=BalancedProposer(),
        partitioner=BalancedPartitioner(),
        performance_model=AllTermsPerfModel(at),
    )
    plan = planner.plan(Model(), SHARDERS).plan  # type: ignore[arg-type]
    towers = {"tower": ["tower"], "towers": ["twoa", "twob"]}
    for path, prefixes in towers.items():
        tables = plan[path]
        for prefix in prefixes:
            ranks = {rank for name, each in tables.items() if name.startswith(prefix) for rank in each.ranks}  # type: ignore[attr-defined]
            assert len({rank // 8 for rank in ranks}) == 1, (prefix, sorted(ranks))
