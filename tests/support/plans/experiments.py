"""PlanSet written down by hand, and experiments with made-up measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchrec_deepfm.experiment.results import CollectiveBytes, Experiment, PlanMeasured, RankMeasured, Settings
from torchrec_deepfm.sharding.estimate import with_prediction
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedShard, PlannedTable

BATCH_SIZE = 64


def cpu(ranks: int) -> Hardware:
    return replace(PRESETS["cpu"], ranks_per_host=ranks)


def shards(table: Table, kind: str, ranks: int, owner: int) -> list[PlannedShard]:
    rows, columns = table.num_embeddings, table.embedding_dim
    if kind == "data_parallel":
        return [PlannedShard(rank=rank, offsets=(0, 0), sizes=(rows, columns)) for rank in range(ranks)]
    if kind == "table_wise":
        return [PlannedShard(rank=owner, offsets=(0, 0), sizes=(rows, columns))]
    if kind == "column_wise":
        part = columns // ranks
        return [PlannedShard(rank=r, offsets=(0, part * r), sizes=(rows, part)) for r in range(ranks)]
    assert kind in ("row_wise", "table_row_wise")
    step = -(-rows // ranks)
    cuts = [(min(rank * step, rows), min((rank + 1) * step, rows)) for rank in range(ranks)]
    return [PlannedShard(rank=r, offsets=(a, 0), sizes=(b - a, columns)) for r, (a, b) in enumerate(cuts)]


def plan(tables: Sequence[Table], kinds: Sequence[str], ranks: int, owners: Sequence[int] | None = None) -> PlanFile:
    """A plan without predictions: the n-th table of the n-th kind, table-wise ones on the ranks in turn."""
    planned = [
        PlannedTable(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            sharding_type=kind,
            compute_kernel="dense" if kind == "data_parallel" else "fused",
            shards=tuple(shards(table, kind, ranks, owners[number] if owners else number % ranks)),
        )
        for number, (table, kind) in enumerate(zip(tables, kinds, strict=True))
    ]
    return PlanFile(
        world_size=ranks, local_world_size=ranks, batch_size=BATCH_SIZE, search="by hand", tables=tuple(planned)
    )


def rank_measured(rank: int, step_ms: float, *, turns: Sequence[float] = (1.2, 1.0, 0.9)) -> RankMeasured:
    return RankMeasured(
        rank=rank,
        step_ms=tuple(step_ms * turn for turn in turns),
        split_ms={"input_dist": 0.25 * step_ms, "lookup": 0.5 * step_ms, "dense": 0.25 * step_ms},
        traffic={"all_to_all": CollectiveBytes(calls=2, given_bytes=2000, sent_bytes=1000)},
        table_bytes=1_000_000,
        peak_bytes=2_000_000,
    )


def experiment(
    tables: Sequence[Table], plans: Mapping[str, PlanFile], step_ms: Mapping[str, float], hardware: Hardware
) -> Experiment:
    """An experiment whose plans took so many milliseconds on every rank, with predictions for ``hardware``."""
    ranks = next(iter(plans.values())).world_size
    return Experiment(
        settings=Settings(
            tables=tuple(tables),
            ranks=ranks,
            local_ranks=ranks,
            batch_size=BATCH_SIZE,
            steps=5,
            turns=3,
            optimizer="rowwise_adagrad",
            over_arch_layer_sizes=(8,),
            ids="zipf",
            seed=0,
            device="cpu",
        ),
        plans=tuple(
            PlanMeasured(
                name=name,
                plan=with_prediction(one, tables, hardware),
                ranks=tuple(rank_measured(rank, step_ms[name]) for rank in range(ranks)),
            )
            for name, one in plans.items()
        ),
        hardware=hardware,
        left_out={"torchrec": "the same plan as balanced"},
        scaling={ranks: 1.0, 2 * ranks: 1.5},
        made_at="2026-01-01 00:00 UTC",
        made_with={"torch": "2"},
    )
