"""Hardware by name: what a rank holds and how fast bytes move. Standard library only.

A description of your own is a TOML file; whatever it leaves out comes from its ``base``:

    name = "our cluster"
    base = "h100"                        # a preset, or leave it out and give every key
    hbm_bytes = "80 GiB"                 # a number of bytes, or a text with a unit
    inter_host_bandwidth = "25 GB/s"     # bytes per second, or a text with a unit

    [extra]                              # what bandwidths do not say, in milliseconds (see EXTRA)
    shard_ms = 0.01
"""

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from torchrec_deepfm.errors import UserError

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
MAX_BATCH_SIZE: Final = 2**31 - 1
"""Samples a rank; TorchRec's lengths and offsets count no further."""

_CAPACITIES: Final = ("hbm_bytes", "ddr_bytes")
_BANDWIDTHS: Final = (
    "hbm_bandwidth",
    "ddr_bandwidth",
    "hbm_to_ddr_bandwidth",
    "intra_host_bandwidth",
    "inter_host_bandwidth",
)
_MAX_TOML_BYTES: Final = 1 << 20
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*(?:([kKMGTP])(i?))?(?:B(/s)?)?\s*")


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
                raise UserError(f"{key}: {value!r} is no text; give a non-empty one that can be printed")
        if self.compute_device not in get_args(ComputeDevice):
            raise UserError(f"compute_device: {self.compute_device!r} is not known; choose cuda or cpu")
        _check_count("ranks_per_host", self.ranks_per_host, "ranks", MAX_RANKS)
        if self.compute_device == "cuda" or self.hbm_bytes is not None:
            _check_count("hbm_bytes", self.hbm_bytes, "bytes")
        _check_count("ddr_bytes", self.ddr_bytes, "bytes")
        for key in _BANDWIDTHS:
            _check_positive(key, getattr(self, key))
        if not isinstance(self.extra, Mapping):
            raise UserError(f"extra: {self.extra!r} is no table; write [extra] and milliseconds below it")
        for key, cost in self.extra.items():
            if key not in EXTRA:
                raise UserError(f"extra.{key}: there is no such cost; choose from {_choices(key, EXTRA)}")
            if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
                raise UserError(f"extra.{key}: {cost!r} is no time; give milliseconds of at least 0")
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
            >>> Hardware.from_json(PRESETS["cpu"].to_json()) == PRESETS["cpu"]
            True
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, value: object) -> "Hardware":
        """Build a description from what ``to_json`` returned, or from a TOML file's keys.

        Args:
            value: The keys of the class. ``base`` may name a preset that gives those which are left out; capacities
                and bandwidths may be texts such as ``"80 GiB"`` and ``"25 GB/s"``.

        Returns:
            The description.

        Raises:
            UserError: A key is missing, unknown or of the wrong kind, or the base is no preset.
        """
        if not isinstance(value, Mapping):
            raise UserError("this is no table of keys; give name, compute_device and the others")
        known = tuple(each.name for each in fields(cls))
        for key in value:
            if key not in (*known, "base"):
                raise UserError(f"{key}: there is no such key; choose from {_choices(key, (*known, 'base'))}")
        given = {key: each for key, each in value.items() if key != "base"}
        if "base" in value:
            base = preset(value["base"])
            if "source" not in given:
                given["source"] = f"{base.name} ({base.source}), and the user's own figures"
            given = {**base.to_json(), **given}
        given.setdefault("extra", {})
        given.setdefault("source", "the user's own figures")
        if given.get("compute_device") == "cpu":  # neither is ever used there
            given.setdefault("hbm_bytes", None)
            given.setdefault("hbm_bandwidth", given.get("ddr_bandwidth"))
            given.setdefault("hbm_to_ddr_bandwidth", given.get("ddr_bandwidth"))
        missing = [key for key in known if key not in given]
        if missing:
            raise UserError(f'{", ".join(missing)}: missing; add what is missing, or name a preset: base = "h100"')
        for key in _CAPACITIES:
            if isinstance(given[key], str):
                given[key] = round(_quantity(key, given[key], "80 GiB"))
        for key in _BANDWIDTHS:
            if isinstance(given[key], str):
                given[key] = _quantity(key, given[key], "450 GB/s")
        return cls(**given)


def read_hardware(name_or_toml: str) -> Hardware:
    """Find a preset, or read a description from a TOML file.

    Args:
        name_or_toml: The name of a preset, or a file's path (``.toml``).

    Returns:
        The description.

    Raises:
        UserError: There is no such preset or file, or the file is no description.

    Example:
        >>> read_hardware("h200").hbm_bytes // 2**30
        141
    """
    if not isinstance(name_or_toml, str) or not name_or_toml:
        raise UserError(f"hardware {name_or_toml!r}: name a preset, or a TOML file; choose from {', '.join(PRESETS)}")
    if name_or_toml.lower() in PRESETS:
        return PRESETS[name_or_toml.lower()]
    path = Path(name_or_toml)
    if path.suffix != ".toml" and os.sep not in name_or_toml and not path.is_file():
        return preset(name_or_toml)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TOML_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; write it, or choose a preset: {', '.join(PRESETS)}") from error
    except OSError as error:
        raise UserError(f"{path}: this can't be read ({error.strerror}); name a TOML file") from error
    if len(content) > _MAX_TOML_BYTES:
        raise UserError(f"{path}: larger than {_MAX_TOML_BYTES} bytes, so it describes no hardware; name a TOML file")
    try:
        value = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: this is no TOML: {error}; correct it") from error
    if not value:
        raise UserError(f"{path}: empty; give name, base and what differs, or all keys")
    try:
        return Hardware.from_json({"name": path.stem, **value})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def preset(name: object) -> Hardware:
    """Return a preset by its name.

    Args:
        name: A key of ``PRESETS``.

    Returns:
        The preset.

    Raises:
        UserError: There is none of this name.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise UserError(f"hardware {name!r}: there is no such preset; choose from {_choices(name, PRESETS)}")


def write_hardware(hardware: Hardware, path: Path) -> None:
    """Write a description as a TOML file that ``read_hardware`` reads back equal.

    Args:
        hardware: The description.
        path: The file; one that is there is replaced.

    Raises:
        UserError: The file can't be written.
    """
    lines = [
        f"{each.name} = {_toml(getattr(hardware, each.name))}"
        for each in fields(hardware)
        if each.name != "extra" and getattr(hardware, each.name) is not None
    ]
    if hardware.extra:
        lines += ["", "[extra]", *(f"{key} = {_toml(cost)}" for key, cost in hardware.extra.items())]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: the description can't be written ({error.strerror}); name another file") from error


def _toml(value: str | float) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_count(key: str, value: object, unit: str, most: int = 2**60) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}: {value!r} is no number of {unit}; give a whole number greater than 0")
    if value > most:
        raise UserError(f"{key}: {value} is too large a number of {unit}; give at most {most:,}")


def _check_positive(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{key}: {value!r} is no bandwidth; give bytes per second, greater than 0 and finite")


def _quantity(key: str, text: str, like: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[4] is not None) != like.endswith("/s"):
        raise UserError(f"{key}: {text!r} is no amount; write it as {like!r}")
    prefix = match[2]
    power = "KMGTP".index(prefix.upper()) + 1 if prefix else 0
    amount = float(match[1]) * float(1024 if match[3] else 1000) ** power
    if amount == math.inf:
        raise UserError(f"{key}: {text!r} is more than there is; write it as {like!r}")
    return amount


def _choices(wrong: object, known: Iterable[str]) -> str:
    listed = list(known)
    close = difflib.get_close_matches(wrong.lower(), listed, n=1) if isinstance(wrong, str) else []
    return ", ".join(listed) + (f" (did you mean {close[0]!r}?)" if close else "")


_GIB: Final = 2**30
_DGX: Final = "one such adapter per GPU; NVLink and PCIe as one direction of the published figure"


def _dgx(
    name: str,
    *,
    hbm: tuple[int, float],
    ddr: tuple[int, float],
    pcie: float,
    nvlink: float,
    adapter: float,
    source: str,
) -> Hardware:
    """A node of 8 GPUs: capacities in GiB, bandwidths in GB/s, host memory shared out over the GPUs.

    Data sheets print the capacity of a GPU in GB, but a device tells its driver about as many GiB: 81,559 MiB of an
    H100's 80, 143,771 MiB of an H200's 141.
    """
    return Hardware(
        name=name,
        compute_device="cuda",
        ranks_per_host=8,
        hbm_bytes=hbm[0] * _GIB,
        ddr_bytes=ddr[0] * _GIB // 8,
        hbm_bandwidth=hbm[1] * 1e9,
        ddr_bandwidth=ddr[1] * 1e9 / 8,
        hbm_to_ddr_bandwidth=pcie * 1e9,
        intra_host_bandwidth=nvlink * 1e9,
        inter_host_bandwidth=adapter * 1e9,
        source=f"{source}; {_DGX}",
    )


PRESETS: Final[Mapping[str, Hardware]] = MappingProxyType(
    {
        each.name: each
        for each in (
            _dgx(
                "a100-40",
                hbm=(40, 1555),
                ddr=(1024, 409.6),
                pcie=32,
                nvlink=300,
                adapter=25,
                source="HBM 40 GB, 1,555 GB/s and NVLink 600 GB/s: NVIDIA A100 Tensor Core GPU data sheet (2021); 1 "
                "TB of "
                "host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-6 of 200 Gb/s: NVIDIA DGX A100 data "
                "sheet (2020)",
            ),
            _dgx(
                "a100-80",
                hbm=(80, 2039),
                ddr=(2048, 409.6),
                pcie=32,
                nvlink=300,
                adapter=25,
                source="HBM 80 GB, 2,039 GB/s and NVLink 600 GB/s: NVIDIA A100 Tensor Core GPU data sheet (2021); 2 "
                "TB of "
                "host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-7 or -6 of 200 Gb/s: NVIDIA DGX A100 "
                "data sheet (2021)",
            ),
            _dgx(
                "h100",
                hbm=(80, 3350),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 80 GB, 3.35 TB/s and NVLink 900 GB/s: NVIDIA H100 Tensor Core GPU data sheet, SXM "
                "(2023); 2 TB "
                "of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 Gb/s: NVIDIA DGX H100 "
                "data "
                "sheet (2023)",
            ),
            _dgx(
                "h200",
                hbm=(141, 4800),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 141 GB, 4.8 TB/s and NVLink 900 GB/s: NVIDIA H200 Tensor Core GPU data sheet, SXM "
                "(2024); 2 TB "
                "of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 Gb/s: NVIDIA DGX H200 "
                "data "
                "sheet (2024)",
            ),
            _dgx(
                "b200",
                hbm=(180, 8000),
                ddr=(2048, 716.8),
                pcie=64,
                nvlink=900,
                adapter=50,
                source="HBM 1,440 GB and 64 TB/s, NVLink 14.4 TB/s over 8 GPUs, 8 ConnectX-7 of 400 Gb/s: NVIDIA "
                "DGX B200 "
                "data sheet (2024); 2 TB of host memory: NVIDIA DGX B200 user guide (2025), 2 x 8 channels "
                "DDR5-5600 by "
                "its Intel Xeon 8570",
            ),
            Hardware(
                name="cpu",
                compute_device="cpu",
                ranks_per_host=8,
                hbm_bytes=None,
                ddr_bytes=16 * _GIB,
                hbm_bandwidth=10e9,
                ddr_bandwidth=10e9,
                hbm_to_ddr_bandwidth=10e9,
                intra_host_bandwidth=1e9,
                inter_host_bandwidth=1e9,
                source="round figures for CPU ranks that talk over gloo; calibrate fits them to a machine",
            ),
            Hardware(
                name="torchrec",
                compute_device="cuda",
                ranks_per_host=8,
                hbm_bytes=80 * _GIB,
                ddr_bytes=128 * _GIB,
                hbm_bandwidth=897.0 * _GIB,
                ddr_bandwidth=51.0 * _GIB,
                hbm_to_ddr_bandwidth=32.0 * _GIB,
                intra_host_bandwidth=600.0 * _GIB,
                inter_host_bandwidth=12.5 * _GIB,
                source="TorchRec's own defaults (torchrec/distributed/planner/constants.py, 1.8.0), with 80 GiB of "
                "HBM: "
                "what its planner takes where nobody tells it of bandwidths",
            ),
        )
    }
)
"""Descriptions by name. Bandwidths are the vendors' peaks: real ones are lower, and ``calibrate`` finds them."""
