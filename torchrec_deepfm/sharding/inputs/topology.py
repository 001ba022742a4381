"""Named hardware as TorchRec's planner sees it."""

from torchrec.distributed.planner.types import (
    CollectiveType,
    GeneralizedCommsBandwidth,
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)

from torchrec_deepfm.sharding.inputs.hardware import Hardware


def topology(hardware: Hardware, ranks: int) -> Topology:
    """Describe ranks of some hardware to TorchRec's planner, bandwidths included.

    ``TopologyFactory`` takes the bandwidths of a ``HardwareConfig`` only where a ``KernelConfig`` says so
    (``use_hardware_based_bandwidth``); without that flag it silently plans for its own defaults.

    Args:
        hardware: What a rank holds, and how fast bytes move.
        ranks: How many there are.

    Returns:
        The topology. TorchRec counts bandwidths in bytes per millisecond.

    Raises:
        UserError: The ranks do not fill their hosts, or these their NVLink domains.

    Example:
        >>> from torchrec_deepfm.sharding.inputs.presets import PRESETS
        >>> found = topology(PRESETS["h100"], 16)
        >>> found.local_world_size, found.hbm_mem_bw, found.inter_host_bw
        (8, 3350000000.0, 50000000.0)
    """
    local, pod_size = hardware.local_world_size(ranks), hardware.pod_size_of(ranks)
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=ranks, local_world_size=local, pod_size=pod_size if pod_size > 1 else None),
        HardwareConfig(
            hbm_cap_bytes=hardware.hbm_bytes if hardware.compute_device == "cuda" else None,
            ddr_cap_bytes=hardware.ddr_bytes,
            hbm_mem_bw=hardware.hbm_bandwidth / 1000,
            ddr_mem_bw=hardware.ddr_bandwidth / 1000,
            hbm_to_ddr_mem_bw=hardware.hbm_to_ddr_bandwidth / 1000,
            intra_host_bw=hardware.intra_host_bandwidth / 1000,
            inter_host_bw=hardware.inter_host_bandwidth / 1000,
        ),
        KernelConfig(
            compute_device=hardware.compute_device,
            use_hardware_based_bandwidth=True,
            generalized_comms_bandwidths=NvlinkDomains(hardware, ranks) if pod_size > 1 else None,
        ),
    )


class NvlinkDomains(GeneralizedCommsBandwidth):
    """Bandwidths of hosts that share NVLink domains, in bytes per millisecond.

    TorchRec's ``BasicCommsBandwidths`` gives every collective over several hosts the bandwidth of the network.
    """

    def __init__(self, hardware: Hardware, ranks: int) -> None:
        self._intra, self._inter = hardware.intra_host_bandwidth / 1000, hardware.inter_host_bandwidth / 1000
        self._ranks, self._local = ranks, hardware.local_world_size(ranks)
        self._domain = self._local * hardware.pod_size_of(ranks)

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:
        """Return the bandwidth of a collective over ``world_size`` ranks, ``local_world_size`` of each host.

        TorchRec asks for one rank of each host, or domain, where it counts what crosses them.
        """
        one_domain = self._ranks <= self._domain
        if collective_type == CollectiveType.ALL_REDUCE:
            if not one_domain:
                return self._inter * local_world_size  # as TorchRec: an adapter for each GPU
            # A ring sends the table twice at NVLink's bandwidth. TorchRec multiplies its bytes by the hosts.
            hosts = world_size / local_world_size
            factor = (2 * min(hosts, 2) - 1) / min(hosts, 2) * (2 if hosts > 2 else 1)
            return self._intra * factor / 2
        crosses = local_world_size < self._local
        inside = world_size == self._domain if self._local == 1 else not crosses and world_size <= self._domain
        return self._intra if one_domain or inside else self._inter

    @property
    def intra_host_bw(self) -> float:
        """Bandwidth of NVLink."""
        return self._intra

    @property
    def inter_host_bw(self) -> float:
        """Bandwidth of the network."""
        return self._inter
