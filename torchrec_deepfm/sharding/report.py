"""Reports that people look at: of a plan, and of an experiment. One HTML file each, which needs nothing else. No torch.

What a picture shows is in the page as data too (``page.embedded_data``), by the functions below that make it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torchrec_deepfm.page import Block, Cell, Data, Link, Paragraph, Picture, Section, Table, Terms, write_page
from torchrec_deepfm.sharding import figures
from torchrec_deepfm.sharding.measured import PLANS, Experiment, PlanMeasured
from torchrec_deepfm.sharding.plan import TERMS, PlanFile, PlannedTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
MIB = 2**20
TERM_NAMES = {
    "input_dist_comms_ms": "exchange of ids (input_dist)",
    "fwd_compute_ms": "look-up (fwd_compute)",
    "fwd_comms_ms": "exchange of rows (fwd_comms)",
    "bwd_comms_ms": "exchange of gradients (bwd_comms)",
    "bwd_compute_ms": "update of rows (bwd_compute)",
    "prefetch_ms": "prefetch",
}
FIXED = "fixed (hardware.extra)"
PHASE_NAMES = {
    "input_dist": "input dist",
    "lookup": "look-up",
    "output_dist": "output dist",
    "dense": "dense, forward",
    "backward_dense": "dense, backward",
    "backward_output_dist": "output dist, backward",
    "backward_lookup": "look-up, backward, and fused optimizer",
    "backward_all_reduce": "all-reduce, what is left to wait for",
    "optimizer": "optimizer, what is not fused",
}


def cost_by_rank(plan: PlanFile) -> list[float]:
    """Milliseconds a step that are predicted for each rank, rank 0 first; nothing where nobody has predicted them."""
    return [] if plan.predicted is None else [cost.total_ms for cost in plan.predicted.per_rank]


def terms_by_rank(plan: PlanFile) -> dict[str, list[float]]:
    """Milliseconds of each term for each rank; what the total has beyond them, the fixed costs, is the last one."""
    if plan.predicted is None:
        return {}
    ranks = plan.predicted.per_rank
    terms = {name: [getattr(cost, term) for cost in ranks] for term, name in TERM_NAMES.items()}
    fixed = [cost.total_ms - sum(getattr(cost, term) for term in TERMS) for cost in ranks]
    return {
        **terms,
        FIXED: [value if value > 1e-9 * cost.total_ms else 0.0 for value, cost in zip(fixed, ranks, strict=True)],
    }


def memory_by_rank(plan: PlanFile) -> dict[str, list[float]]:
    """GiB that are predicted for each rank: of ``hbm`` and ``ddr`` those that the plan uses."""
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


def write_plan_report(plan: PlanFile, path: Path) -> None:
    """Write the report of a plan.

    Args:
        plan: the plan; with predictions there is more to see.
        path: the HTML file; one that is there is replaced.

    Raises:
        UserError: the file can't be written.
    """
    hosts = plan.world_size // plan.local_world_size
    facts: dict[str, Cell] = {
        "Ranks": f"{plan.world_size:,} on {hosts:,} host{'s' * (hosts != 1)}",
        "Samples a rank and step": plan.batch_size,
        "Tables": len(plan.tables),
        "Weights (float32)": f"{sum(map(_table_bytes, plan.tables)) / GIB:,.2f} GiB",
        "Found by": plan.search,
        "Hardware": None if plan.hardware is None else str(plan.hardware.get("name")),
    }
    sections = []
    if plan.predicted is not None:
        facts["Critical path, predicted"] = f"{plan.predicted.critical_path_ms:.3f} ms"
        facts["Mean of the ranks, predicted"] = f"{plan.predicted.mean_ms:.3f} ms"
        sections = [*_cost_sections(plan)]
    made_with = ", ".join(f"{name} {version}" for name, version in plan.made_with.items())
    summary = Section("Summary", Terms({**facts, "Made with": made_with or None}))
    write_page(path, "Sharding plan", [summary, *sections, Section("Tables", _tables(plan))])


def _cost_sections(plan: PlanFile) -> list[Section]:
    assert plan.predicted is not None
    costs, local = cost_by_rank(plan), plan.local_world_size
    slowest = max(range(len(costs)), key=costs.__getitem__)
    maps: dict[str, Any] = {"cost_ms": costs}
    cost = Picture(
        _host_map(costs, local, "ms a step"),
        alt=f"Heat map of the predicted cost of each rank; rank {slowest} has the most, {costs[slowest]:.3f} ms.",
        caption="Predicted milliseconds of each rank. All wait for the slowest: its time is the critical path.",
        kind="png",
    )
    memory = []
    for kind, values in memory_by_rank(plan).items():
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
    if plan.world_size <= figures.MANY:
        bars = figures.stacked_bars(terms, [f"rank {rank}" for rank in range(plan.world_size)], what="ms a step")
    else:
        bars = figures.cost_by_rank(terms, what="ms a step")
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
        return figures.heat_map(matrix, rows, ranks, what=what, across="rank on its host", down="")
    turned = list(zip(*matrix, strict=True))
    return figures.heat_map(turned, ranks, hosts, what=what, across="host", down="rank on its host")


def _of_capacity(plan: PlanFile, kind: str) -> str:
    capacity = (plan.hardware or {}).get(f"{kind}_bytes")
    return f", of {capacity / GIB:,.0f} GiB that there are" if isinstance(capacity, int) else ""


def _tables(plan: PlanFile) -> Table:
    rows: list[Sequence[Cell]] = []
    for table in plan.tables:
        costs = [shard.predicted.total_ms for shard in table.shards if shard.predicted is not None]
        rows.append(
            (
                table.name,
                table.num_embeddings,
                table.embedding_dim,
                _table_bytes(table) / GIB,
                table.sharding_type,
                table.compute_kernel,
                len(table.shards),
                rank_list(table.ranks),
                max(costs) if costs else None,
            )
        )
    head = ("Table", "Rows", "Columns", "GiB", "Type", "Kernel", "Shards", "Ranks", "Largest shard, ms")
    return Table(head, rows, formats={"GiB": ",.3f", "Largest shard, ms": ".4f"})


def _table_bytes(table: PlannedTable) -> int:
    return table.num_embeddings * table.embedding_dim * 4


def rank_list(ranks: Sequence[int]) -> str:
    """Write ranks in short.

    Example:
        >>> rank_list([0, 1, 2, 3, 6, 8, 9])
        '0-3, 6, 8-9'
    """
    spans: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:8]]
    return ", ".join(shown) + (f" and {len(spans) - 8} more" if len(spans) > 8 else "")


def experiment_matrices(experiment: Experiment) -> dict[str, list[list[float | None]]]:
    """What the heat maps of an experiment show: for each plan a row, with a number for each rank.

    Args:
        experiment: the experiment.

    Returns:
        ``measured_ms`` (median of the turns), ``predicted_ms``, ``peak_mib``, ``table_mib``, ``predicted_mib``; None
        where there is no number.
    """
    ranks = experiment.settings.ranks
    nothing: list[float | None] = [None] * ranks
    found: dict[str, list[list[float | None]]] = {
        key: [] for key in ("measured_ms", "predicted_ms", "peak_mib", "table_mib", "predicted_mib")
    }
    for one in experiment.plans:
        told = one.plan.predicted
        found["measured_ms"].append([median(rank.step_ms) for rank in one.ranks])
        found["predicted_ms"].append(nothing if told is None else [cost.total_ms for cost in told.per_rank])
        found["peak_mib"].append([None if r.peak_bytes is None else r.peak_bytes / MIB for r in one.ranks])
        found["table_mib"].append([rank.table_bytes / MIB for rank in one.ranks])
        found["predicted_mib"].append(
            nothing if told is None else [max(cost.hbm_bytes, cost.ddr_bytes) / MIB for cost in told.per_rank]
        )
    return found


def write_experiment_report(
    experiment: Experiment, path: Path, *, others: Mapping[str, Mapping[int, float]] | None = None
) -> None:
    """Write the report of an experiment.

    Args:
        experiment: the experiment.
        path: the HTML file, beside its ``plans`` folder; one that is there is replaced.
        others: more lines for the scaling curve: milliseconds by number of ranks.

    Raises:
        UserError: the file can't be written.
    """
    settings = experiment.settings
    sections = [
        Section("Summary", *_summary(experiment)),
        Section("Plans", *_plans(experiment)),
        *_against(experiment),
        Section("Where the time goes", *_splits(experiment)),
        Section("Rank by rank", *_heat_maps(experiment)),
        Section("Bytes exchanged", *_traffic(experiment)),
        *_scaling(experiment, others or {}),
    ]
    widths = sorted({int(table["embedding_dim"]) for table in settings.tables})
    subtitle = (
        f"{len(experiment.plans)} plans of {len(settings.tables)} tables, {'/'.join(map(str, widths))} columns wide, "
        f"on {settings.ranks} ranks ({settings.device}), {settings.batch_size:,} samples a rank; {experiment.made_at}"
    )
    write_page(path, "Sharding plans: predicted and measured", sections, subtitle=subtitle)


def _summary(experiment: Experiment) -> list[Block]:
    settings, found = experiment.settings, experiment.agreement()
    fastest = min(experiment.plans, key=lambda one: one.step_ms)
    facts: dict[str, Cell] = {"Fastest plan": f"{fastest.name}, {fastest.step_ms:.2f} ms a step"}
    if found is not None:
        facts["Picked by the prediction"] = found.picked
        facts["Regret of that pick"] = f"{found.regret:.1%} slower than the fastest"
        facts["Rank correlation (Spearman)"] = found.spearman
    facts |= {
        "Hardware of the predictions": str(experiment.hardware.get("name")),
        "Steps": f"{settings.turns} turns of {settings.steps} steps each, the plans taking turns",
        "Optimizer of the tables": settings.optimizer,
        "Hidden layers": ", ".join(map(str, settings.over_arch_layer_sizes)) or "none",
        "Ids": settings.ids,
        "Made with": ", ".join(f"{name} {version}" for name, version in experiment.made_with.items()),
    }
    blocks: list[Block] = [Terms(facts)]
    if experiment.left_out:
        blocks.append(Table(("Left out", "Why"), list(experiment.left_out.items())))
    return blocks


def _plans(experiment: Experiment) -> list[Block]:
    rows: list[Sequence[Cell]] = []
    for number, one in enumerate(experiment.plans, start=1):
        turns = one.turns_ms
        peaks = [rank.peak_bytes for rank in one.ranks if rank.peak_bytes is not None]
        rows.append(
            (
                number,
                Link(one.name, f"{PLANS}/{one.name}.json"),
                types(one.plan),
                one.predicted_ms,
                one.step_ms,
                min(turns),
                max(turns),
                max(_sent(one)) / MIB,
                max(peaks) / MIB if peaks else None,
            )
        )
    head = ("No.", "Plan", "Tables by type", "Predicted", "Measured", "Fastest", "Slowest", "Sent", "Peak")
    formats = dict.fromkeys(head[3:8], ",.2f") | {"Peak": ",.0f"}
    text = (
        "Milliseconds of a step, of the slowest rank: predicted; measured, the median over the turns; the fastest and "
        "the slowest turn. Sent and peak are MiB of the rank that has most: what leaves it in a step, and what memory "
        "it needs beyond that of the process before the model was built."
    )
    return [Table(head, rows, formats=formats), Paragraph(text)]


def types(plan: PlanFile) -> str:
    """Count the tables of each sharding type, most frequent first."""
    kinds = [table.sharding_type for table in plan.tables]
    counted = sorted({(kinds.count(kind), kind) for kind in kinds}, key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{count}\N{NO-BREAK SPACE}{kind}" for count, kind in counted)


def _against(experiment: Experiment) -> list[Section]:
    told = [one for one in experiment.plans if one.predicted_ms]
    if not told or len(told) < len(experiment.plans):
        return []
    predicted, measured = [one.predicted_ms or 0.0 for one in told], [one.step_ms for one in told]
    spread = [(min(one.turns_ms), max(one.turns_ms)) for one in told]
    picture = Picture(
        figures.scatter(predicted, measured, spread),
        alt=f"Scatter of {len(told)} plans: measured over predicted milliseconds of a step.",
        caption="The numbers are those of the table of plans. Below the line a plan is faster than predicted.",
    )
    data = {"plans": [one.name for one in told], "predicted_ms": predicted, "measured_ms": measured}
    return [Section("Predicted against measured", picture, Data("against", data))]


def _splits(experiment: Experiment) -> list[Block]:
    names = _numbered(experiment.plans)
    slowest = [max(one.ranks, key=lambda rank: sum(rank.split_ms.values())) for one in experiment.plans]
    split = {name: [rank.split_ms.get(phase, 0.0) for rank in slowest] for phase, name in PHASE_NAMES.items()}
    blocks: list[Block] = [
        Picture(
            figures.stacked_bars(
                split,
                names,
                what="measured, ms a step",
                marks=[one.step_ms for one in experiment.plans],
                mark="step left alone",
            ),
            alt="Bars of the measured step of each plan, by phase.",
            caption="Measured, on the rank with the longest sum: the median of each phase over steps that were split. "
            "What a rank waits for others is in the phase in which it waits.",
        ),
        Data("split", split),
    ]
    if all(one.plan.predicted is not None for one in experiment.plans):
        parts: dict[str, list[float]] = {name: [] for name in (*TERM_NAMES.values(), FIXED)}
        for one in experiment.plans:
            costs = cost_by_rank(one.plan)
            at = max(range(len(costs)), key=costs.__getitem__)
            for name, values in terms_by_rank(one.plan).items():
                parts[name].append(values[at])
        blocks.append(
            Picture(
                figures.stacked_bars(parts, names, what="predicted, ms a step"),
                alt="Bars of the predicted step of each plan, by term.",
                caption="Predicted, by TorchRec's terms, on the rank that is predicted to be the slowest.",
            )
        )
        blocks.append(Data("terms", parts))
    return blocks


def _heat_maps(experiment: Experiment) -> list[Block]:
    matrices = experiment_matrices(experiment)
    names = _numbered(experiment.plans)
    columns = [str(rank) for rank in range(experiment.settings.ranks)]
    shown = {
        "measured_ms": (
            "measured, ms",
            "Measured milliseconds of a step. Ranks that wait for each other differ little.",
        ),
        "predicted_ms": ("predicted, ms", "Predicted milliseconds: before the ranks wait for each other."),
        "peak_mib": ("peak, MiB", "Measured peak memory."),
        "predicted_mib": ("predicted, MiB", "Predicted memory."),
    }
    blocks: list[Block] = [Data("heat-maps", {"plans": [one.name for one in experiment.plans], **matrices})]
    for key, (what, caption) in shown.items():
        values = [[math.nan if value is None else value for value in row] for row in matrices[key]]
        if any(math.isfinite(value) for row in values for value in row):
            figure = figures.heat_map(values, names, columns, what=what, across="rank", down="")
            blocks.append(Picture(figure, alt=f"Heat map by plan and rank: {what}.", caption=caption, kind="png"))
    return blocks


def _traffic(experiment: Experiment) -> list[Block]:
    kinds = sorted({kind for one in experiment.plans for rank in one.ranks for kind in rank.traffic})
    rows: list[Sequence[Cell]] = []
    for one in experiment.plans:
        most = max(one.ranks, key=lambda rank: sum(each["sent_bytes"] for each in rank.traffic.values()))
        found = [most.traffic.get(kind) for kind in kinds]
        cells: list[Cell] = []
        for each in found:
            cells += [None, None] if each is None else [each["calls"], each["sent_bytes"]]
        rows.append((one.name, *cells, sum(_sent(one))))
    head = ["Plan", *(name for kind in kinds for name in (f"{kind}: calls", f"{kind}: bytes")), "All ranks, bytes"]
    text = (
        "Bytes that leave a rank in one step, of the rank that sends most, and of all ranks together; of an all-reduce "
        "those of a ring. They are counted from the sizes of the tensors, and so exact."
    )
    return [Table(head, rows), Paragraph(text)]


def _scaling(experiment: Experiment, others: Mapping[str, Mapping[int, float]]) -> list[Section]:
    fastest = min(one.step_ms for one in experiment.plans)
    lines: dict[str, Mapping[int, float]] = {}
    if experiment.scaling:
        lines["predicted, for the plan that the search finds"] = experiment.scaling
    lines["measured, fastest plan"] = {experiment.settings.ranks: fastest}
    lines |= others
    if len({ranks for line in lines.values() for ranks in line}) < 2:
        return []
    picture = Picture(
        figures.scaling_curve(lines),
        alt="Curve of the milliseconds of a step over the number of ranks.",
        caption=f"Milliseconds of a step with {experiment.settings.batch_size:,} samples on each rank.",
    )
    return [Section("Over the number of ranks", picture, Data("scaling", lines))]


def _numbered(plans: Sequence[PlanMeasured]) -> list[str]:
    return [f"{one.name}  {number}" for number, one in enumerate(plans, start=1)]


def _sent(one: PlanMeasured) -> list[int]:
    return [sum(each["sent_bytes"] for each in rank.traffic.values()) for rank in one.ranks]
