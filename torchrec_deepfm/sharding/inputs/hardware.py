"""A kind of hardware: what a rank holds and how fast bytes move. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from torchrec_deepfm.errors import UserError

ComputeDevice = Literal["cuda", "cpu"]
FixedCost = Literal["step_ms", "shard_ms", "group_ms"]

EXTRA: Final[Mapping[FixedCost, str]] = MappingProxyType(
    {
        "step_ms": "a step without any table: the dense part, and what no plan changes",
        "shard_ms": "each shard on a rank: kernels to launch, buffers to split",
        "group_ms": "each sharding type in the plan: it has collectives of its own",
    }
)
"""Fixed costs that ``calibrate`` fits and TorchRec's estimators leave out; each in milliseconds per step."""

RESERVED: Final = 0.15
"""Share of a GPU's memory that is kept for the dense part, activations and what the estimates miss."""

MAX_RANKS: Final = 2**16
"""More ranks than any cluster has: a larger number is a typing error, which would keep a planner busy for days."""
MAX_BATCH_SIZE: Final = 2**31 - 1
"""Samples per rank; TorchRec's lengths and offsets count no further."""

CAPACITIES: Final = ("hbm_bytes", "ddr_bytes")
BANDWIDTHS: Final = (
    "hbm_bandwidth",
    "ddr_bandwidth",
    "hbm_to_ddr_bandwidth",
    "intra_host_bandwidth",
    "inter_host_bandwidth",
)

Capacity = Annotated[int, Meta(ge=1, le=2**60)]
Bandwidth = Annotated[float, Meta(ge=1, le=1e30)]  # 1e30 is what calibrate takes for unlimited
FixedMilliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Text = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine, as a planner sees it.

    Args:
        name: Its name.
        compute_device: ``cuda`` or ``cpu``: where the tables are looked up.
        ranks_per_host: Ranks (GPUs, or CPU processes) on a host.
        hbm_bytes: Memory of a GPU in bytes; ``None`` for CPU ranks.
        ddr_bytes: Host memory per rank, in bytes.
        hbm_bandwidth: Bytes per second from a GPU's memory. Not used for CPU ranks.
        ddr_bandwidth: Bytes per second from host memory, per rank.
        hbm_to_ddr_bandwidth: Bytes per second between a GPU and host memory.
        intra_host_bandwidth: Bytes per second that a rank sends to the others of its host, one direction.
        inter_host_bandwidth: Bytes per second that a rank sends to other hosts, one direction.
        pod_size: Hosts of an NVLink domain, inside which ``intra_host_bandwidth`` holds. TorchRec's name.
        source: Where the figures come from.
        dollars_per_hour: Price of a rank, where known.
        extra: Fixed costs in milliseconds, with the keys of ``EXTRA``.

    Raises:
        ValueError: A GPU's memory is missing, or ``extra`` has another key.

    Example:
        >>> from torchrec_deepfm.sharding.inputs.presets import PRESETS
        >>> PRESETS["h100"].inter_host_bandwidth / 1e9  # one 400 Gb/s adapter per GPU
        50.0
    """

    name: Text
    compute_device: ComputeDevice
    ranks_per_host: Annotated[int, Meta(ge=1, le=MAX_RANKS)]
    hbm_bytes: Capacity | None
    ddr_bytes: Capacity
    hbm_bandwidth: Bandwidth
    ddr_bandwidth: Bandwidth
    hbm_to_ddr_bandwidth: Bandwidth
    intra_host_bandwidth: Bandwidth
    inter_host_bandwidth: Bandwidth
    source: Text
    pod_size: Annotated[int, Meta(ge=1, le=MAX_RANKS)] = 1
    dollars_per_hour: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    extra: Mapping[FixedCost, FixedMilliseconds] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check what the types do not declare."""
        for key in ("name", "source"):
            if not " ".join(getattr(self, key).split()).isprintable():
                raise ValueError(f"{key}: {getattr(self, key)!r} can't be printed")
        if self.compute_device == "cpu" and self.pod_size > 1:
            raise ValueError("pod_size: hosts of CPU ranks share no NVLink; leave it out")
        if self.compute_device == "cuda" and self.hbm_bytes is None:
            raise ValueError("hbm_bytes: missing, which cuda ranks have")

    @property
    def rank_bytes(self) -> int:
        """Memory of a rank in which its tables lie, in bytes: a GPU's own, or its share of the host's."""
        return self.ddr_bytes if self.hbm_bytes is None or self.compute_device == "cpu" else self.hbm_bytes

    def local_world_size(self, ranks: int) -> int:
        """Return how many ranks are on each host.

        Args:
            ranks: Ranks in all. Fewer than ``ranks_per_host`` share one host.

        Raises:
            UserError: The ranks do not fill their hosts.

        Example:
            >>> from torchrec_deepfm.sharding.inputs.presets import PRESETS
            >>> PRESETS["h100"].local_world_size(4), PRESETS["h100"].local_world_size(64)
            (4, 8)
        """
        if not 1 <= ranks <= MAX_RANKS:
            raise UserError(
                f"expected 1 to {MAX_RANKS:,}", where=f"{ranks} ranks", remedy="take a number in this range"
            )
        if ranks <= self.ranks_per_host:
            return ranks
        if ranks % self.ranks_per_host:
            below = ranks - ranks % self.ranks_per_host
            raise UserError(
                f"not a multiple of the {self.ranks_per_host} ranks of a host",
                where=f"{ranks} ranks on {self.name}",
                remedy=f"take {below} or {below + self.ranks_per_host}",
            )
        return self.ranks_per_host

    def pod_size_of(self, ranks: int) -> int:
        """Return how many hosts share an NVLink domain.

        Args:
            ranks: Ranks in all. Fewer than a domain holds share one.

        Raises:
            UserError: The ranks do not fill their hosts, or hosts do not fill their domains.

        Example:
            >>> from torchrec_deepfm.sharding.inputs.presets import PRESETS
            >>> [PRESETS["gb200"].pod_size_of(ranks) for ranks in (4, 16, 72, 144)]
            [1, 4, 18, 18]
        """
        hosts = ranks // self.local_world_size(ranks)
        if hosts > self.pod_size and hosts % self.pod_size:
            domain = self.pod_size * self.ranks_per_host
            below = ranks - ranks % domain
            raise UserError(
                f"not a multiple of the {domain} ranks of an NVLink domain",
                where=f"{ranks} ranks on {self.name}",
                remedy=f"take {below} or {below + domain}, or another pod_size",
            )
        return min(hosts, self.pod_size)

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"extra": dict(self.extra)}
