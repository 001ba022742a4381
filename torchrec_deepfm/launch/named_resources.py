"""Named resources for TorchX's `-h`: what one host of a common kind offers to one job.

`torchx run apps/deepfm.py -h deepfm_h100x8 ...` asks for a whole host with 8 H100. Cores and memory are those of Google
Cloud's machine types (2026-11): a3-highgpu, a2-ultragpu (A100 with 80 GB), g2-standard and c3-standard. TorchX adds
some of AWS's; a site registers its own hosts in the entry point group `torchx.named_resources`, as pyproject.toml does.
"""

from collections.abc import Callable

from torchx.specs import Resource


def _host(cores: int, gpus: int, gib: int) -> Callable[[], Resource]:
    return lambda: Resource(cpu=cores, gpu=gpus, memMB=gib * 1024)


h100x1, h100x4, h100x8 = _host(26, 1, 234), _host(104, 4, 936), _host(208, 8, 1872)
a100x1, a100x4, a100x8 = _host(12, 1, 170), _host(48, 4, 680), _host(96, 8, 1360)
l4x1, l4x4, l4x8 = _host(4, 1, 16), _host(48, 4, 192), _host(96, 8, 384)
cpux8, cpux44 = _host(8, 0, 32), _host(44, 0, 176)
