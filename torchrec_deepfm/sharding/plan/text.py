"""Plans as text for a terminal: what one costs, and how two differ. Standard library only."""

from collections.abc import Sequence
from typing import Final

from torchrec_deepfm.sharding.inputs.sharding_types import DEFAULT_CACHE_SHARE
from torchrec_deepfm.sharding.plan.plan import TERMS, Cost, PlanFile, PlannedTable
from torchrec_deepfm.units import format_bytes

_LISTED: Final = 40  # tables; of longer lists those with the most to hold
_MEANINGS: Final = {
    "fwd_compute_ms": "look-up",
    "fwd_comms_ms": "exchange of rows",
    "bwd_compute_ms": "update",
    "bwd_comms_ms": "exchange of gradients",
    "prefetch_ms": "fetch into a cache",
    "input_dist_comms_ms": "exchange of ids",
}


def plan_text(plan: PlanFile, *, bound_ms: float | None = None, reserved: float = 0.0) -> str:
    """Lay out a plan: its critical path with its terms, balance, memory, and where each table goes.

    A bound above the plan's own time is left out: the plan was not made of the options that it is for.
    """
    weights = sum(table.num_embeddings * table.embedding_dim * 4 for table in plan.tables)
    hosts = plan.world_size // plan.local_world_size
    hosts_text = f"{hosts} host(s) of {plan.local_world_size}"
    if plan.pod_size > 1:
        hosts_text += f", {plan.pod_size} to an NVLink domain"
    head = (
        f"{len(plan.tables)} tables, {format_bytes(weights)} of weights, on {plan.world_size} rank(s) "
        f"of {plan.hardware.name if plan.hardware else 'hardware that the plan does not name'}, {hosts_text}, "
        f"{'?' if plan.batch_size is None else f'{plan.batch_size:,}'} samples per rank; "
        f"search: {plan.search}, objective: {plan.objective}"
    )
    lines = [head]
    if plan.predicted is not None:
        lines += ["", *_costs(plan, bound_ms), "", *_memory(plan, reserved), *_caches(plan)]
    return "\n".join([*lines, "", *_tables(plan)])


def _costs(plan: PlanFile, bound_ms: float | None) -> list[str]:
    assert plan.predicted is not None
    costs = plan.predicted.per_rank
    slowest = max(range(len(costs)), key=lambda rank: costs[rank].total_ms)
    path, mean = plan.predicted.critical_path_ms, plan.predicted.mean_ms
    lines = [
        f"critical path {path:.2f} ms (rank {slowest}), mean {mean:.2f} ms, balance {mean / path if path else 1:.0%}"
    ]
    total, hidden = plan.predicted.slowest_ms("total"), plan.predicted.slowest_ms("hidden-ids")
    lines.append(
        f"  Perf.total, without the exchange of ids, {total:.2f} ms; with ids hidden behind kernels {hidden:.2f} ms"
    )
    best = plan.predicted.slowest_ms(plan.objective)
    if bound_ms is not None and bound_ms <= best * (1 + 1e-9):
        lines.append(
            f"  no plan of the options searched is below {bound_ms:.2f} ms ({plan.objective}) by the same estimates"
        )
    lines.append(f"  {'ms per step':<36}{f'rank {slowest}':>10}{'mean':>10}")
    for term in TERMS:
        name = f"{term.removesuffix('_ms')} ({_MEANINGS[term]})"
        lines.append(f"  {name:<36}{getattr(costs[slowest], term):>10.3f}{_mean(costs, term):>10.3f}")
    fixed = costs[slowest].total_ms - sum(getattr(costs[slowest], term) for term in TERMS)
    if fixed > 1e-6:
        lines.append(f"  {'fixed (calibrated)':<36}{fixed:>10.3f}{fixed:>10.3f}")
    return lines


def _memory(plan: PlanFile, reserved: float) -> list[str]:
    assert plan.predicted is not None
    costs = plan.predicted.per_rank
    lines = []
    for key, what in (("hbm_bytes", "GPU memory"), ("ddr_bytes", "host memory")):
        most = max(range(len(costs)), key=lambda rank: getattr(costs[rank], key))
        held, capacity = getattr(costs[most], key), getattr(plan.hardware, key, None)
        if not held:
            continue
        kept = reserved if key == "hbm_bytes" else 0.0
        of = f" of {format_bytes(capacity * (1 - kept))}" if isinstance(capacity, int) else ""
        less = f" ({format_bytes(capacity or 0)} less {kept:.0%} for all else)" if of and kept else ""
        lines.append(
            f"{what} of tables: at most {format_bytes(held)} (rank {most}), "
            f"mean {format_bytes(_mean(costs, key))}{of} per rank{less}"
        )
    return lines


def _caches(plan: PlanFile) -> list[str]:
    """What tables with rows in host memory cost, for whoever wonders why the plan is slow."""
    shares = [
        float(table.kernel_options.get("cache_load_factor", DEFAULT_CACHE_SHARE))
        for table in plan.tables
        if table.compute_kernel == "fused_uvm_caching"
    ]
    uncached = sum(table.compute_kernel == "fused_uvm" for table in plan.tables)
    if not shares and not uncached:
        return []
    of_cached = f", {len(shares)} of them with {min(shares):.0%} to {max(shares):.0%} of rows in a cache on the GPU"
    held = f"{len(shares) + uncached} table(s) have rows in host memory{of_cached if shares else ''}"
    return [f"{held}; with more ranks, or larger GPUs, they fit GPU memory"]


def _tables(plan: PlanFile) -> list[str]:
    head = f"{'table':<16}{'rows':>14}{'width':>7}  {'type':<20}{'kernel':<20}{'shards':>7}{'each':>18}{'ms':>9}  ranks"
    listed = sorted(plan.tables, key=_size, reverse=True)[:_LISTED]
    chosen = [table for table in plan.tables if table in listed] if len(plan.tables) > _LISTED else list(plan.tables)
    lines = [head.rstrip()]
    for table in chosen:
        largest = max(table.shards, key=lambda shard: shard.sizes[0] * shard.sizes[1])
        ms = [shard.predicted.total_ms for shard in table.shards if shard.predicted is not None]
        lines.append(
            f"{table.label:<16}{table.num_embeddings:>14,}{table.embedding_dim:>7}  {table.sharding_type:<20}"
            f"{table.compute_kernel:<20}{len(table.shards):>7}{f'{largest.sizes[0]:,} x {largest.sizes[1]}':>18}"
            f"{f'{max(ms):.3f}' if ms else '-':>9}  {ranks_text(table.ranks)}"
        )
    left = len(plan.tables) - len(chosen)
    return lines + ([f"... and {left} smaller table(s)"] if left else [])


def ranks_text(ranks: Sequence[int], most: int = 6) -> str:
    """Write ranks as runs of neighbours, of which ``most`` are written out.

    Example:
        >>> ranks_text([0, 1, 2, 7, 5])
        '0-2 5 7'
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return " ".join(texts[:most]) + (f" ... ({len(set(ranks))} ranks)" if len(texts) > most else "")


def diff_text(one: PlanFile, other: PlanFile, names: tuple[str, str]) -> str:
    """List how two plans differ, a line for each difference, then the predictions.

    Example:
        >>> plan = PlanFile(world_size=1, local_world_size=1, batch_size=1, search="balanced", tables=())
        >>> diff_text(plan, plan, ("a.json", "b.json"))
        'a.json and b.json place 0 tables alike'
    """
    lines = []
    for what in ("world_size", "local_world_size", "batch_size"):
        values = getattr(one, what), getattr(other, what)
        if values[0] != values[1]:
            lines.append(f"{what}: {values[0]} -> {values[1]}")
    hardware = [plan.hardware.name if plan.hardware else "not named" for plan in (one, other)]
    if one.hardware != other.hardware:
        same_name = hardware[0] == hardware[1]
        lines.append(f"hardware: {hardware[0]} -> {hardware[1]}{' (other figures)' if same_name else ''}")
    first, second = ({table.label: table for table in plan.tables} for plan in (one, other))
    lines += [f"{name}: only in {names[0]}" for name in first if name not in second]
    lines += [f"{name}: only in {names[1]}" for name in second if name not in first]
    changed = 0
    for name in first:
        if name in second and (differences := _differences(first[name], second[name])):
            changed += 1
            lines.append(f"{name}: {'; '.join(differences)}")
    if one.predicted is not None and other.predicted is not None:
        if lines or one.predicted != other.predicted:
            lines += ["", *_predictions(one, other)]
    elif lines and (one.predicted is not None or other.predicted is not None):
        lines += ["", f"{names[0] if one.predicted is None else names[1]} holds no prediction"]
    if not lines:
        return f"{names[0]} and {names[1]} place {len(first)} tables alike"
    return "\n".join([f"{names[0]} -> {names[1]}: {changed} of {len(first)} tables placed differently", *lines])


def _differences(one: PlannedTable, other: PlannedTable) -> list[str]:
    found = []
    if (one.num_embeddings, one.embedding_dim) != (other.num_embeddings, other.embedding_dim):
        found.append(
            f"{one.num_embeddings:,} x {one.embedding_dim} -> {other.num_embeddings:,} x {other.embedding_dim}"
        )
    pairs = [(one.sharding_type, other.sharding_type), (one.compute_kernel, other.compute_kernel)]
    found += [f"{before} -> {after}" for before, after in pairs if before != after]
    if dict(one.kernel_options) != dict(other.kernel_options):
        found.append(f"{dict(one.kernel_options)} -> {dict(other.kernel_options)}")
    shapes = [[(shard.offsets, shard.sizes) for shard in table.shards] for table in (one, other)]
    if sorted(shapes[0]) != sorted(shapes[1]):
        found.append(f"{len(shapes[0])} -> {len(shapes[1])} shards, {_widest(one)} -> {_widest(other)}")
    places = [sorted((shard.offsets, shard.rank) for shard in table.shards) for table in (one, other)]
    if places[0] != places[1]:
        found.append(f"ranks {ranks_text(one.ranks)} -> {ranks_text(other.ranks)}")
    return found


def _predictions(one: PlanFile, other: PlanFile) -> list[str]:
    assert one.predicted is not None
    assert other.predicted is not None
    lines = []
    pairs = {
        "critical path": (one.predicted.critical_path_ms, other.predicted.critical_path_ms),
        "Perf.total": (one.predicted.slowest_ms("total"), other.predicted.slowest_ms("total")),
        "mean": (one.predicted.mean_ms, other.predicted.mean_ms),
    }
    for what, (before, after) in pairs.items():
        change = f" ({(after - before) / before:+.1%})" if before else ""
        lines.append(f"{what}: {before:.2f} -> {after:.2f} ms{change}")
    for key, what in (("hbm_bytes", "GPU memory"), ("ddr_bytes", "host memory")):
        held = [max(getattr(cost, key) for cost in plan.predicted.per_rank) for plan in (one, other) if plan.predicted]
        if any(held):
            lines.append(f"{what} of the fullest rank: {format_bytes(held[0])} -> {format_bytes(held[1])}")
    return lines


def _widest(table: PlannedTable) -> str:
    rows, columns = max((shard.sizes for shard in table.shards), key=lambda sizes: sizes[0] * sizes[1])
    return f"{rows:,} x {columns}"


def _size(table: PlannedTable) -> int:
    return table.num_embeddings * table.embedding_dim


def _mean(costs: Sequence[Cost], key: str) -> float:
    return float(sum(getattr(cost, key) for cost in costs) / len(costs))
