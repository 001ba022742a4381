"""L2 penalties, of whole tables and of the rows that a batch looks up, and gradient clipping.

Shapes: B samples on this rank, S categorical features, K factor_dim, R = K + 1 columns of a packed row ``[v (K) | w]``.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_deepfm.model.arches import SparseArch
from torchrec_deepfm.training.checkpoint.tensors import model_state
from torchrec_deepfm.training.config import TrainConfig


def penalise_looked_up_rows(sparse_arch: SparseArch, config: TrainConfig, device: torch.device) -> None:
    r"""Penalise each look-up of a row, with any optimizer, fused or not.

    The backward pass adds the gradient of a penalty per sample:

    .. math:: \frac1B \sum_b \sum_s \frac{\lambda_v}{2} \lVert v_{bs} \rVert^2 + \frac{\lambda_w}{2} w_{bs}^2

    A row that n of the B samples look up gets n/B times lambda times itself, other rows nothing. Each bag must hold one
    id: of several only the sum is known here, and its penalty is not that of the rows.

    (FBGEMM's ``weight_decay`` cannot replace it: row-wise Adagrad supports it on GPUs, and the CPU kernels ignore it.)

    ``config``: ``touched_embedding_l2`` and ``touched_linear_l2``.
    """
    if not config.touched_embedding_l2 and not config.touched_linear_l2:
        return
    columns = [config.touched_embedding_l2] * config.factor_dim + [config.touched_linear_l2]
    penalties = torch.tensor(columns, device=device)

    def pull(module: nn.Module, inputs: Any, rows: Tensor) -> None:  # [B, S, R]
        if (
            not isinstance(rows, Tensor) or not rows.requires_grad
        ):  # while TorchRec traces the model, or in an evaluation
            return
        values, share = rows.detach(), 1.0 / max(len(rows), 1)
        rows.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: torch.addcmul(gradient, values, penalties, value=share)
        )

    sparse_arch.register_forward_hook(pull)


def before_step(
    parameters: Mapping[str, nn.Parameter],
    shards: AbstractSet[str],
    config: TrainConfig,
    clip_rows: Callable[[], None] | None = None,
) -> Callable[..., None] | None:
    """Build the hook that changes the gradients before the optimizers' step; None if no option needs it.

    Each penalty lambda/2 ||weight||^2 adds lambda * weight, rows are clipped (``clip_rows``), then the common norm of
    the gradients is. Gradients are averaged over the ranks before, so all of this is the same on any number of ranks.
    Of the tables ``shards`` every rank has other rows, so that their part of the norm is summed over the ranks.
    """
    penalised = list(_penalised(parameters, config))
    if not penalised and not config.clip_norm and clip_rows is None:
        return None

    def hook(*_: Any) -> None:
        for weight, penalty in penalised:
            if weight.grad is not None:
                weight.grad.addcmul_(weight.detach(), penalty)
        if clip_rows is not None:
            clip_rows()
        if config.clip_norm:
            _clip_norm(parameters, shards, config.clip_norm)

    return hook


def _clip_norm(parameters: Mapping[str, nn.Parameter], shards: AbstractSet[str], most: float) -> None:
    if not shards:
        torch.nn.utils.clip_grad_norm_(parameters.values(), most)
        return
    gradients = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    whole = torch.nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name not in shards])
    part = torch.nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name in shards])
    square = part.to(whole.device).square()  # of no gradients it is on the CPU
    dist.all_reduce(square)
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), most, (whole.square() + square).sqrt())


def decay_tables(
    model: DistributedModelParallel, config: TrainConfig, optimizer: KeyedOptimizer
) -> Callable[..., None]:
    r"""Build the hook that shrinks all rows of all tables after a step: each loses the share rate * lambda.

    A fused kernel moves the rows of the batch alone. This moves the others too, each rank its own shards, so it is the
    same under any plan and on any number of ranks.

    Args:
        model: the sharded model, its tables in the memory of its device.
        config: ``embedding_weight_decay``, and ``data_parallel_rows``, up to which tables have the dense rate.
        optimizer: all of ``make_optimizer``, whose groups have today's rates.

    Returns:
        A hook for ``Optimizer.register_step_post_hook``.
    """
    small: list[Tensor] = []
    large: list[Tensor] = []
    for name, table in model_state(model).items():
        if is_table_weight(name):
            tables = small if table.size[0] <= config.data_parallel_rows else large
            tables.extend(cut.tensor.detach() for cut in table.cuts)

    def hook(*_: Any) -> None:
        groups = list(optimizer.param_groups)
        for tensors, group in ((small, groups[-1]), (large, groups[0])):
            if tensors:
                torch._foreach_mul_(tensors, 1.0 - group["lr"] * config.embedding_weight_decay)

    return hook


def _penalised(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each weight that has a penalty, with lambda: one number, or one per column of a packed row."""
    columns = [config.embedding_l2] * config.factor_dim + [config.linear_l2]
    for name, weight in parameters.items():
        if is_table_weight(name) or name.endswith("dense_arch.rows"):
            penalty = torch.tensor(columns + [0.0] * (weight.shape[1] - len(columns)), device=weight.device)
        elif ".over_arch." in name and weight.dim() == 2:
            penalty = torch.tensor(config.over_arch_l2, device=weight.device)
        else:
            continue
        if penalty.any():
            yield weight, penalty


def is_table_weight(name: str) -> bool:
    """Whether this is the name of a table's weights."""
    return ".embedding_bags." in name and name.endswith(".weight")
