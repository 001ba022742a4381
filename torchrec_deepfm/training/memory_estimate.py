"""Estimates the memory, disk space and steps of a training from its options. Standard library only."""

import itertools
import math
from dataclasses import dataclass

from torchrec_deepfm.training.config import TrainConfig

_FLOAT = 4  # bytes of a float32, the type of all weights and states


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a training. Bytes cover all ranks together, unless they are per rank.

    Attributes:
        row_width: numbers in a packed row, padding included.
        table_bytes: the tables.
        table_state_bytes: the state of their optimizer.
        average_bytes: the moving average of all weights; 0 without one.
        dense_parameters: weights outside of the tables.
        rank_bytes: tables, states and averages per rank, if the planner distributes the tables evenly. Batches,
            activations, buffers of the collectives and the libraries come on top.
        pooled_bytes: pooled rows of a step and their gradients, per rank, one value per field.
        checkpoint_bytes: one checkpoint.
        steps: steps of the whole training, if nothing stops it early.
    """

    row_width: int
    table_bytes: int
    table_state_bytes: int
    average_bytes: int
    dense_parameters: int
    rank_bytes: int
    pooled_bytes: int
    checkpoint_bytes: int
    steps: int


def size_of(
    config: TrainConfig, *, table_rows: int, fields: int, numeric: int, train_rows: int, ranks: int = 1
) -> Size:
    """Estimate the size of a training.

    Tables that ``data_parallel_rows`` replicates count as sharded: they are small.

    Example:
        >>> size = size_of(TrainConfig(), table_rows=1000, fields=39, numeric=13, train_rows=10_000, ranks=2)
        >>> size.row_width, size.table_bytes, size.table_state_bytes, size.steps
        (12, 48000, 4000, 2)
    """
    width = math.ceil((config.factor_dim + 1) / 4) * 4
    tables = table_rows * width * _FLOAT
    kept = {"rowwise_adagrad": table_rows * _FLOAT, "adagrad": tables, "adam": 2 * tables, "sgd": 0}
    state = kept[config.sparse_optimizer]
    replicated = config.sparse_optimizer == "adam"
    dense = dense_parameters(config, fields=fields, numeric=numeric)
    # Running statistics of batch normalisation are averaged too.
    averaged_dense = dense + (2 * sum(config.over_arch_layer_sizes) if _has_batch_norm(config) else 0)
    averages = (tables + averaged_dense * _FLOAT) if config.ema else 0
    # Per dense weight: itself, Adam's two moments and a gradient; fused tables have no gradient.
    dense_bytes = dense * _FLOAT * 4 + (tables if replicated else 0)
    share = 1 if replicated else ranks
    average_tables = tables if config.ema else 0
    rank = math.ceil((tables + state + average_tables) / share) + dense_bytes + averages - average_tables
    return Size(
        row_width=width,
        table_bytes=tables,
        table_state_bytes=state,
        average_bytes=averages,
        dense_parameters=dense,
        rank_bytes=rank,
        pooled_bytes=2 * (fields - numeric) * width * _FLOAT * config.batch_size,
        checkpoint_bytes=tables + state + averages + 3 * dense * _FLOAT,
        steps=config.epochs * (train_rows // (config.batch_size * ranks)),
    )


def _has_batch_norm(config: TrainConfig) -> bool:
    return config.batch_norm and "deep" in config.terms


def dense_parameters(config: TrainConfig, *, fields: int, numeric: int) -> int:
    """Count the trained values outside of the tables: MLP, batch normalisation, rows of the numeric fields, bias."""
    count = 1 + numeric * (config.factor_dim + 1)  # these rows have no padding: no kernel reads them
    if "deep" in config.terms:
        sizes = [fields * config.factor_dim, *config.over_arch_layer_sizes]
        for inputs, outputs in itertools.pairwise(sizes):
            count += inputs * outputs + outputs + (2 * outputs if _has_batch_norm(config) else 0)
        count += sizes[-1]  # the last layer has no bias of its own
    return count
