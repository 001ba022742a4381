"""Hardware by name, each description with its source. Loads no torch."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from torchrec_deepfm.errors import UserError, one_of, shown
from torchrec_deepfm.sharding.inputs.hardware import Hardware

_GIB: Final = 2**30
_DDR4_HOST: Final = 204.8e9  # bytes per second
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

    Data sheets print the capacity of a GPU in GB, but a device reports about as many GiB: 81,559 MiB of an
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


def _pcie(
    name: str,
    *,
    ranks: int,
    gb: int,
    bandwidth: float,
    ddr: int,
    pcie: float,
    adapter: float,
    source: str,
) -> Hardware:
    """A host of ``ranks`` GPUs without NVLink.

    ``gb``: a GPU's memory in GB. ``ddr``: the host's, in GiB. Bandwidths in GB/s.
    """
    return Hardware(
        name=name,
        compute_device="cuda",
        ranks_per_host=ranks,
        hbm_bytes=gb * 10**9,  # of GDDR with ECC a device reports no more
        ddr_bytes=ddr * _GIB // ranks,
        hbm_bandwidth=bandwidth * 1e9,
        ddr_bandwidth=_DDR4_HOST / ranks,
        hbm_to_ddr_bandwidth=pcie * 1e9,
        intra_host_bandwidth=pcie * 1e9,
        inter_host_bandwidth=adapter * 1e9,
        source=f"{source}; one direction of PCIe between GPUs, the adapter shared out over them, 8 channels DDR4-3200",
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
                "TB of host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-6 of 200 Gb/s: NVIDIA "
                "DGX A100 data sheet (2020)",
            ),
            _dgx(
                "a100-80",
                hbm=(80, 2039),
                ddr=(2048, 409.6),
                pcie=32,
                nvlink=300,
                adapter=25,
                source="HBM 80 GB, 2,039 GB/s and NVLink 600 GB/s: NVIDIA A100 Tensor Core GPU data sheet (2021); 2 "
                "TB of host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-7 or -6 of 200 Gb/s: "
                "NVIDIA DGX A100 data sheet (2021)",
            ),
            _dgx(
                "h100",
                hbm=(80, 3350),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 80 GB, 3.35 TB/s and NVLink 900 GB/s: NVIDIA H100 Tensor Core GPU data sheet, SXM "
                "(2023); 2 TB of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 "
                "Gb/s: NVIDIA DGX H100 data sheet (2023)",
            ),
            _dgx(
                "h200",
                hbm=(141, 4800),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 141 GB, 4.8 TB/s and NVLink 900 GB/s: NVIDIA H200 Tensor Core GPU data sheet, SXM "
                "(2024); 2 TB of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 "
                "Gb/s: NVIDIA DGX H200 data sheet (2024)",
            ),
            _dgx(
                "b200",
                hbm=(180, 8000),
                ddr=(2048, 716.8),
                pcie=64,
                nvlink=900,
                adapter=50,
                source="HBM 1,440 GB and 64 TB/s, NVLink 14.4 TB/s over 8 GPUs, 8 ConnectX-7 of 400 Gb/s: NVIDIA DGX"
                " B200 data sheet (2024); 2 TB of host memory: NVIDIA DGX B200 user guide (2025), 2 x 8 "
                "channels DDR5-5600 by its Intel Xeon 8570",
            ),
            Hardware(
                name="gb200",
                compute_device="cuda",
                ranks_per_host=4,
                pod_size=18,
                hbm_bytes=186 * _GIB,
                ddr_bytes=240 * _GIB,
                hbm_bandwidth=8000e9,
                ddr_bandwidth=14e12 / 72,
                hbm_to_ddr_bandwidth=225e9,
                intra_host_bandwidth=900e9,
                inter_host_bandwidth=50e9,
                source="72 GPUs with 13.4 TB of HBM at 576 TB/s and NVLink of 130 TB/s, 36 Grace CPUs with 17 TB of "
                "LPDDR5X at 14 TB/s, NVLink-C2C of 900 GB/s for each: NVIDIA GB200 NVL72 data sheet (2025); 18 trays "
                "of 4 GPUs, 2 CPUs and 4 ConnectX-7 of 400 Gb/s: NVIDIA DGX GB200 user guide (2025); NVLink and C2C as "
                "one direction of the published figure",
            ),
            Hardware(
                name="gh200",
                compute_device="cuda",
                ranks_per_host=1,
                hbm_bytes=96 * _GIB,
                ddr_bytes=480 * _GIB,
                hbm_bandwidth=4000e9,
                ddr_bandwidth=512e9,
                hbm_to_ddr_bandwidth=450e9,
                intra_host_bandwidth=450e9,
                inter_host_bandwidth=50e9,
                source="96 GB of HBM3 at 4 TB/s, 480 GB of LPDDR5X at up to 512 GB/s, NVLink-C2C and NVLink 4 of 900 "
                "GB/s each, of which one direction counts: NVIDIA GH200 Grace Hopper Superchip data sheet (2023); one "
                "GPU per host with an adapter of 400 Gb/s and no NVLink between hosts: for NVL32 give pod_size = 32",
            ),
            _pcie(
                "l4",
                ranks=8,
                gb=24,
                bandwidth=300,
                ddr=384,
                pcie=32,
                adapter=1.56,
                source="24 GB at 300 GB/s, PCIe 4.0 x16: NVIDIA L4 Tensor Core GPU data sheet (2023); hosts of 8 with "
                "384 GB and 100 Gb/s: Google Cloud, machine type g2-standard-96 (2024)",
            ),
            _pcie(
                "a10g",
                ranks=8,
                gb=24,
                bandwidth=600,
                ddr=768,
                pcie=32,
                adapter=1.56,
                source="24 GB at 600 GB/s, PCIe 4.0 x16: NVIDIA A10 Tensor Core GPU data sheet (2021), whose memory "
                "the A10G shares; hosts of 8 with 768 GiB and 100 Gb/s: Amazon EC2, instance type g5.48xlarge (2021)",
            ),
            _pcie(
                "t4",
                ranks=4,
                gb=16,
                bandwidth=320,
                ddr=192,
                pcie=16,
                adapter=1.56,
                source="16 GB at 320 GB/s, PCIe 3.0 x16: NVIDIA T4 Tensor Core GPU product brief (2019); hosts of 4 "
                "with 192 GiB and 50 Gb/s: Amazon EC2, instance type g4dn.12xlarge (2019). FBGEMM's wheels hold no "
                "kernels for it (compute capability 7.5)",
            ),
            _pcie(
                "rtx4090",
                ranks=2,
                gb=24,
                bandwidth=1008,
                ddr=128,
                pcie=32,
                adapter=0.63,
                source="24 GB at 1,008 GB/s, PCIe 4.0 x16, no NVLink: NVIDIA Ada GPU architecture white paper (2022); "
                "a workstation of 2 with 128 GB of host memory and 10 Gb/s is assumed",
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
                "HBM: what its planner assumes where no bandwidths are given",
            ),
        )
    }
)
"""Descriptions by name. Bandwidths are the vendors' peaks: real ones are lower, and ``calibrate`` finds them."""


def preset(name: object) -> Hardware:
    """Return a preset by its name, in small or capital letters."""
    if isinstance(name, str) and name.lower() in PRESETS:
        return PRESETS[name.lower()]
    raise UserError(f"hardware {shown(name)}: no such preset; choose {one_of(PRESETS, name)}, or name a TOML file")


def from_properties(name: str, memory: int, bandwidth: float) -> Hardware:
    """Describe a GPU without a preset by what its driver reports.

    Args:
        name: its name.
        memory: bytes of its memory.
        bandwidth: bytes per second from its memory.

    Returns:
        The description, with the links of the preset l4, the slowest of today's.

    Example:
        >>> from_properties("NVIDIA L40S", 48 * 10**9, 864e9).hbm_bandwidth / 1e9
        864.0
    """
    source = f"memory as the driver reports it; links and host of the preset l4 ({PRESETS['l4'].source})"
    return replace(PRESETS["l4"], name=name, hbm_bytes=memory, hbm_bandwidth=bandwidth, source=source)
