"""The report of a plan: one HTML file, which needs nothing else. No torch.

What a picture shows is in the page as data too (``page.Data``), by the functions below that make it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrec_deepfm.report import plan_figures
from torchrec_deepfm.report.page import Block, Cell, Data, PageTable, Picture, Section, Terms, write_page
from torchrec_deepfm.sharding.inputs.sharding_types import CUDA_KERNELS
from torchrec_deepfm.sharding.plan.plan import TERMS, Compared, PlanFile, PlannedTable
from torchrec_deepfm.sharding.plan.text import ranks_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
_MAPPED = 60  # tables in the map of placement
_PLACED = {
    "data_parallel": "replicated on every rank",
    "table_wise": "whole on one rank each",
    "row_wise": "cut by rows over all ranks",
    "column_wise": "cut into {shards} column shards",
    "table_column_wise": "cut into {shards} column shards inside a host",
    "table_row_wise": "cut by rows over the ranks of one host",
    "grid_shard": "cut into {shards} blocks of rows and columns",
}
TERM_NAMES = {
    "input_dist_comms_ms": "exchange of ids (input_dist)",
    "fwd_compute_ms": "look-up (fwd_compute)",
    "fwd_comms_ms": "exchange of rows (fwd_comms)",
    "bwd_comms_ms": "exchange of gradients (bwd_comms)",
    "bwd_compute_ms": "update of rows (bwd_compute)",
    "prefetch_ms": "prefetch",
}
FIXED = "fixed (hardware.extra)"


def cost_by_rank(plan: PlanFile) -> list[float]:
    """Predicted milliseconds per step of each rank, rank 0 first; empty without a prediction."""
    return [] if plan.predicted is None else [cost.total_ms for cost in plan.predicted.per_rank]


def terms_by_rank(plan: PlanFile) -> dict[str, list[float]]:
    """Milliseconds of each term for each rank; the fixed costs, which the total has on top, come last."""
    if plan.predicted is None:
        return {}
    ranks = plan.predicted.per_rank
    terms = {name: [getattr(cost, term) for cost in ranks] for term, name in TERM_NAMES.items()}
    fixed = [cost.total_ms - sum(getattr(cost, term) for term in TERMS) for cost in ranks]
    return {
        **terms,
        FIXED: [value if value > 1e-9 * cost.total_ms else 0.0 for value, cost in zip(fixed, ranks, strict=True)],
    }


def predicted_memory(plan: PlanFile) -> dict[str, list[float]]:
    """Predicted GiB of each rank: ``hbm`` and ``ddr``, if the plan uses them."""
    if plan.predicted is None:
        return {}
    found = {
        "hbm": [cost.hbm_bytes / GIB for cost in plan.predicted.per_rank],
        "ddr": [cost.ddr_bytes / GIB for cost in plan.predicted.per_rank],
    }
    return {kind: values for kind, values in found.items() if any(values)}


def by_host(values: Sequence[float], local_world_size: int) -> list[list[float]]:
    """Lay what each rank has out as a matrix: a row for each host.

    Example:
        >>> by_host([1.0, 2.0, 3.0, 4.0], local_world_size=2)
        [[1.0, 2.0], [3.0, 4.0]]
    """
    return [list(values[first : first + local_world_size]) for first in range(0, len(values), local_world_size)]


def in_words(plan: PlanFile) -> str:
    """Describe a plan in a sentence: how many tables are placed how.

    Example:
        >>> from torchrec_deepfm.sharding.plan.plan import PlannedShard
        >>> shards = [PlannedShard(rank=rank, offsets=(0, 8 * rank), sizes=(9, 8)) for rank in range(2)]
        >>> table = PlannedTable(
        ...     name="t", num_embeddings=9, embedding_dim=16, sharding_type="column_wise", compute_kernel="fused",
        ...     shards=tuple(shards),
        ... )
        >>> in_words(PlanFile(world_size=2, local_world_size=2, batch_size=1, search="balanced", tables=(table,)))
        '1 table is cut into 2 column shards'
    """
    counts: dict[str, list[PlannedTable]] = {}
    for table in plan.tables:
        counts.setdefault(table.sharding_type, []).append(table)
    parts = []
    for kind, tables in sorted(counts.items(), key=lambda each: -len(each[1])):
        several = len(tables) > 1
        shards = sorted({len(table.shards) for table in tables})
        number = f"{shards[0]}" if len(shards) == 1 else f"{shards[0]} to {shards[-1]}"
        text = _PLACED[kind].format(shards=number)
        cached = sum(table.compute_kernel in CUDA_KERNELS for table in tables)
        rows = f" ({cached} with rows in host memory)" if cached else ""
        parts.append(f"{len(tables)} {'tables are' if several else 'table is'} {text}{rows}")
    return "; ".join(parts)


def placement_map(plan: PlanFile) -> tuple[list[str], list[list[float]]]:
    """What each table takes on each rank: names of the tables, the largest first, and milliseconds [tables, ranks].

    GiB of weights where the plan has no prediction; NaN where a rank has nothing of a table.
    """
    tables = sorted(plan.tables, key=_table_bytes, reverse=True)[:_MAPPED]
    found = [[math.nan] * plan.world_size for _ in tables]
    for row, table in zip(found, tables, strict=True):
        for shard in table.shards:
            weights = shard.sizes[0] * shard.sizes[1] * 4 / GIB
            amount = weights if shard.predicted is None else shard.predicted.total_ms
            row[shard.rank] = amount + (0.0 if math.isnan(row[shard.rank]) else row[shard.rank])
    return [table.label for table in tables], found


def beside(plan: PlanFile, torchrecs: PlanFile) -> PageTable:
    """Put the predictions of two plans of the same tables side by side."""
    rows: list[list[Cell]] = []
    for name, one in (("this plan", plan), ("TorchRec's planner", torchrecs)):
        assert one.predicted is not None
        held = max(cost.hbm_bytes for cost in one.predicted.per_rank) / GIB
        slowest = [one.predicted.slowest_ms(objective) for objective in ("all", "total")]
        rows.append([name, *slowest, one.predicted.mean_ms, held, in_words(one)])
    head = ("", "all terms, ms", "Perf.total, ms", "mean of the ranks, ms", "GiB of HBM, at most", "placement")
    return PageTable(head, rows, formats=dict.fromkeys(head[1:4], ".3f") | {head[4]: ".2f"})


def write_plan_report(
    plan: PlanFile, path: Path, *, bound_ms: float | None = None, torchrecs: PlanFile | None = None
) -> None:
    """Write the report of a plan; a plan with predictions gets pictures of its costs and memory.

    ``bound_ms`` is what no plan goes below, ``torchrecs`` what TorchRec's planner makes of the same tables.
    """
    hosts = plan.world_size // plan.local_world_size
    facts: dict[str, Cell] = {
        "Ranks": f"{plan.world_size:,} on {hosts:,} host{'s' * (hosts != 1)}",
        "Samples per rank and step": plan.batch_size,
        "Tables": len(plan.tables),
        "In words": in_words(plan),
        "Weights (float32)": f"{sum(map(_table_bytes, plan.tables)) / GIB:,.2f} GiB",
        "Found by": plan.search,
        "Hardware": None if plan.hardware is None else plan.hardware.name,
    }
    sections = []
    if plan.predicted is not None:
        facts["Critical path, predicted"] = f"{plan.predicted.critical_path_ms:.3f} ms"
        facts["Mean of the ranks, predicted"] = f"{plan.predicted.mean_ms:.3f} ms"
        if bound_ms is not None and bound_ms > plan.predicted.critical_path_ms * (1 + 1e-9):
            bound_ms = None  # the plan is not made of the options that it is for
        if bound_ms is not None:
            facts["Lower bound of the options searched"] = f"{bound_ms:.3f} ms"
        sections = [*_cost_sections(plan, bound_ms)]
        if torchrecs is not None:
            sections.insert(0, Section("Beside TorchRec's planner", beside(plan, torchrecs)))
    made_with = ", ".join(f"{name} {version}" for name, version in plan.made_with.items())
    summary = Section("Summary", Terms({**facts, "Made with": made_with or None}))
    write_page(path, "Sharding plan", [summary, *sections, _placement(plan), Section("Tables", _tables(plan))])


def _placement(plan: PlanFile) -> Section:
    names, amounts = placement_map(plan)
    what = "ms per step" if plan.predicted is not None else "GiB of weights"
    ranks = [str(rank) for rank in range(plan.world_size)]
    shown = f"the {len(names)} largest tables" if len(names) < len(plan.tables) else "the tables"
    return Section(
        "Which rank holds what",
        Picture(
            plan_figures.heat_map(amounts, names, ranks, what=what, across="rank", down=""),
            alt=f"Map of {shown} over ranks: {in_words(plan)}.",
            caption=f"What each of {shown} takes on each rank ({what}); empty: nothing of it.",
            kind="png",
        ),
        Data(
            "placement", {"tables": names, "amounts": [[None if math.isnan(x) else x for x in row] for row in amounts]}
        ),
    )


def _cost_sections(plan: PlanFile, bound_ms: float | None) -> list[Section]:
    assert plan.predicted is not None
    costs, local = cost_by_rank(plan), plan.local_world_size
    slowest = max(range(len(costs)), key=costs.__getitem__)
    maps: dict[str, Any] = {"cost_ms": costs}
    cost = Picture(
        _host_map(costs, local, "ms per step"),
        alt=f"Heat map of the predicted cost of each rank; rank {slowest} has the most, {costs[slowest]:.3f} ms.",
        caption="Predicted milliseconds of each rank. All wait for the slowest: its time is the critical path.",
        kind="png",
    )
    memory = []
    for kind, values in predicted_memory(plan).items():
        maps[f"{kind}_gib"] = values
        memory.append(
            Picture(
                _host_map(values, local, f"GiB of {kind.upper()}"),
                alt=f"Heat map of the predicted memory of each rank: {min(values):.2f} to {max(values):.2f} GiB.",
                caption=f"Predicted {kind.upper()} of each rank{_of_capacity(plan, kind)}.",
                kind="png",
            )
        )
    terms = terms_by_rank(plan)
    if plan.world_size <= plan_figures.MANY:
        bars = plan_figures.stacked_bars(
            terms, [f"rank {rank}" for rank in range(plan.world_size)], what="ms per step", bound=bound_ms
        )
    else:
        bars = plan_figures.cost_figure(terms, what="ms per step", bound=bound_ms)
    return [
        Section("Cost by rank", cost, Data("heat-maps", maps)),
        Section(
            "Terms of the cost",
            Picture(
                bars,
                alt="Bars of the predicted cost of each rank, by term.",
                caption="Predicted milliseconds of each rank by TorchRec's terms.",
            ),
            Data("terms", terms),
        ),
        Section("Memory by rank", *memory),
    ]


def _host_map(values: Sequence[float], local_world_size: int, what: str) -> "Figure":
    """A heat map with the longer side across: hosts, where there are more of them than ranks on one."""
    matrix = by_host(values, local_world_size)
    hosts, ranks = [str(number) for number in range(len(matrix))], [str(number) for number in range(local_world_size)]
    if len(hosts) <= len(ranks):
        rows = [f"host {number}" for number in hosts]
        return plan_figures.heat_map(matrix, rows, ranks, what=what, across="rank on its host", down="")
    turned = list(zip(*matrix, strict=True))
    return plan_figures.heat_map(turned, ranks, hosts, what=what, across="host", down="rank on its host")


def _of_capacity(plan: PlanFile, kind: str) -> str:
    capacity = getattr(plan.hardware, f"{kind}_bytes", None)
    return f", of {capacity / GIB:,.0f} GiB available" if isinstance(capacity, int) else ""


def _tables(plan: PlanFile) -> PageTable:
    rows: list[Sequence[Cell]] = []
    for table in plan.tables:
        costs = [shard.predicted.total_ms for shard in table.shards if shard.predicted is not None]
        rows.append(
            (
                table.label,
                table.num_embeddings,
                table.embedding_dim,
                _table_bytes(table) / GIB,
                table.sharding_type,
                table.compute_kernel,
                len(table.shards),
                ranks_text(table.ranks),
                max(costs) if costs else None,
            )
        )
    head = ("Table", "Rows", "Columns", "GiB", "Type", "Kernel", "Shards", "Ranks", "Largest shard, ms")
    return PageTable(head, rows, formats={"GiB": ",.3f", "Largest shard, ms": ".4f"})


def _table_bytes(table: PlannedTable) -> int:
    return table.num_embeddings * table.embedding_dim * 4


def write_comparison_report(rows: Sequence[Compared], path: Path) -> None:
    """Write the page of ``plan --compare``: milliseconds per step over ranks, dollars where prices are known."""
    known = [row for row in rows if row.step_ms is not None]
    blocks: list[Block] = []
    pictures: list[tuple[str, dict[tuple[str, int], float | None], str]] = [
        ("Step", {(row.hardware.name, row.ranks): row.step_ms for row in known}, "ms per step"),
        ("Price", {(row.hardware.name, row.ranks): row.dollars for row in known}, "dollars per billion samples"),
    ]
    sections = []
    for heading, values, what in pictures:
        lines: dict[str, dict[int, float]] = {}
        for (name, ranks), value in values.items():
            if value is not None:
                lines.setdefault(name, {})[ranks] = value
        if lines:
            best = min((value, name, ranks) for name, line in lines.items() for ranks, value in line.items())
            picture = Picture(
                plan_figures.scaling_curve(lines, what=what),
                alt=f"Lines of {what} over ranks; the least is {best[0]:.4g} with {best[2]:,} ranks of {best[1]}.",
                caption=f"Predicted {what}, without the dense part of the model.",
            )
            sections.append(Section(heading, picture))
    head = ("Hardware", "Ranks", "Step, ms", "Samples per second", "Dollars per billion samples", "No plan because")
    names = ("hardware", "ranks", "step_ms", "samples_per_second", "dollars", "why")
    compared = [(row.hardware.name, *(getattr(row, name) for name in names[1:])) for row in rows]
    cells: list[Sequence[Cell]] = [(*each[:-1], each[-1] or None) for each in compared]
    blocks += [PageTable(head, cells, formats={"Samples per second": ",.0f", "Dollars per billion samples": ",.2f"})]
    blocks += [Data("compared", [dict(zip(names, each, strict=True)) for each in compared])]
    write_page(path, "Hardware compared", [Section("Table", *blocks), *sections])
