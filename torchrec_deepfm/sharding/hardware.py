"""A kind of hardware: what a rank holds and how fast bytes move. Standard library only."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from torchrec_deepfm.errors import UserError, shown

ComputeDevice = Literal["cuda", "cpu"]

EXTRA: Final[Mapping[str, str]] = MappingProxyType(
    {
        "step_ms": "a step without any table: the dense part, and what no plan changes",
        "shard_ms": "each shard on a rank: kernels to launch, buffers to split",
        "group_ms": "each sharding type in the plan: it has collectives of its own",
    }
)
"""Fixed costs that ``calibrate`` fits and TorchRec's estimators leave out; each in milliseconds a step."""

RESERVED: Final = 0.15
"""Share of a GPU's memory that is kept for the dense part, activations and what the estimates miss."""

MAX_RANKS: Final = 2**16
"""More ranks than any cluster has: a number beyond is a slip, which would keep a planner busy for days."""
_MAX_BANDWIDTH: Final = 1e30  # what calibrate calls endless
_MAX_EXTRA_MS: Final = 1e9
MAX_BATCH_SIZE: Final = 2**31 - 1
"""Samples a rank; TorchRec's lengths and offsets count no further."""

CAPACITIES: Final = ("hbm_bytes", "ddr_bytes")
BANDWIDTHS: Final = (
    "hbm_bandwidth",
    "ddr_bandwidth",
    "hbm_to_ddr_bandwidth",
    "intra_host_bandwidth",
    "inter_host_bandwidth",
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of machine, as a planner sees it.

    Args:
        name: How it is called.
        compute_device: ``cuda`` or ``cpu``: where the tables are looked up.
        ranks_per_host: Ranks (GPUs, or CPU processes) on a host.
        hbm_bytes: Memory of a GPU in bytes; ``None`` for CPU ranks.
        ddr_bytes: Host memory per rank, in bytes.
        hbm_bandwidth: Bytes per second from a GPU's memory. For CPU ranks it is not used.
        ddr_bandwidth: Bytes per second from host memory, per rank.
        hbm_to_ddr_bandwidth: Bytes per second between a GPU and host memory.
        intra_host_bandwidth: Bytes per second that a rank sends to the others of its host, one direction.
        inter_host_bandwidth: Bytes per second that a rank sends to other hosts, one direction.
        source: Where the figures come from.
        extra: Fixed costs in milliseconds, of those that ``EXTRA`` names.

    Raises:
        UserError: A figure is missing, of the wrong kind, zero or negative.

    Example:
        >>> from torchrec_deepfm.sharding.presets import PRESETS
        >>> PRESETS["h100"].inter_host_bandwidth / 1e9  # one 400 Gb/s adapter per GPU
        50.0
    """

    name: str
    compute_device: ComputeDevice
    ranks_per_host: int
    hbm_bytes: int | None
    ddr_bytes: int
    hbm_bandwidth: float
    ddr_bandwidth: float
    hbm_to_ddr_bandwidth: float
    intra_host_bandwidth: float
    inter_host_bandwidth: float
    source: str
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check every figure; messages begin with its key."""
        for key in ("name", "source"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value or not " ".join(value.split()).isprintable():
                raise UserError(f"{key}: {shown(value)} is no text; give a non-empty one that can be printed")
        if self.compute_device not in get_args(ComputeDevice):
            raise UserError(f"compute_device: {shown(self.compute_device)} is not known; choose cuda or cpu")
        _check_count("ranks_per_host", self.ranks_per_host, "ranks", MAX_RANKS)
        if self.compute_device == "cuda" or self.hbm_bytes is not None:
            _check_count("hbm_bytes", self.hbm_bytes, "bytes")
        _check_count("ddr_bytes", self.ddr_bytes, "bytes")
        for key in BANDWIDTHS:
            _check_positive(key, getattr(self, key))
        if not isinstance(self.extra, Mapping):
            raise UserError(f"extra: {shown(self.extra)} is no table; write [extra] and milliseconds below it")
        for key, cost in self.extra.items():
            if key not in EXTRA:
                raise UserError(f"extra.{key}: there is no such cost; choose from {choices(key, EXTRA)}")
            if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= _MAX_EXTRA_MS:
                raise UserError(
                    f"extra.{key}: {shown(cost)} is no time; give milliseconds of at least 0, at most {_MAX_EXTRA_MS:g}"
                )
        object.__setattr__(self, "extra", MappingProxyType({key: float(cost) for key, cost in self.extra.items()}))

    @property
    def rank_bytes(self) -> int:
        """Memory of a rank in which its tables lie, in bytes: a GPU's own, or its share of the host's."""
        return self.ddr_bytes if self.hbm_bytes is None or self.compute_device == "cpu" else self.hbm_bytes

    def local_world_size(self, ranks: int) -> int:
        """Return how many ranks are on each host.

        Args:
            ranks: Ranks in all. Fewer than ``ranks_per_host`` share one host.

        Returns:
            Ranks on each host.

        Raises:
            UserError: The ranks do not fill their hosts.

        Example:
            >>> from torchrec_deepfm.sharding.presets import PRESETS
            >>> PRESETS["h100"].local_world_size(4), PRESETS["h100"].local_world_size(64)
            (4, 8)
        """
        _check_count("ranks", ranks, "ranks", MAX_RANKS)
        if ranks <= self.ranks_per_host:
            return ranks
        if ranks % self.ranks_per_host:
            below = ranks - ranks % self.ranks_per_host
            raise UserError(
                f"{ranks} ranks on {self.name}: {self.ranks_per_host} ranks share a host, and {ranks} is no multiple "
                f"of that; take {below} or {below + self.ranks_per_host}"
            )
        return self.ranks_per_host

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values.

        Returns:
            A dictionary that ``from_json`` reads back.

        Example:
            >>> from torchrec_deepfm.sharding.presets import PRESETS
            >>> Hardware.from_json(PRESETS["cpu"].to_json()) == PRESETS["cpu"]
            True
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, value: object) -> "Hardware":
        """Build a description from what ``to_json`` returned.

        Args:
            value: The keys of the class.

        Returns:
            The description.

        Raises:
            UserError: A key is missing, unknown or of the wrong kind.
        """
        if not isinstance(value, Mapping):
            raise UserError("this is no table of keys; give name, compute_device and the others")
        known = tuple(each.name for each in fields(cls))
        for key in value:
            if key not in known:
                raise UserError(f"{key}: there is no such key; choose from {choices(key, known)}")
        missing = [key for key in known if key not in value]
        if missing:
            raise UserError(f"{', '.join(missing)}: missing; add what is missing")
        return cls(**value)


def _check_count(key: str, value: object, unit: str, most: int = 2**60) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: {shown(value)} is no number of {unit}; give a whole number greater than 0")
    if value > most:
        raise UserError(f"{key}: {shown(value)} is too large a number of {unit}; give at most {most:,}")


def _check_positive(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _MAX_BANDWIDTH:
        raise UserError(
            f"{key}: {shown(value)} is no bandwidth; give bytes per second, at least 1 and at most {_MAX_BANDWIDTH:g}"
        )


def choices(wrong: object, known: Iterable[str]) -> str:
    """List what is known, with a guess at what was meant by something that is not.

    Args:
        wrong: what was given.
        known: what may be given.

    Returns:
        The list, for a message.
    """
    listed = list(known)
    close = difflib.get_close_matches(wrong.lower(), listed, n=1) if isinstance(wrong, str) else []
    return ", ".join(listed) + (f" (did you mean {close[0]!r}?)" if close else "")
