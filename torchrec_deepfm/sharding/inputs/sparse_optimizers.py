"""The optimizers of embedding tables by name: their classes, and the options that FBGEMM's kernels share."""

from typing import Any, Final

import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_deepfm.sharding.inputs.sharding_types import SparseOptimizer

# FBGEMM's eps, whatever torch's classes say (torch.optim.Adagrad has 1e-10): the same numbers sharded or not.
SPARSE_OPTIMIZERS: Final[dict[SparseOptimizer, tuple[type[torch.optim.Optimizer], dict[str, Any]]]] = {
    "rowwise_adagrad": (RowWiseAdagrad, {"eps": 1e-8}),
    "adagrad": (torch.optim.Adagrad, {"eps": 1e-8}),
    "sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {}),  # never fused: FBGEMM's steps on the rows of the batch only, and on GPUs only
}
