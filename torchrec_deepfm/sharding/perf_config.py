"""TorchRec's model of times with one term corrected: the ids that arrive at a shard.

TorchRec charges every row_wise, table_row_wise and grid_shard shard all ids of the global batch, though a rank receives
those of its own rows only: W (row_wise) or L times too many on W ranks in hosts of L. It leaves the weights of weighted
ids out. ``tests/sharding/test_bytes_that_arrive.py`` counts both on real ranks.
"""

from typing import Final

from torchrec.distributed.planner.estimator.annotations import input_dist_comms
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.estimator.types import ShardPerfContext
from torchrec.distributed.planner.types import CollectiveType
from torchrec.distributed.types import ShardingType

ARRIVING_IDS: Final = "torchrec_deepfm.arriving_ids"
"""Name of the estimator: ``EmbeddingPerfEstimatorFactory.create(ARRIVING_IDS, topology=..., constraints=...)``."""

WEIGHT_BYTES: Final = 4  # of an id's weight: float32


@EmbeddingPerfEstimatorFactory.register(ARRIVING_IDS)
class ArrivingIdsConfig(EmbeddingPerfEstimatorConfig):
    """TorchRec's default configuration, in which a shard is charged the ids of its own rows, and their weights.

    Ids are taken to be spread evenly over a table's rows, as in TorchRec's other terms.
    """

    def __dir__(self) -> list[str]:
        """Return the annotated methods only: TorchRec reads all that ``dir`` lists, 14 times for each shard."""
        return [ArrivingIdsConfig.arriving_ids.__name__]

    @input_dist_comms(sharding_type=[each.value for each in ShardingType if each != ShardingType.DATA_PARALLEL])
    def arriving_ids(self, ctx: ShardPerfContext) -> float:
        """Return milliseconds that the ids of a shard's rows take to arrive from all ranks."""
        assert ctx.comms_bandwidths is not None
        bandwidth = ctx.comms_bandwidths.get_bw(
            world_size=ctx.world_size,
            local_world_size=ctx.local_world_size,
            collective_type=CollectiveType.ALL_TO_ALL,
        )
        rows = ctx.hash_size_for_clamping  # of the whole table, where hash_size is of the shard
        ids = ctx.batch_inputs * ctx.world_size * (ctx.hash_size / rows if rows else 1.0)
        return float(ids * (ctx.input_data_type_size + WEIGHT_BYTES * ctx.is_weighted) / bandwidth)
