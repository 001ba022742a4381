"""A hardware description as a Python module that users of plain TorchRec import; it needs nothing of this package."""

import inspect
from pathlib import Path
from string import Template
from typing import Final

from torchrec_deepfm.files import write_text
from torchrec_deepfm.sharding.inputs.hardware import EXTRA, Hardware
from torchrec_deepfm.sharding.perf_config import WEIGHT_BYTES, ArrivingIdsConfig

_MODULE: Final = Template('''\
"""$title

TorchRec alone can import this. Under torchrun:

    import $module
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
    from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
    from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator

    ranks = $module.make_topology(world_size=16)
    estimators = [
        EmbeddingPerfEstimatorFactory.create($module.NAME, topology=ranks),
        EmbeddingStorageEstimator(topology=ranks),
    ]
    planner = EmbeddingShardingPlanner(
        topology=ranks, batch_size=8192, enumerator=EmbeddingEnumerator(ranks, 8192, estimator=estimators)
    )

Constraints go to planner, enumerator and estimators alike. Bandwidths are in bytes per millisecond.
$fixed"""

from torchrec.distributed.planner.estimator.annotations import input_dist_comms
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.estimator.types import ShardPerfContext
from torchrec.distributed.planner.types import (
    BasicCommsBandwidths,
    CollectiveType,
    HardwareConfig,
    KernelConfig,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingType

NAME = $name
"""Name of the estimator in ``EmbeddingPerfEstimatorFactory``."""
RANKS_PER_HOST = $ranks_per_host
WEIGHT_BYTES = $weight_bytes  # of an id's weight: float32


class Bandwidths(BasicCommsBandwidths):
    """Bandwidths of collectives: inside a host, and between hosts."""

    def __init__(self) -> None:
        super().__init__(inter_host_bw=$inter, intra_host_bw=$intra)


@EmbeddingPerfEstimatorFactory.register(NAME)
class PerfConfig(EmbeddingPerfEstimatorConfig):
    """TorchRec's model of times for this hardware; a shard is charged the ids of its own rows, and their weights."""

    name = NAME
    hbm_mem_bw = $hbm
    ddr_mem_bw = $ddr
    hbm_to_ddr_mem_bw = $hbm_to_ddr
    intra_host_bw = $intra
    inter_host_bw = $inter

$arriving_ids

def make_topology(world_size: int, local_world_size: int | None = None) -> Topology:
    """Describe ranks of this hardware to TorchRec's planner."""
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world_size, local_world_size=local_world_size or min(world_size, RANKS_PER_HOST)),
        HardwareConfig(
            hbm_cap_bytes=$hbm_bytes,
            ddr_cap_bytes=$ddr_bytes,
            hbm_mem_bw=PerfConfig.hbm_mem_bw,
            ddr_mem_bw=PerfConfig.ddr_mem_bw,
            hbm_to_ddr_mem_bw=PerfConfig.hbm_to_ddr_mem_bw,
            intra_host_bw=PerfConfig.intra_host_bw,
            inter_host_bw=PerfConfig.inter_host_bw,
        ),
        # Without the flag TorchRec takes bandwidths of its own.
        KernelConfig(
            compute_device=$compute_device,
            use_hardware_based_bandwidth=True,
            generalized_comms_bandwidths=Bandwidths(),
        ),
    )
''')


def hardware_module(hardware: Hardware, module: str) -> str:
    """Return the text of a module that is imported as ``module``; the hosts share no NVLink domain."""
    fixed = [f"{key} = {ms:.4g} ms for {EXTRA[key]}" for key, ms in hardware.extra.items() if ms]
    left_out = "\nTorchRec's estimates have no place for these fixed costs, which are left out:\n"
    return _MODULE.substitute(
        title=_plain(f"{hardware.name}: {hardware.source}"),
        module=module,
        fixed=left_out + "".join(f"\n- {_plain(each)}" for each in fixed) + "\n" if fixed else "",
        name=repr(hardware.name),
        ranks_per_host=hardware.ranks_per_host,
        weight_bytes=WEIGHT_BYTES,
        inter=hardware.inter_host_bandwidth / 1000,
        intra=hardware.intra_host_bandwidth / 1000,
        hbm=hardware.hbm_bandwidth / 1000,
        ddr=hardware.ddr_bandwidth / 1000,
        hbm_to_ddr=hardware.hbm_to_ddr_bandwidth / 1000,
        arriving_ids=inspect.getsource(ArrivingIdsConfig.arriving_ids),
        hbm_bytes=hardware.hbm_bytes if hardware.compute_device == "cuda" else None,
        ddr_bytes=hardware.ddr_bytes,
        compute_device=repr(hardware.compute_device),
    )


def write_hardware_module(hardware: Hardware, path: Path) -> None:
    """Write the module; an existing file is replaced."""
    write_text(path, hardware_module(hardware, path.stem), what="module")


def _plain(text: str) -> str:
    """Text that can stand in a docstring."""
    return " ".join(text.split()).replace("\\", "/").replace('"', "'")
