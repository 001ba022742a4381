"""Named hardware as TorchRec's planner sees it."""

from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, Topology, TopologyFactory, TrainerConfig

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
        UserError: The ranks do not fill their hosts.

    Example:
        >>> from torchrec_deepfm.sharding.inputs.presets import PRESETS
        >>> found = topology(PRESETS["h100"], 16)
        >>> found.local_world_size, found.hbm_mem_bw, found.inter_host_bw
        (8, 3350000000.0, 50000000.0)
    """
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=ranks, local_world_size=hardware.local_world_size(ranks)),
        HardwareConfig(
            hbm_cap_bytes=hardware.hbm_bytes if hardware.compute_device == "cuda" else None,
            ddr_cap_bytes=hardware.ddr_bytes,
            hbm_mem_bw=hardware.hbm_bandwidth / 1000,
            ddr_mem_bw=hardware.ddr_bandwidth / 1000,
            hbm_to_ddr_mem_bw=hardware.hbm_to_ddr_bandwidth / 1000,
            intra_host_bw=hardware.intra_host_bandwidth / 1000,
            inter_host_bw=hardware.inter_host_bandwidth / 1000,
        ),
        KernelConfig(compute_device=hardware.compute_device, use_hardware_based_bandwidth=True),
    )
