"""A sharding plan as plain values: which rank holds what of each table, and what that costs. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FORMAT = "torchrec_deepfm.plan"
FORMAT_VERSION = 2

TERMS = ("fwd_compute_ms", "fwd_comms_ms", "bwd_compute_ms", "bwd_comms_ms", "prefetch_ms", "input_dist_comms_ms")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a planner predicts of a shard, or of all that lies on a rank.

    Attributes:
        total_ms: milliseconds a step, all terms.
        fwd_compute_ms: look-ups in the forward pass, milliseconds.
        fwd_comms_ms: exchange of pooled rows.
        bwd_compute_ms: update of the rows.
        bwd_comms_ms: exchange of gradients.
        prefetch_ms: rows fetched into a cache in HBM.
        input_dist_comms_ms: exchange of ids.
        hbm_bytes: memory of the GPU, in bytes.
        ddr_bytes: memory of the host, in bytes.
    """

    total_ms: float
    fwd_compute_ms: float
    fwd_comms_ms: float
    bwd_compute_ms: float
    bwd_comms_ms: float
    prefetch_ms: float
    input_dist_comms_ms: float
    hbm_bytes: int
    ddr_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a planner predicts of a plan.

    Attributes:
        critical_path_ms: milliseconds a step of the slowest rank.
        mean_ms: the mean over the ranks.
        per_rank: one for each rank, rank 0 first.
    """

    critical_path_ms: float
    mean_ms: float
    per_rank: tuple[Cost, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {
            "critical_path_ms": self.critical_path_ms,
            "mean_ms": self.mean_ms,
            "per_rank": [{"rank": rank, **cost.to_json()} for rank, cost in enumerate(self.per_rank)],
        }


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A block of a table and the rank that holds it.

    Attributes:
        rank: the rank.
        offsets: row and column of the table at which it starts.
        sizes: its rows and columns.
        predicted: what it costs; None where nobody has predicted it.
    """

    rank: int
    offsets: tuple[int, int]
    sizes: tuple[int, int]
    predicted: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {
            "rank": self.rank,
            "offsets": list(self.offsets),
            "sizes": list(self.sizes),
            "predicted": None if self.predicted is None else self.predicted.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class PlannedTable:
    """Where a table goes.

    Attributes:
        name: of the table.
        num_embeddings: its rows.
        embedding_dim: its columns.
        sharding_type: one of TorchRec's ``ShardingType``.
        compute_kernel: one of TorchRec's ``EmbeddingComputeKernel``.
        shards: what each rank holds of it.
        kernel_options: what else TorchRec's ``ParameterSharding`` says of the kernel, such as ``cache_load_factor``.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    sharding_type: str
    compute_kernel: str
    shards: tuple[PlannedShard, ...]
    kernel_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each shard."""
        return tuple(shard.rank for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {
            "name": self.name,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "sharding_type": self.sharding_type,
            "compute_kernel": self.compute_kernel,
            **({"kernel_options": dict(self.kernel_options)} if self.kernel_options else {}),
            "ranks": list(self.ranks),
            "shards": [shard.to_json() for shard in self.shards],
        }


def _made_with() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchrec", "torchrec_deepfm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan of all tables, and what it was made for.

    Attributes:
        world_size: ranks.
        local_world_size: ranks per host.
        batch_size: samples per rank and step; None where it is not known.
        search: how it was found, such as ``stock`` or ``ours``.
        tables: where each table goes.
        hardware: the description of the hardware, as its own JSON; None where it was made for the machine at hand.
        predicted: what it costs; None where nobody has predicted it.
        made_with: versions.
    """

    world_size: int
    local_world_size: int
    batch_size: int | None
    search: str
    tables: tuple[PlannedTable, ...]
    hardware: Mapping[str, Any] | None = None
    predicted: Predicted | None = None
    made_with: Mapping[str, str] = field(default_factory=_made_with)

    def without_predictions(self) -> "PlanFile":
        """Return where the tables go, and no more."""
        tables = tuple(
            replace(table, shards=tuple(replace(shard, predicted=None) for shard in table.shards))
            for table in self.tables
        )
        return replace(self, predicted=None, tables=tables)

    def to_json(self) -> dict[str, Any]:
        """Return it as the file holds it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "world_size": self.world_size,
            "local_world_size": self.local_world_size,
            "batch_size": self.batch_size,
            "search": self.search,
            "hardware": None if self.hardware is None else dict(self.hardware),
            "made_with": dict(self.made_with),
            "predicted": None if self.predicted is None else self.predicted.to_json(),
            "tables": [table.to_json() for table in self.tables],
        }
