"""A sharding plan as plain values: which rank holds what of each table, and what that costs. Loads no torch.

The types and ranges that the fields declare are checked where a plan is read from a file (``plan_file``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from torchrec_deepfm.sharding.inputs.hardware import Hardware

Search = Literal["balanced", "torchrec"]
OLD_SEARCHES: Final = {"ours": "balanced", "stock": "torchrec"}
"""Names of the searches in plans and command lines of earlier versions."""

Objective = Literal["all", "total", "hidden-ids"]
"""What a search makes small, of the slowest rank: all terms; all except the exchange of ids, which is TorchRec's
``Perf.total``; or all, with that exchange hidden behind look-ups and updates, as a pipelined training overlaps them."""

FORMAT = "torchrec_deepfm.plan"
FORMAT_VERSION = 2
TERMS = ("fwd_compute_ms", "fwd_comms_ms", "bwd_compute_ms", "bwd_comms_ms", "prefetch_ms", "input_dist_comms_ms")

Count = Annotated[int, Meta(ge=0, le=2**62)]
PositiveCount = Annotated[int, Meta(ge=1, le=2**62)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e300)]  # sums of it are still finite
Text = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a planner predicts for a shard, or for all shards of a rank, per step.

    Attributes:
        total_ms: all terms, milliseconds.
        fwd_compute_ms: look-ups in the forward pass.
        fwd_comms_ms: exchange of pooled rows.
        bwd_compute_ms: update of the rows.
        bwd_comms_ms: exchange of gradients.
        prefetch_ms: rows fetched into a cache in HBM.
        input_dist_comms_ms: exchange of ids.
        hbm_bytes: memory of the GPU, bytes.
        ddr_bytes: memory of the host, bytes.
    """

    total_ms: Milliseconds
    fwd_compute_ms: Milliseconds
    fwd_comms_ms: Milliseconds
    bwd_compute_ms: Milliseconds
    bwd_comms_ms: Milliseconds
    prefetch_ms: Milliseconds
    input_dist_comms_ms: Milliseconds
    hbm_bytes: Count
    ddr_bytes: Count

    def ms(self, objective: Objective) -> float:
        """Return milliseconds per step under an objective.

        Example:
            >>> terms = dict.fromkeys(TERMS, 1.0) | {"input_dist_comms_ms": 2.5}
            >>> cost = Cost(total_ms=7.5, **terms, hbm_bytes=0, ddr_bytes=0)
            >>> cost.ms("all"), cost.ms("total"), cost.ms("hidden-ids")
            (7.5, 5.0, 5.0)
        """
        # While kernels run, the link is free for ids; rows and gradients need it themselves.
        kernels = self.fwd_compute_ms + self.bwd_compute_ms + self.prefetch_ms
        ids = self.input_dist_comms_ms
        hidden = {"all": 0.0, "total": ids, "hidden-ids": min(ids, kernels)}[objective]
        return self.total_ms - hidden


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What a planner predicts for a plan.

    Attributes:
        critical_path_ms: milliseconds per step of the slowest rank, all terms.
        mean_ms: the mean over the ranks.
        per_rank: one for each rank, rank 0 first.
    """

    critical_path_ms: Milliseconds
    mean_ms: Milliseconds
    per_rank: Annotated[tuple[Cost, ...], Meta(min_length=1)]

    def slowest_ms(self, objective: Objective) -> float:
        """Return milliseconds per step of the rank that is slowest under an objective."""
        return max(cost.ms(objective) for cost in self.per_rank)


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """A block of a table and the rank that holds it; ``offsets`` are the row and column at which it starts."""

    rank: Count
    offsets: tuple[Count, Count]
    sizes: tuple[Count, Count]
    predicted: Cost | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedTable:
    """Where a table goes, in TorchRec's words.

    ``kernel_options`` are further fields of TorchRec's ``ParameterSharding``, such as ``cache_load_factor``. ``module``
    is the path of the table's collection in the model; empty where the plan is for a list of tables, or for a model
    with one collection.
    """

    name: Text
    num_embeddings: PositiveCount
    embedding_dim: PositiveCount
    sharding_type: Text
    compute_kernel: Text
    shards: Annotated[tuple[PlannedShard, ...], Meta(min_length=1)]
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""

    def __post_init__(self) -> None:
        """Refuse a name that spans lines."""
        if not self.label.isprintable():
            raise ValueError(f"name {self.label!r} can't be printed on one line")

    @property
    def label(self) -> str:
        """Its name, after the path of its collection if the plan gives one."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each shard."""
        return tuple(shard.rank for shard in self.shards)


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

    ``pod_size`` hosts share an NVLink domain, over which table_row_wise, table_column_wise and the blocks of grid_shard
    may spread. ``batch_size`` is per rank and step; None where it is not known. ``search`` is how it was found, such as
    ``balanced`` or ``torchrec``, ``objective`` what was made small. ``hardware`` is None where the plan was made for
    the machine at hand.
    """

    world_size: PositiveCount
    local_world_size: PositiveCount
    batch_size: PositiveCount | None
    search: Text
    tables: Annotated[tuple[PlannedTable, ...], Meta(min_length=1)]
    hardware: Hardware | None = None
    predicted: PlanCost | None = None
    pod_size: PositiveCount = 1
    made_with: Mapping[str, Text] = field(default_factory=_made_with)
    objective: Objective = "all"

    @property
    def domain_size(self) -> int:
        """Ranks of a host, or of an NVLink domain where hosts share one."""
        return self.local_world_size * self.pod_size

    def without_predictions(self) -> "PlanFile":
        """Return where the tables go, without costs."""
        tables = tuple(
            replace(table, shards=tuple(replace(shard, predicted=None) for shard in table.shards))
            for table in self.tables
        )
        return replace(self, predicted=None, tables=tables)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the plan's file."""
        predicted = None
        if self.predicted is not None:
            costs = [{"rank": rank, **vars(cost)} for rank, cost in enumerate(self.predicted.per_rank)]
            predicted = {**vars(self.predicted), "per_rank": costs}
        tables = [
            {
                "name": table.name,
                **({"module": table.module} if table.module else {}),
                "num_embeddings": table.num_embeddings,
                "embedding_dim": table.embedding_dim,
                "sharding_type": table.sharding_type,
                "compute_kernel": table.compute_kernel,
                **({"kernel_options": dict(table.kernel_options)} if table.kernel_options else {}),
                "ranks": table.ranks,
                "shards": [
                    {
                        "rank": shard.rank,
                        "offsets": shard.offsets,
                        "sizes": shard.sizes,
                        "predicted": None if shard.predicted is None else vars(shard.predicted),
                    }
                    for shard in table.shards
                ],
            }
            for table in self.tables
        ]
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "world_size": self.world_size,
            "local_world_size": self.local_world_size,
            **({"pod_size": self.pod_size} if self.pod_size > 1 else {}),
            "batch_size": self.batch_size,
            "search": self.search,
            "objective": self.objective,
            "hardware": None if self.hardware is None else self.hardware.to_json(),
            "made_with": dict(self.made_with),
            "predicted": predicted,
            "tables": tables,
        }


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One kind of hardware at one number of ranks: the plan with predictions, or why there is none."""

    hardware: Hardware
    ranks: int
    plan: PlanFile | None = None
    why: str = ""

    @property
    def step_ms(self) -> float | None:
        """Milliseconds per step of the slowest rank."""
        return None if self.plan is None or self.plan.predicted is None else self.plan.predicted.critical_path_ms

    @property
    def samples_per_second(self) -> float | None:
        """Samples of all ranks per second."""
        if self.plan is None or self.plan.batch_size is None or not self.step_ms:
            return None
        return self.plan.batch_size * self.ranks / self.step_ms * 1000

    @property
    def dollars(self) -> float | None:
        """Dollars per billion samples; None without a price."""
        if self.hardware.dollars_per_hour is None or self.samples_per_second is None:
            return None
        return self.hardware.dollars_per_hour * self.ranks / 3600 / self.samples_per_second * 1e9
