"""Optimizers: that of the tables, fused into the backward pass; Adam for the rest; one schedule over both."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_deepfm.sharding.inputs.sparse_optimizers import SPARSE_OPTIMIZERS
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.optim.cowclip import CowClip
from torchrec_deepfm.training.optim.regularisers import before_step, decay_tables, is_table_weight


def fuse_sparse_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> None:
    """Mark table parameters to be updated in their backward pass; sharding then fuses the optimizer into the kernel.

    Call it before sharding, on the unsharded tables, except those that become data_parallel.
    """
    optimizer_class, options = SPARSE_OPTIMIZERS[config.sparse_optimizer]
    # A fresh dictionary: apply_optimizer_in_backward modifies its argument.
    apply_optimizer_in_backward(optimizer_class, parameters, {"lr": config.sparse_lr, **options})


def make_optimizer(model: DistributedModelParallel, config: TrainConfig) -> CombinedOptimizer:
    """Combine the fused optimizer of the sharded tables with Adam for every other parameter.

    A table of more than ``data_parallel_rows`` rows that a plan replicates also has the tables' optimizer, not fused;
    so have all tables, and the shards of this rank, if that is Adam. Penalties and gradient clipping come before the
    step.

    Args:
        model: the sharded model.
        config: the optimizers and their rates.

    Returns:
        One keyed optimizer over both.
    """
    whole = {name: value for name, value in model.state_dict().items() if is_table_weight(name)}
    # Of a table that other ranks hold, TorchRec leaves an empty parameter.
    rest = {name: weight for name, weight in in_backward_optimizer_filter(model.named_parameters()) if weight.numel()}
    # A plan may replicate other tables than ``data_parallel_rows``: a table's optimizer must not depend on the plan.
    tables = {
        name: weight
        for name, weight in rest.items()
        if name in whole and whole[name].size(0) > config.data_parallel_rows
    }
    dense = KeyedOptimizerWrapper(
        {name: weight for name, weight in rest.items() if name not in tables},
        lambda parameters: torch.optim.Adam(parameters, lr=config.dense_lr, fused=_is_on_gpu(parameters)),
    )
    parts: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = [model.fused_optimizer, dense]
    if tables:
        optimizer_class, options = SPARSE_OPTIMIZERS[config.sparse_optimizer]
        eager = KeyedOptimizerWrapper(
            tables, lambda weights: optimizer_class(weights, **{"lr": config.sparse_lr, **options})
        )
        parts.insert(1, eager)
    combined = CombinedOptimizer(parts)
    if config.embedding_weight_decay:
        combined.register_step_post_hook(decay_tables(model, config, combined))
    clip_rows = CowClip(model, rest, config).clip_tables if config.clip_embedding == "cowclip" else None
    shards = {name for name, value in whole.items() if hasattr(value, "local_shards")}
    hook = before_step(rest, shards if config.sparse_optimizer == "adam" else set(), config, clip_rows)
    if hook is not None:
        combined.register_step_pre_hook(hook)
    return combined


def _is_on_gpu(parameters: Sequence[Tensor]) -> bool:
    """Whether Adam may be one kernel, with its count of steps on the device too; on a CPU it gains nothing."""
    return all(parameter.is_cuda for parameter in parameters)


def schedule(config: TrainConfig, total_steps: int) -> Callable[[float], float]:
    """Linear warm-up, plateau, polynomial decay: the factor of the learning rate, in (0, 1], at each step from 0.

    Example:
        >>> factor = schedule(TrainConfig(warmup=0.2, decay=0.5, decay_power=1.0), total_steps=10)
        >>> [round(factor(step), 2) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    warmup_steps = round(config.warmup * total_steps)
    decay_steps = round(config.decay * total_steps)
    decay_start = total_steps - decay_steps

    def factor(step: float) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if step >= decay_start and decay_steps > 0:
            left: float = max((total_steps - step) / decay_steps, 0.0)
            return math.pow(left, config.decay_power)
        return 1.0

    return factor


def make_scheduler(
    optimizer: CombinedOptimizer, config: TrainConfig, total_steps: int, plateau: Callable[[], float] = lambda: 1.0
) -> LambdaLR:
    """Drive the learning rates of all parameter groups, fused ones included, by ``schedule``.

    The fused kernels read their rate from the groups in ``zero_grad``, which the pipeline calls before each forward
    pass, so no step lags behind.

    ``optimizer``: of ``make_optimizer``. ``plateau``: a factor on top of the schedule, read at each step. Returns a
    scheduler; call its ``step`` after each training step.
    """
    factor = schedule(config, total_steps)
    return LambdaLR(optimizer, lambda step: factor(step) * plateau())


def set_rates(scheduler: LambdaLR, step: float) -> None:
    """Set the learning rates of all parameter groups to those of a step; a fraction if the batch size has changed."""
    scheduler.last_epoch = step  # type: ignore[assignment]
    for group, base, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)  # type: ignore[arg-type, operator]
