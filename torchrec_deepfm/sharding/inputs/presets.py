"""Hardware by name, each description with its source. Loads no torch."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from torchrec_deepfm.errors import UserError, one_of, shown
from torchrec_deepfm.sharding.inputs.hardware import Hardware

_GIB: Final = 2**30
_DDR4: Final = 204.8  # GB/s of a host: 8 channels DDR4-3200
_DGX: Final = "one such adapter per GPU; NVLink and PCIe as one direction of the published figure"
_PCIE: Final = "one direction of PCIe between GPUs, the adapter shared out over them, 8 channels DDR4-3200"


def _gpu(
    name: str,
    *,
    hbm: tuple[int, float],
    ddr: tuple[int, float],
    pcie: float,
    adapter: float,
    source: str,
    ranks: int = 8,
    nvlink: float | None = None,
    pod_size: int = 1,
) -> Hardware:
    """A host of GPUs, whose memory and its bandwidth are shared out over them.

    Args:
        name: Of the preset.
        hbm: A GPU's memory in bytes, its bandwidth in GB/s. Data sheets print the capacity in GB, but a device with
            HBM reports about as many GiB: 81,559 MiB of an H100's 80, 143,771 MiB of an H200's 141.
        ddr: The host's memory in GiB, its bandwidth in GB/s.
        pcie: GB/s between a GPU and host memory.
        adapter: GB/s of a GPU to other hosts.
        source: Where the figures come from.
        ranks: GPUs of a host.
        nvlink: GB/s between GPUs. Default: they use ``pcie``.
        pod_size: Hosts of an NVLink domain.
    """
    return Hardware(
        name=name,
        compute_device="cuda",
        ranks_per_host=ranks,
        pod_size=pod_size,
        hbm_bytes=hbm[0],
        ddr_bytes=ddr[0] * _GIB // ranks,
        hbm_bandwidth=hbm[1] * 1e9,
        ddr_bandwidth=ddr[1] * 1e9 / ranks,
        hbm_to_ddr_bandwidth=pcie * 1e9,
        intra_host_bandwidth=(nvlink or pcie) * 1e9,
        inter_host_bandwidth=adapter * 1e9,
        source=source,
    )


PRESETS: Final[Mapping[str, Hardware]] = MappingProxyType(
    {
        each.name: each
        for each in (
            _gpu(
                "a100-40",
                hbm=(40 * _GIB, 1555),
                ddr=(1024, 409.6),
                pcie=32,
                nvlink=300,
                adapter=25,
                source="HBM 40 GB, 1,555 GB/s and NVLink 600 GB/s: NVIDIA A100 Tensor Core GPU data sheet (2021); 1 "
                "TB of host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-6 of 200 Gb/s: NVIDIA "
                "DGX A100 data sheet (2020); " + _DGX,
            ),
            _gpu(
                "a100-80",
                hbm=(80 * _GIB, 2039),
                ddr=(2048, 409.6),
                pcie=32,
                nvlink=300,
                adapter=25,
                source="HBM 80 GB, 2,039 GB/s and NVLink 600 GB/s: NVIDIA A100 Tensor Core GPU data sheet (2021); 2 "
                "TB of host memory, 2 x 8 channels DDR4-3200, PCIe 4.0 x16, 8 ConnectX-7 or -6 of 200 Gb/s: "
                "NVIDIA DGX A100 data sheet (2021); " + _DGX,
            ),
            _gpu(
                "h100",
                hbm=(80 * _GIB, 3350),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 80 GB, 3.35 TB/s and NVLink 900 GB/s: NVIDIA H100 Tensor Core GPU data sheet, SXM "
                "(2023); 2 TB of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 "
                "Gb/s: NVIDIA DGX H100 data sheet (2023); " + _DGX,
            ),
            _gpu(
                "h200",
                hbm=(141 * _GIB, 4800),
                ddr=(2048, 614.4),
                pcie=64,
                nvlink=450,
                adapter=50,
                source="HBM 141 GB, 4.8 TB/s and NVLink 900 GB/s: NVIDIA H200 Tensor Core GPU data sheet, SXM "
                "(2024); 2 TB of host memory, 2 x 8 channels DDR5-4800, PCIe 5.0 x16, 8 ConnectX-7 of 400 "
                "Gb/s: NVIDIA DGX H200 data sheet (2024); " + _DGX,
            ),
            _gpu(
                "b200",
                hbm=(180 * _GIB, 8000),
                ddr=(2048, 716.8),
                pcie=64,
                nvlink=900,
                adapter=50,
                source="HBM 1,440 GB and 64 TB/s, NVLink 14.4 TB/s over 8 GPUs, 8 ConnectX-7 of 400 Gb/s: NVIDIA DGX"
                " B200 data sheet (2024); 2 TB of host memory: NVIDIA DGX B200 user guide (2025), 2 x 8 "
                "channels DDR5-5600 by its Intel Xeon 8570; " + _DGX,
            ),
            _gpu(
                "gb200",
                ranks=4,
                pod_size=18,
                hbm=(186 * _GIB, 8000),
                ddr=(960, 14000 / 18),
                pcie=225,
                nvlink=900,
                adapter=50,
                source="72 GPUs with 13.4 TB of HBM at 576 TB/s and NVLink of 130 TB/s, 36 Grace CPUs with 17 TB of "
                "LPDDR5X at 14 TB/s, NVLink-C2C of 900 GB/s for each: NVIDIA GB200 NVL72 data sheet (2025); 18 trays "
                "of 4 GPUs, 2 CPUs and 4 ConnectX-7 of 400 Gb/s: NVIDIA DGX GB200 user guide (2025); NVLink and C2C as "
                "one direction of the published figure",
            ),
            _gpu(
                "gh200",
                ranks=1,
                hbm=(96 * _GIB, 4000),
                ddr=(480, 512),
                pcie=450,
                nvlink=450,
                adapter=50,
                source="96 GB of HBM3 at 4 TB/s, 480 GB of LPDDR5X at up to 512 GB/s, NVLink-C2C and NVLink 4 of 900 "
                "GB/s each, of which one direction counts: NVIDIA GH200 Grace Hopper Superchip data sheet (2023); one "
                "GPU per host with an adapter of 400 Gb/s and no NVLink between hosts: for NVL32 give pod_size = 32",
            ),
            _gpu(
                "l4",
                ranks=8,
                hbm=(24 * 10**9, 300),
                ddr=(384, _DDR4),
                pcie=32,
                adapter=1.56,
                source="24 GB at 300 GB/s, PCIe 4.0 x16: NVIDIA L4 Tensor Core GPU data sheet (2023); hosts of 8 with "
                "384 GB and 100 Gb/s: Google Cloud, machine type g2-standard-96 (2024); " + _PCIE,
            ),
            _gpu(
                "a10g",
                ranks=8,
                hbm=(24 * 10**9, 600),
                ddr=(768, _DDR4),
                pcie=32,
                adapter=1.56,
                source="24 GB at 600 GB/s, PCIe 4.0 x16: NVIDIA A10 Tensor Core GPU data sheet (2021), whose memory "
                "the A10G shares; hosts of 8 with 768 GiB and 100 Gb/s: Amazon EC2, instance type g5.48xlarge (2021); "
                + _PCIE,
            ),
            _gpu(
                "t4",
                ranks=4,
                hbm=(16 * 10**9, 320),
                ddr=(192, _DDR4),
                pcie=16,
                adapter=1.56,
                source="16 GB at 320 GB/s, PCIe 3.0 x16: NVIDIA T4 Tensor Core GPU product brief (2019); hosts of 4 "
                "with 192 GiB and 50 Gb/s: Amazon EC2, instance type g4dn.12xlarge (2019). FBGEMM's wheels hold no "
                "kernels for it (compute capability 7.5); " + _PCIE,
            ),
            _gpu(
                "rtx4090",
                ranks=2,
                hbm=(24 * 10**9, 1008),
                ddr=(128, _DDR4),
                pcie=32,
                adapter=0.63,
                source="24 GB at 1,008 GB/s, PCIe 4.0 x16, no NVLink: NVIDIA Ada GPU architecture white paper (2022); "
                "a workstation of 2 with 128 GB of host memory and 10 Gb/s is assumed; " + _PCIE,
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


def hardware_preset(name: object) -> Hardware:
    """Return a preset by its name, in small or capital letters."""
    if isinstance(name, str) and name.lower() in PRESETS:
        return PRESETS[name.lower()]
    raise UserError(
        "no such preset", where=f"hardware {shown(name)}", remedy=f"choose {one_of(PRESETS, name)}, or name a TOML file"
    )


def from_properties(name: str, memory: int, bandwidth: float) -> Hardware:
    """Describe a GPU without a preset by what its driver reports: its bytes, and bytes per second from them.

    The links are those of the preset l4, the slowest of today's.

    Example:
        >>> from_properties("NVIDIA L40S", 48 * 10**9, 864e9).hbm_bandwidth / 1e9
        864.0
    """
    source = f"memory as the driver reports it; links and host of the preset l4 ({PRESETS['l4'].source})"
    return replace(PRESETS["l4"], name=name, hbm_bytes=memory, hbm_bandwidth=bandwidth, source=source)
