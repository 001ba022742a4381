"""What the ranks at hand run on, as a description of hardware."""

import itertools
import os
import re
from dataclasses import replace

import torch

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.launch.processes import local_world_size, pod_size
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware
from torchrec_deepfm.sharding.inputs.presets import PRESETS, from_properties


def host_bytes() -> int:
    """Return the memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def describe_hardware(named: str | None, device: torch.device) -> Hardware:
    """Describe the ranks at hand, with their ranks per host: as a preset or a TOML file says.

    Without one: the preset of the GPU, or what its driver reports; ``cpu`` with the memory of this host. UserError: the
    description does not exist, or it describes another device.
    """
    local = local_world_size()
    if named is not None:
        hardware = read_hardware(named)
    elif device.type == "cpu":
        hardware = replace(PRESETS["cpu"], ddr_bytes=host_bytes() // local)
    else:
        own = torch.cuda.get_device_properties(device)
        bandwidth = 2.0 * 1e3 * own.memory_clock_rate * own.memory_bus_width / 8  # two transfers per clock
        hardware = gpu_preset(own.name, own.total_memory) or from_properties(own.name, own.total_memory, bandwidth)
    if hardware.compute_device != device.type:
        raise UserError(
            f"it describes {hardware.compute_device} ranks, these are {device.type} ranks",
            where=f"--hardware {named}",
            remedy="leave the option out, or name another one",
        )
    return replace(hardware, ranks_per_host=local, pod_size=pod_size())


def known_hardware(named: str | None, device: torch.device) -> Hardware | None:
    """Describe the ranks at hand with the memory that they have; None where nothing says how fast they are.

    The preset ``cpu`` describes no particular machine, so CPU ranks are known by a calibrated file only.
    """
    if named is None:
        if device.type == "cpu":
            return None
        total = int(torch.cuda.get_device_properties(device).total_memory)
        if gpu_preset(device_name(device), total) is None:
            return None
    hardware = describe_hardware(named, device)
    hbm = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return replace(hardware, hbm_bytes=hbm, ddr_bytes=host_bytes() // local_world_size())


def gpu_preset(name: str, capacity: int) -> Hardware | None:
    """Return the preset of a GPU with so many bytes, of which the driver keeps some; None where there is none.

    Example:
        >>> [gpu_preset(name, 80 * 2**30).name for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3")]
        ['a100-80', 'h100']
    """
    words = re.split(r"[\s-]+", name.lower())
    words += ["".join(pair) for pair in itertools.pairwise(words)]  # RTX 4090
    fitting = [
        preset
        for preset in PRESETS.values()
        if preset.name.partition("-")[0] in words and (preset.hbm_bytes or 0) * 0.85 < capacity
    ]
    return max(fitting, key=lambda preset: preset.hbm_bytes or 0, default=None)
