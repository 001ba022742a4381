"""Does every operator of a training step have a kernel for CUDA?

Some steps on the CPU are recorded, operator by operator. A CUDA build of torch has its kernels registered, and FBGEMM's
too: the dispatcher is asked. A CPU build has none, so the list of operators that comes with each build of torch is
read instead; of FBGEMM's a CPU build cannot tell. Neither knows which types a kernel takes. docs/gpu.md has what the
CUDA builds answered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.ranks import one_rank
from tests.support.samples import draw, to_batch
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.optimizers import make_optimizer
from torchrec_deepfm.training.scoring.evaluation import autocast

SIZES = {"a": 50, "b": 30, "c": 4}


class Recorder(TorchDispatchMode):
    """Keeps each operator with the types of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.found.setdefault(func.name(), set()).update(tensor.dtype for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded() -> dict[str, set[torch.dtype]]:
    """The operators of two steps in float32 and two in bfloat16, with every penalty and batch normalisation."""
    recorder = Recorder()
    with one_rank() as device:
        for precision in ("float32", "bf16"):
            config = TrainConfig(
                over_arch_layer_sizes=(8,),
                batch_norm=True,
                dropout=0.5,
                data_parallel_rows=4,
                clip_norm=1.0,
                over_arch_l2=0.01,
                touched_embedding_l2=0.01,
                precision=precision,
            )
            model = build_model(config, SIZES, 2, device).model
            optimizer = make_optimizer(model, config)
            for seed in range(2):
                batch = to_batch(draw(8, SIZES, 2, seed=seed), list(SIZES))
                optimizer.zero_grad()
                with recorder:
                    with autocast(precision, device):
                        loss, _ = model(batch)
                    loss.backward()
                    optimizer.step()
    return recorder.found


def test_every_operator_of_torch_has_a_kernel_for_cuda(recorded: dict[str, set[torch.dtype]]) -> None:
    names = {name for name in recorded if torch.version.cuda is not None or name.startswith("aten::")}
    assert len(names) > 30, "the step was not recorded"
    assert missing_on_cuda(names) == set()


def test_no_other_types_than_expected(recorded: dict[str, set[torch.dtype]]) -> None:
    expected = {torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool}
    assert set().union(*recorded.values()) <= expected


def test_an_operator_of_the_cpu_alone_is_found() -> None:
    assert missing_on_cuda({"aten::mkldnn_linear"}) == {"aten::mkldnn_linear"}


def missing_on_cuda(names: set[str]) -> set[str]:
    """The operators without a kernel for CUDA tensors."""
    if torch.version.cuda is not None:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        keys = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
        return {name for name in names if not any(has(name, key) for key in keys)}
    text = (Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml").read_text()
    listed = {entry["func"].partition("(")[0]: entry for entry in yaml.load(text, yaml.CSafeLoader)}
    return {name for name in names if not _on_cuda(listed, name.removeprefix("aten::"))}


def _on_cuda(listed: Mapping[str, Any], name: str) -> bool:
    entry = listed[name]
    entry = listed.get(entry.get("structured_delegate"), entry)  # its out= variant has the kernel
    if "ufunc_inner_loop" in entry:  # one loop for the CPU and for CUDA
        return True
    keys = ", ".join(entry.get("dispatch", {"CompositeImplicitAutograd": name})).split(", ")
    return any(key == "CUDA" or key.startswith("Composite") for key in keys)
