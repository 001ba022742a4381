"""What DeepFM does beside TorchRec's DLRM: every pipeline with every collection, and the ways to take a model apart.

Both models go through the same trials, and the tables of docs/pipelines.md are what these printed.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from tests.model.training_loops import pipelined, plain_loop, through
from tests.support.ranks import CPU, run_ranks
from tests.support.samples import batches_of_rank, draw
from torchrec_deepfm import DeepFM, DeepFMTrain, FeatureProcessedTables, ManagedCollisionTables, embedding_tables
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder

SIZES = {"a": 30, "b": 20}
STEPS = 5
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
COLLECTIONS = ("EmbeddingBagCollection", "feature-processed", "managed collisions")
MODELS = ("DeepFM", "DLRM")
Collection = EmbeddingBagCollection | FeatureProcessedTables | ManagedCollisionTables


def collection(kind: str) -> Collection:
    configs = embedding_tables(SIZES, 3)
    ebc = EmbeddingBagCollection(tables=configs, is_weighted=kind == "feature-processed")
    if kind == "feature-processed":
        positions = PositionWeightedModuleCollection(dict.fromkeys(SIZES, 3))
        return FeatureProcessedTables(FeatureProcessedEmbeddingBagCollection(ebc, positions))
    if kind == "managed collisions":
        rows = {
            config.name: MCHManagedCollisionModule(
                config.num_embeddings, CPU, DistanceLFU_EvictionPolicy(), 3, buckets=2
            )
            for config in configs
        }
        managed = ManagedCollisionCollection(rows, configs)
        return ManagedCollisionTables(ManagedCollisionEmbeddingBagCollection(ebc, managed))
    return ebc


def unsharded(model: str, tables: Collection) -> nn.Module:
    torch.manual_seed(0)
    if model == "DeepFM":
        return DeepFMTrain(DeepFM(tables, 2, (8,), 3, dropout=0.0, init_std=0.5))
    return DLRMTrain(DLRM(tables, 2, [8, 4], [8, 1], dense_device=CPU))  # type: ignore[arg-type]


@torch.enable_grad()
def sharded(model: str, kind: str) -> DistributedModelParallel:
    """On every rank the same weights, row-wise, with the SGD of the tables fused."""
    module = unsharded(model, collection(kind))
    tables = [weight for name, weight in module.named_parameters() if "embedding_bags" in name]
    apply_optimizer_in_backward(torch.optim.SGD, tables, {"lr": 0.3})
    sharders: list[Any] = [
        ManagedCollisionEmbeddingBagCollectionSharder(AllTypesSharder()),
        FeatureProcessedEmbeddingBagCollectionSharder(AllTypesSharder()),
        AllTypesSharder(),
    ]
    row_wise = ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])
    constraints = {config.name: row_wise for config in embedding_tables(SIZES, 3)}
    planner = EmbeddingShardingPlanner(topology=Topology(dist.get_world_size(), "cpu"), constraints=constraints)
    plan = planner.collective_plan(module, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(module, device=CPU, plan=plan, sharders=sharders, init_parameters=False)


def batches(ids: int = 1) -> list[Batch]:
    """This rank's batches; ids are int64, as managed collisions want them, and ``ids`` times as large as drawn."""
    found = batches_of_rank(draw(STEPS * 32, SIZES, 2, longest=3), ["b", "a"], 32)
    for batch in found:
        drawn = batch.sparse_features
        batch.sparse_features = KeyedJaggedTensor(drawn.keys(), drawn.values().long() * ids, lengths=drawn.lengths())
    return found


PIPELINES: dict[str, Callable[..., Any]] = {
    "TrainPipelineBase": TrainPipelineBase,
    "TrainPipelineSparseDist": TrainPipelineSparseDist,
    "TrainPipelineSparseDistLite": TrainPipelineSparseDistLite,
    "EvalPipelineSparseDist": EvalPipelineSparseDist,
}


def losses(model: DistributedModelParallel, pipeline: str | None) -> tuple[list[float], list[str]]:
    """The losses of a plain loop, or of a pipeline with the modules that it runs ahead."""
    dense = [weight for name, weight in model.named_parameters() if "embedding_bags" not in name]
    optimizer = torch.optim.SGD(dense, 0.3)
    if pipeline is None:
        return plain_loop(model, optimizer, batches()), []
    runner = PIPELINES[pipeline](model, optimizer, CPU)
    return [loss.item() for loss, *_ in through(runner, batches())], pipelined(runner)


def trials(model: str, kind: str, pipelines: Sequence[str] = tuple(PIPELINES)) -> list[str]:
    """What each pipeline does with a sharded model: ``yes`` if it gives the losses of the plain loop."""
    trained, _ = losses(sharded(model, kind), None)
    evaluation = sharded(model, kind).eval()
    with torch.no_grad():
        evaluated = [evaluation(batch)[0].item() for batch in batches()]
    assert len(set(trained)) == len(set(evaluated)) == STEPS
    entries = []
    for pipeline in pipelines:
        is_training = not pipeline.startswith("Eval")
        try:
            with torch.set_grad_enabled(is_training):
                found, ahead = losses(sharded(model, kind).train(is_training), pipeline)
        except Exception as error:  # what these raise is theirs to choose, and part of the table
            entries.append(f"no: {type(error).__name__}")
            continue
        assert found == pytest.approx(trained if is_training else evaluated, rel=1e-6)
        entries.append("yes, ids ahead" if ahead else "yes")
    return entries


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_models_run_in_the_same_pipelines(device: torch.device) -> None:
    found = [trials("DeepFM", kind) for kind in COLLECTIONS]
    assert found == [trials("DLRM", kind) for kind in COLLECTIONS]
    table = markdown(["pipeline", *COLLECTIONS], dict(zip(PIPELINES, zip(*found, strict=True), strict=True)))
    assert table in PAGE.read_text(), table


def on_two_ranks() -> list[list[str]]:
    return [trials("DeepFM", kind, ["TrainPipelineSparseDist"]) for kind in COLLECTIONS]


def test_two_ranks_run_ids_ahead() -> None:
    assert run_ranks(on_two_ranks, 2) == [[["yes, ids ahead"]] * len(COLLECTIONS)] * 2


# The model by itself. A trial returns the logits that it gives and those that are right.
Found = tuple[torch.Tensor, torch.Tensor]


def ids(extra: bool = False) -> KeyedJaggedTensor:
    keys = ["b", "other", "a"] if extra else ["a", "b"]
    values = {"a": [3, 29, 4], "b": [0, 19], "other": [999]}
    lengths = {"a": [2, 1], "b": [0, 2], "other": [1, 0]}
    return KeyedJaggedTensor(
        keys,
        torch.tensor([value for key in keys for value in values[key]]),
        lengths=torch.tensor([length for key in keys for length in lengths[key]]),
    )


DENSE = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


def plain(model: str, pooling: PoolingType = PoolingType.SUM) -> nn.Module:
    configs = [
        EmbeddingBagConfig(
            name=config.name,
            embedding_dim=config.embedding_dim,
            num_embeddings=config.num_embeddings,
            feature_names=config.feature_names,
            pooling=pooling,
        )
        for config in embedding_tables(SIZES, 3)
    ]
    module = unsharded(model, EmbeddingBagCollection(tables=configs))
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    found: nn.Module = module.model  # type: ignore[assignment]
    return found.eval()


def extra_key(model: str) -> Found:
    module = plain(model)
    return module(DENSE, ids(extra=True)), module(DENSE, ids())


def mean_pooling(model: str) -> Found:
    # Bags of one id have the same mean and sum, and the first bag of a is repeated.
    once = KeyedJaggedTensor(["a", "b"], torch.tensor([3, 4, 0, 1]), lengths=torch.tensor([1, 1, 1, 1]))
    twice = KeyedJaggedTensor(["a", "b"], torch.tensor([3, 3, 4, 0, 1]), lengths=torch.tensor([2, 1, 1, 1]))
    return plain(model, PoolingType.MEAN)(DENSE, twice), plain(model)(DENSE, once)


def scripted(model: str) -> Found:
    module = plain(model)
    return torch.jit.script(module)(DENSE, ids()), module(DENSE, ids())  # type: ignore[attr-defined]


def traced(model: str) -> Found:
    from torchrec.fx import Tracer

    module = plain(model)
    graph = torch.fx.GraphModule(module, Tracer(leaf_modules=["EmbeddingBagCollection"]).trace(module))
    return graph(DENSE, ids()), module(DENSE, ids())


def dense_path_compiled(model: str) -> Found:
    module = plain(model)
    expected = module(DENSE, ids())
    with pytest.MonkeyPatch.context() as patch:  # the C++ compiler takes seconds, and is not what is tried
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        module.compile_dense_path(compile_mode="default")  # type: ignore[operator]
        found = module(DENSE, ids())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return found, expected


def copied(model: str) -> Found:
    import copy

    module = plain(model)
    return copy.deepcopy(module)(DENSE, ids()), module(DENSE, ids())


ALONE: Mapping[str, Callable[[str], Found]] = {
    "a batch with a feature that no table has": extra_key,
    "tables pooled by mean": mean_pooling,
    "`torch.jit.script(model)`": scripted,
    "TorchRec's `fx.Tracer`": traced,
    "`compile_dense_path()`": dense_path_compiled,
    "`copy.deepcopy`": copied,
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def alone(model: str, name: str) -> str:
    with torch.no_grad():
        try:
            found, expected = ALONE[name](model)
        except RuntimeError as error:
            return f"no: {type(error).__name__}"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    return "yes"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_model_by_itself_does_what_dlrm_does() -> None:
    rows = {name: [alone(model, name) for model in MODELS] for name in ALONE}
    table = markdown(["", *MODELS], rows)
    assert [row[0] for row in rows.values()] == ["yes"] * len(ALONE), table
    assert table in PAGE.read_text(), table


@pytest.mark.parametrize("model", MODELS)
def test_managed_collisions_take_any_id(model: str, device: torch.device) -> None:
    """Ids far beyond the tables, which a table of its own size refuses."""
    module = unsharded(model, collection("managed collisions"))
    far = batches(ids=2**40)[0]
    assert torch.isfinite(module(far)[0])
    if model == "DeepFM":
        with pytest.raises(ValueError, match="its table has"):
            unsharded(model, collection("EmbeddingBagCollection"))(far)


def test_positions_weigh_ids(device: torch.device) -> None:
    """A bag's second id counts by the second learned weight, as in a weighted collection with these weights."""
    weighted = EmbeddingBagCollection(tables=embedding_tables(SIZES, 3), is_weighted=True)
    processed = collection("feature-processed")
    model, oracle = DeepFM(processed, 0, (8,), 3, dropout=0.0), DeepFM(weighted, 0, (8,), 3, dropout=0.0)
    state = model.state_dict()
    positions = {key: torch.tensor([1.0, -2.0, 0.5]) + number for number, key in enumerate(SIZES)}
    for name in state:
        if match := re.search(r"position_weights\.(\w+)$", name):
            state[name] = positions[match[1]]
    model.load_state_dict(state)
    inner = {name.replace("collection._embedding_bag_collection.", ""): each for name, each in state.items()}
    oracle.load_state_dict({name: each for name, each in inner.items() if "position_weight" not in name})
    bags = ids()
    weights = torch.cat([positions["a"][:2], positions["a"][:1], positions["b"][:2]])
    given = KeyedJaggedTensor(bags.keys(), bags.values(), weights=weights, lengths=bags.lengths())
    torch.testing.assert_close(model(torch.empty(2, 0), bags), oracle(torch.empty(2, 0), given))


def markdown(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
