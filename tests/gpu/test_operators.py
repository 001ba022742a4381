"""Does every operator of a training step have a kernel for CUDA, and for the types of its tensors?

Some steps on the CPU are recorded, operator by operator. A CUDA build of torch has its kernels registered, and FBGEMM's
too: the dispatcher is asked. A CPU build has none, so the list of operators that comes with each build of torch is
read instead; of FBGEMM's a CPU build cannot tell. Neither knows which types a kernel takes: those are in the list by
which torch's own tests try each operator on a GPU. docs/gpu.md has what the CUDA builds answered.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torchgen
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.ranks import one_rank
from tests.support.samples import draw, to_batch
from torchrec_deepfm.model import arches
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import Precision, TrainConfig
from torchrec_deepfm.training.optim import optimizers
from torchrec_deepfm.training.optim.optimizers import make_optimizer
from torchrec_deepfm.training.scoring.evaluation import autocast, float32_products

SIZES = {"a": 50, "b": 30, "c": 4}

# In a process of its own, since torch's test modules change torch's settings when they are loaded.
PRINT_TYPES_ON_CUDA = """
import json, sys, types, unittest
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # not installed, not needed here
from torch.testing._internal import common_cuda
common_cuda.SM53OrLater = True  # else matrix products in bfloat16 are listed only where there is a GPU
from torch.testing._internal import common_methods_invocations as ops
found = {}
for op in [*ops.op_db, *ops.foreach_unary_op_db, *ops.foreach_binary_op_db, *ops.foreach_reduce_op_db]:
    for name, kinds in ((op.aten_name, op.supported_dtypes("cuda")),
                        (f"{op.aten_name}_backward", op.supported_backward_dtypes("cuda"))):
        found[name] = found.get(name, set(kinds)) & set(kinds)  # of all variants
print(json.dumps({name: [str(kind) for kind in kinds] for name, kinds in found.items()}))
"""
BACKWARD_OF = {"threshold_backward": "relu_backward"}
# They copy or rename memory, or read one number; and Adam in one kernel, which has a list of its own.
WITHOUT_TYPES = {"_fused_adam_", "_local_scalar_dense", "_to_copy", "_unsafe_view", "copy_", "detach", "lift_fresh"}


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
def recorded() -> dict[Precision, dict[str, set[torch.dtype]]]:
    """The operators of two steps in each precision, with every penalty, batch normalisation and Adam in one kernel."""
    found = {}
    # Adam is fused on a GPU only; its kernel for the CPU has the same name.
    # Ids on a GPU are checked by other operators than those in host memory.
    with (
        one_rank() as device,
        mock.patch.object(optimizers, "_is_on_gpu", return_value=True),
        mock.patch.object(arches, "_in_host_memory", return_value=False),
    ):
        for precision in get_args(Precision):
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
            found[precision] = record(config, device)
    return found


def record(config: TrainConfig, device: torch.device) -> dict[str, set[torch.dtype]]:
    recorder = Recorder()
    model = build_model(config, SIZES, 2, device).model
    optimizer = make_optimizer(model, config)
    with float32_products(config.precision):
        for seed in range(2):
            batch = to_batch(draw(8, SIZES, 2, seed=seed), list(SIZES))
            optimizer.zero_grad()
            with recorder:
                with autocast(config.precision, device):
                    loss, _ = model(batch)
                loss.backward()
                optimizer.step()
    return recorder.found


def test_every_operator_of_torch_has_a_kernel_for_cuda(
    recorded: dict[Precision, dict[str, set[torch.dtype]]],
) -> None:
    every = set().union(*recorded.values())
    names = {name for name in every if torch.version.cuda is not None or name.startswith("aten::")}
    assert len(names) > 30, "the step was not recorded"
    assert "aten::_fused_adam_" in names
    assert missing_on_cuda(names) == set()


@pytest.fixture(scope="module")
def types_on_cuda() -> dict[str, set[str]]:
    """The types with which torch's tests try each operator on a GPU."""
    done = subprocess.run([sys.executable, "-c", PRINT_TYPES_ON_CUDA], capture_output=True, text=True, check=True)
    return {name: set(kinds) for name, kinds in json.loads(done.stdout).items()}


def test_kernels_for_cuda_take_the_types_of_every_operator(
    recorded: dict[Precision, dict[str, set[torch.dtype]]], types_on_cuda: dict[str, set[str]]
) -> None:
    used: dict[str, set[torch.dtype]] = {}
    for found in recorded.values():
        for name, kinds in found.items():
            if name.startswith("aten::") and kinds:
                used.setdefault(name, set()).update(kinds)
    assert {"aten::mul.Tensor", "aten::sum.dim_IntList"} <= {name for name in used if torch.float64 in used[name]}
    assert {"aten::aminmax", "aten::maximum"} <= {name for name in used if torch.int32 in used[name]}
    assert not_taken(used, types_on_cuda) == {}


def test_a_type_without_a_kernel_is_found(types_on_cuda: dict[str, set[str]]) -> None:
    used = {"aten::addmm": {torch.float32, torch.int32}, "aten::unheard_of": {torch.float32}}
    assert not_taken(used, types_on_cuda) == {"aten::addmm": {"torch.int32"}, "aten::unheard_of": {"torch.float32"}}


def not_taken(used: Mapping[str, set[torch.dtype]], listed: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The types that the list does not have, by operator."""
    missing = {}
    for full, kinds in used.items():
        name = full.removeprefix("aten::").partition(".")[0]
        if name not in WITHOUT_TYPES:
            name = BACKWARD_OF.get(name, name)
            missing[full] = {str(kind) for kind in kinds} - (listed.get(name) or listed.get(name.rstrip("_"), set()))
    return {name: kinds for name, kinds in missing.items() if kinds}


def test_ids_are_int32_and_nothing_has_another_type_than_expected(
    recorded: dict[Precision, dict[str, set[torch.dtype]]],
) -> None:
    types = set().union(*(kinds for found in recorded.values() for kinds in found.values()))
    assert types <= {torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool}
    lookups = [kinds for found in recorded.values() for name, kinds in found.items() if "embedding_codegen" in name]
    assert lookups
    assert all(torch.int32 in kinds for kinds in lookups)


@pytest.mark.parametrize("precision", ["medium", "bf16"])
def test_no_float64_where_a_gpu_is_to_be_fast(
    recorded: dict[Precision, dict[str, set[torch.dtype]]], precision: Precision
) -> None:
    assert {name for name, kinds in recorded[precision].items() if torch.float64 in kinds} == set()


def test_in_float32_the_fm_alone_computes_in_float64(recorded: dict[Precision, dict[str, set[torch.dtype]]]) -> None:
    """Its sums nearly cancel (docs/performance.md)."""
    assert any(torch.float64 in kinds for kinds in recorded["float32"].values())
    with one_rank() as device:
        rest = record(TrainConfig(over_arch_layer_sizes=(8,), clip_norm=1.0, terms=("linear", "deep")), device)
    assert {name for name, kinds in rest.items() if torch.float64 in kinds} == set()


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
