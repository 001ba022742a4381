"""The balanced search as a planner of TorchRec, for any model: it makes the plan for ``DistributedModelParallel``."""

import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.planners import EmbeddingPlannerBase, get_device_type, to_sharding_plan
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption, StorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from torchrec_deepfm.launch.processes import pod_size
from torchrec_deepfm.sharding.estimate import shard_estimators
from torchrec_deepfm.sharding.inputs.constraints import keep_to_possible
from torchrec_deepfm.sharding.inputs.hardware import RESERVED
from torchrec_deepfm.sharding.plan.plan import Objective
from torchrec_deepfm.sharding.runtime.module_plan import sharded_tables
from torchrec_deepfm.sharding.runtime.planner_errors import explain_planner_error
from torchrec_deepfm.sharding.search.best_plan import BestPlan
from torchrec_deepfm.sharding.search.choice import Effort
from torchrec_deepfm.sharding.search.enumerator import WidthEnumerator


class BalancedPlanner(EmbeddingPlannerBase):
    """Plans any model of TorchRec by the balanced search: several collections, pooled or not, weighted or not, towers.

    It takes the place of ``EmbeddingShardingPlanner``, and keeps the plan of that one where it is the faster by the
    objective. Kernels with rows in host memory are tried where the others leave no room.

    Args:
        topology: The ranks. Default: those of the process group, with TorchRec's bandwidths.
            ``inputs.topology.topology`` makes one from a hardware description.
        batch_size: Samples per rank and step.
        constraints: What may be done with single tables, by name, such as their ``pooling_factors``.
        objective: What is made small (``plan.Objective``): ``all`` terms, ``total``, or ``hidden-ids``.
        storage_reservation: Memory that tables may not take. Default: 15% of a rank's.
        effort: How long the search runs.

    Attributes:
        search: ``balanced`` or ``torchrec``, whose plan it was; None before ``plan``.
        critical_path_ms: Predicted milliseconds per step of the slowest rank under the objective; None before ``plan``.
        options: The plan as TorchRec's options, with ranks and estimates.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        >>> from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        >>> tables = [EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=10**6, embedding_dim=64)]
        >>> planner = BalancedPlanner(Topology(world_size=2, compute_device="cuda"), batch_size=512)
        >>> model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        >>> planner.plan(model, [EmbeddingBagCollectionSharder()]).plan[""]["t"].sharding_type
        'column_wise'
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        *,
        objective: Objective = "all",
        storage_reservation: StorageReservation | None = None,
        effort: Effort | None = None,
    ) -> None:
        if topology is None:
            world_size = dist.get_world_size()
            topology = Topology(
                world_size=world_size,
                local_world_size=get_local_size(world_size),
                pod_size=pod_size(),
                compute_device=get_device_type(),
            )
        batch_size = batch_size or BATCH_SIZE
        self._estimators = shard_estimators(topology, constraints)
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=WidthEnumerator(topology, batch_size, constraints, self._estimators),
            storage_reservation=storage_reservation or FixedPercentageStorageReservation(percentage=RESERVED),
            constraints=constraints,
            stats=NoopEmbeddingStats(),
        )
        self._objective, self._effort = objective, effort
        self.search: str | None = None
        self.critical_path_ms: float | None = None
        self.options: list[ShardingOption] = []

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plan a model; in one process, without a process group. ``collective_plan`` plans on rank 0 for all ranks.

        Args:
            module: The model, its tables on ``meta`` or not.
            sharders: What the plan will be applied with.

        Returns:
            The plan; empty where nothing is to be sharded.

        Raises:
            UserError: The tables fit no plan, or constraints leave a table none.
        """
        best = BestPlan(
            module,
            sharders,
            topology=self._topology,
            batch_size=self._batch_size,
            constraints=self._constraints,
            estimators=self._estimators,
            storage_reservation=self._storage_reservation,
            objective=self._objective,
            effort=self._effort,
            torchrec_constraints=self._possible(module, sharders),
        )
        if not best.options:
            return ShardingPlan({})
        found = best.find()
        if found is None:
            assert best.error is not None
            raise explain_planner_error(
                best.error, best.options, best.reserved, ranks_option="world_size"
            ) from best.error
        self.critical_path_ms, self.search, self.options = found.ms, found.search, found.options
        return to_sharding_plan(found.options, self._topology)

    def _possible(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> dict[str, ParameterConstraints]:
        """Constraints that keep TorchRec's own search to types that these ranks can run."""
        sizes = {name: table for tables in sharded_tables(module, sharders).values() for name, table in tables.items()}
        return keep_to_possible(
            self._constraints or {},
            list(sizes.values()),
            compute_device=self._topology.compute_device,
            world_size=self._topology.world_size,
            local_world_size=self._topology.intra_group_size,
        )
