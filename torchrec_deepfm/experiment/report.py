"""The report of an experiment: one HTML file, beside the plans that it links to. No torch.

What a picture shows is in the page as data too (``page.Data``).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from torchrec_deepfm.experiment.results import PLANS, Experiment, PlanMeasured
from torchrec_deepfm.report import plan_figures
from torchrec_deepfm.report.page import (
    Block,
    Cell,
    Data,
    Link,
    PageTable,
    Paragraph,
    Picture,
    Section,
    Terms,
    write_page,
)
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.plan.report import FIXED, TERM_NAMES, cost_by_rank, terms_by_rank

MIB = 2**20
PHASE_NAMES = {
    "input_dist": "input dist",
    "lookup": "look-up",
    "output_dist": "output dist",
    "dense": "dense, forward",
    "backward_dense": "dense, backward",
    "backward_output_dist": "output dist, backward",
    "backward_lookup": "look-up, backward, and fused optimizer",
    "backward_all_reduce": "all-reduce, remaining wait",
    "optimizer": "optimizer, not fused",
}


def experiment_matrices(experiment: Experiment) -> dict[str, list[list[float | None]]]:
    """Return the heat maps of an experiment by name: a row per plan, a number per rank, None where there is none."""
    ranks = experiment.settings.ranks
    nothing: list[float | None] = [None] * ranks
    found: dict[str, list[list[float | None]]] = {
        key: [] for key in ("measured_ms", "predicted_ms", "peak_mib", "table_mib", "predicted_mib")
    }
    for one in experiment.plans:
        predicted = one.plan.predicted
        found["measured_ms"].append([median(rank.step_ms) for rank in one.ranks])
        found["predicted_ms"].append(nothing if predicted is None else [cost.total_ms for cost in predicted.per_rank])
        found["peak_mib"].append([None if r.peak_bytes is None else r.peak_bytes / MIB for r in one.ranks])
        found["table_mib"].append([rank.table_bytes / MIB for rank in one.ranks])
        found["predicted_mib"].append(
            nothing if predicted is None else [max(cost.hbm_bytes, cost.ddr_bytes) / MIB for cost in predicted.per_rank]
        )
    return found


def write_experiment_report(experiment: Experiment, path: Path) -> None:
    """Write the report beside the ``plans`` folder."""
    settings = experiment.settings
    sections = [
        Section("Summary", *_summary(experiment)),
        Section("Plans", *_plans(experiment)),
        *_against(experiment),
        Section("Where the time goes", *_splits(experiment)),
        Section("Rank by rank", *_heat_maps(experiment)),
        Section("Bytes exchanged", *_traffic(experiment)),
        *_scaling(experiment),
    ]
    widths = sorted({table.embedding_dim for table in settings.tables})
    subtitle = (
        f"{len(experiment.plans)} plans of {len(settings.tables)} tables, {'/'.join(map(str, widths))} columns wide, "
        f"on {settings.ranks} ranks ({settings.device}), {settings.batch_size:,} samples per rank; {experiment.made_at}"
    )
    write_page(path, "Sharding plans: predicted and measured", sections, subtitle=subtitle)


def _summary(experiment: Experiment) -> list[Block]:
    settings, found = experiment.settings, experiment.agreement()
    fastest = min(experiment.plans, key=lambda one: one.step_ms)
    facts: dict[str, Cell] = {"Fastest plan": f"{fastest.name}, {fastest.step_ms:.2f} ms per step"}
    if found is not None:
        facts["Picked by the prediction"] = found.picked
        facts["Regret of that pick"] = f"{found.regret:.1%} slower than the fastest"
        facts["Rank correlation (Spearman)"] = found.spearman
    facts |= {
        "Hardware of the predictions": experiment.hardware.name,
        "Steps": f"{settings.turns} turns of {settings.steps} steps each, the plans taking turns",
        "Optimizer of the tables": settings.optimizer,
        "Hidden layers": ", ".join(map(str, settings.over_arch_layer_sizes)) or "none",
        "Ids": settings.ids,
        "Made with": ", ".join(f"{name} {version}" for name, version in experiment.made_with.items()),
    }
    blocks: list[Block] = [Terms(facts)]
    if experiment.left_out:
        blocks.append(PageTable(("Left out", "Why"), list(experiment.left_out.items())))
    return blocks


def _plans(experiment: Experiment) -> list[Block]:
    rows: list[Sequence[Cell]] = []
    fastest = min(experiment.plans, key=lambda one: one.step_ms)
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
                "the fastest" if one is fastest else "within noise" if one.within_noise_of(fastest) else "slower",
            )
        )
    milliseconds = ("Predicted, ms", "Measured, ms", "Fastest turn, ms", "Slowest turn, ms")
    head = ("No.", "Plan", "Tables by type", *milliseconds, "Sent, MiB", "Peak, MiB", "Beside the fastest")
    formats = dict.fromkeys(head[3:8], ",.2f") | {"Peak, MiB": ",.0f"}
    text = (
        "Times are per step of the slowest rank; measured is the median over the turns. Within noise: the ranges of "
        "its turns and of the fastest plan's overlap. Sent and peak are of the rank with the most: what leaves it in a "
        "step, and its peak memory above that of the process before the model was built."
    )
    return [PageTable(head, rows, formats=formats), Paragraph(text)]


def types(plan: PlanFile) -> str:
    """Count the tables of each sharding type, most frequent first."""
    kinds = [table.sharding_type for table in plan.tables]
    counted = sorted({(kinds.count(kind), kind) for kind in kinds}, key=lambda pair: (-pair[0], pair[1]))
    return ", ".join(f"{count}\N{NO-BREAK SPACE}{kind}" for count, kind in counted)


def _against(experiment: Experiment) -> list[Section]:
    plans = [one for one in experiment.plans if one.predicted_ms]
    if not plans or len(plans) < len(experiment.plans):
        return []
    predicted, measured = [one.predicted_ms or 0.0 for one in plans], [one.step_ms for one in plans]
    spread = [(min(one.turns_ms), max(one.turns_ms)) for one in plans]
    picture = Picture(
        plan_figures.scatter(predicted, measured, spread),
        alt=f"Scatter of {len(plans)} plans: measured over predicted milliseconds of a step.",
        caption="The numbers are those of the table of plans. Below the line a plan is faster than predicted.",
    )
    data = {"plans": [one.name for one in plans], "predicted_ms": predicted, "measured_ms": measured}
    return [Section("Predicted against measured", picture, Data("against", data))]


def _splits(experiment: Experiment) -> list[Block]:
    names = _numbered(experiment.plans)
    slowest = [max(one.ranks, key=lambda rank: sum(rank.split_ms.values())) for one in experiment.plans]
    split = {name: [rank.split_ms.get(phase, 0.0) for rank in slowest] for phase, name in PHASE_NAMES.items()}
    blocks: list[Block] = [
        Picture(
            plan_figures.stacked_bars(
                split,
                names,
                what="measured, ms per step",
                marks=[one.step_ms for one in experiment.plans],
                mark="step left alone",
            ),
            alt="Bars of the measured step of each plan, by phase.",
            caption="Measured, on the rank with the longest sum: the median of each phase over steps that were split. "
            "Time spent waiting for other ranks counts in the phase in which it is spent.",
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
                plan_figures.stacked_bars(parts, names, what="predicted, ms per step"),
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
            figure = plan_figures.heat_map(values, names, columns, what=what, across="rank", down="")
            blocks.append(Picture(figure, alt=f"Heat map by plan and rank: {what}.", caption=caption, kind="png"))
    return blocks


def _traffic(experiment: Experiment) -> list[Block]:
    kinds = sorted({kind for one in experiment.plans for rank in one.ranks for kind in rank.traffic})
    rows: list[Sequence[Cell]] = []
    for one in experiment.plans:
        most = max(one.ranks, key=lambda rank: sum(each.sent_bytes for each in rank.traffic.values()))
        found = [most.traffic.get(kind) for kind in kinds]
        cells: list[Cell] = []
        for each in found:
            cells += [None, None] if each is None else [each.calls, each.sent_bytes]
        rows.append((one.name, *cells, sum(_sent(one))))
    head = ["Plan", *(name for kind in kinds for name in (f"{kind}: calls", f"{kind}: bytes")), "All ranks, bytes"]
    text = (
        "Bytes that leave a rank in one step, of the rank that sends most, and of all ranks together; of an all-reduce "
        "those of a ring. They are counted from the sizes of the tensors, and so exact."
    )
    return [PageTable(head, rows), Paragraph(text)]


def _scaling(experiment: Experiment) -> list[Section]:
    fastest = min(one.step_ms for one in experiment.plans)
    lines: dict[str, Mapping[int, float]] = {}
    if experiment.scaling:
        lines["predicted, for the plan that the search finds"] = experiment.scaling
    lines["measured, fastest plan"] = {experiment.settings.ranks: fastest}
    if len({ranks for line in lines.values() for ranks in line}) < 2:
        return []
    picture = Picture(
        plan_figures.scaling_curve(lines),
        alt="Curve of the milliseconds of a step over the number of ranks.",
        caption=f"Milliseconds of a step with {experiment.settings.batch_size:,} samples on each rank.",
    )
    return [Section("Over the number of ranks", picture, Data("scaling", lines))]


def _numbered(plans: Sequence[PlanMeasured]) -> list[str]:
    return [f"{one.name}  {number}" for number, one in enumerate(plans, start=1)]


def _sent(one: PlanMeasured) -> list[int]:
    return [sum(each.sent_bytes for each in rank.traffic.values()) for rank in one.ranks]
