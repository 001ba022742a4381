"""TorchRec's equations of a step written down again, to score plans by code that shares nothing with the search."""

import math
from collections.abc import Sequence

from benchmarks.planner.cases import Case
from torchrec_deepfm.sharding.inputs.tables import Table

Kernel = str | tuple[str, float]


def score(placed: Sequence[tuple[Table, str, Kernel, Sequence[tuple[int, int, int]]]], case: Case) -> dict[str, float]:
    """Return milliseconds of the slowest rank by each objective.

    Args:
        placed: For each table its sharding type, kernel (with its share of cached rows, if not 0.2), and
            (rank, rows, columns) of every shard.
        case: What it is for.
    """
    total, ids = [0.0] * case.ranks, [0.0] * case.ranks
    for table, kind, kernel, shards in placed:
        costs: dict[tuple[int, int], tuple[float, float]] = {}
        for rank, rows, columns in shards:
            if (rows, columns) not in costs:
                costs[rows, columns] = shard_ms(table, kind, kernel, rows, columns, case)
            total[rank] += costs[rows, columns][0]
            ids[rank] += costs[rows, columns][1]
    return {"total": max(total), "all": max(map(sum, zip(total, ids, strict=True)))}


def shard_ms(table: Table, kind: str, kernel: Kernel, rows: int, columns: int, case: Case) -> tuple[float, float]:
    """TorchRec's equations for one shard of float32: milliseconds without ids, and those of the ids that arrive.

    On hosts of one rank a table_row_wise or grid shard holds whole rows, as a table_wise or column_wise one does, but
    TorchRec spares it the penalty on narrow rows: here it costs the same.
    """
    hardware, ranks = case.hardware, case.ranks
    kernel, cached = (kernel, 0.2) if isinstance(kernel, str) else kernel
    local = min(hardware.ranks_per_host, ranks)
    if local == 1:
        kind = {"table_row_wise": "table_wise", "grid_shard": "column_wise"}.get(kind, kind)
    hosts = ranks // local
    gpu = hardware.compute_device == "cuda"
    memory = (hardware.hbm_bandwidth if gpu else hardware.ddr_bandwidth) / 1e3  # bytes per millisecond
    slow = hardware.hbm_to_ddr_bandwidth / 1e3
    device = {
        "fused": memory,
        "dense": memory / 2,
        "fused_uvm": slow / 10,
        "fused_uvm_caching": (cached * memory + (1 - cached) * slow) / 10,
    }[kernel]
    intra, inter = hardware.intra_host_bandwidth / 1e3, hardware.inter_host_bandwidth / 1e3
    link = intra if hosts == 1 else inter
    looked_up = case.batch_size * table.pooling_factor * (1 if kind == "data_parallel" else ranks)
    looked_up /= {"row_wise": ranks, "table_row_wise": local, "grid_shard": local}.get(kind, 1)
    samples = case.batch_size * (1 if kind == "data_parallel" else ranks)
    whole_rows = kind in ("table_wise", "column_wise", "table_column_wise")
    penalty = (1.0 if columns >= 128 else 1.15 if columns >= 64 else 1.75) if whole_rows else 1.0
    id_bytes = math.ceil(8 * looked_up) * (2 if table.weighted else 1)
    read = id_bytes + 4 * looked_up * (max(columns, 32) if whole_rows else columns) + 4 * samples * columns
    forward = read * penalty / device
    compute = forward * 3 + (forward * 1.1 if table.weighted else 0.0)
    pooled = 4 * samples * columns
    if kind == "data_parallel":
        size, rings = 4 * rows * columns, min(ranks / local, 2)
        reduced = size * (2 * rings - 1) / rings / (inter * local) * (2 if ranks > 2 * local else 1)
        return compute + reduced + size * 9.22 / device, 0.0
    if whole_rows:
        comms = 2 * pooled / link
    elif kind == "row_wise":
        comms = 2 * pooled / link + pooled * 2.455 / device
    else:
        across = pooled / local / inter if hosts > 1 else 0.0
        comms = 2 * (pooled / intra + across) + pooled * 2.455 / device
    arriving = case.batch_size * table.pooling_factor * ranks * rows / table.num_embeddings
    return compute + comms, arriving * (12 if table.weighted else 8) / link
