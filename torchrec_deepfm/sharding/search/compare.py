"""Plans of the same tables for several kinds of hardware and numbers of ranks, side by side."""

from collections.abc import Callable, Sequence

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.constraints import parse_constraints
from torchrec_deepfm.sharding.inputs.hardware import Hardware
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import Compared
from torchrec_deepfm.sharding.search.plan_tables import Planning


def compare(
    tables: Sequence[Table],
    kinds: Sequence[Hardware],
    counts: Sequence[int],
    *,
    batch_size: int,
    rules: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> list[Compared]:
    """Plan the tables for every kind of hardware at every number of ranks, in this order.

    Where ranks do not fill their hosts, or tables do not fit, the result says so; if there is no plan at all, a
    UserError gives the first reason. ``rules`` are constraints as for ``parse_constraints``; ``say`` gets a line before
    each plan.
    """
    found = []
    for hardware in kinds:
        for ranks in counts:
            say(f"planning for {ranks:,} ranks of {hardware.name}")
            try:
                constraints = parse_constraints(
                    rules,
                    tables,
                    compute_device=hardware.compute_device,
                    world_size=ranks,
                    local_world_size=hardware.local_world_size(ranks) * hardware.pod_size_of(ranks),
                )
                plan = Planning(tables, hardware, ranks, batch_size, constraints=constraints).checked_plan("balanced")
                found.append(Compared(hardware=hardware, ranks=ranks, plan=plan))
            except UserError as error:
                found.append(Compared(hardware=hardware, ranks=ranks, why=str(error)))
    if all(each.plan is None for each in found):
        raise UserError(f"no plan for any of these: {found[0].why}")
    return found


def comparison_text(found: Sequence[Compared]) -> str:
    """Lay out a comparison as a table for a terminal; the columns of prices only where there are some."""
    priced = any(each.hardware.dollars_per_hour is not None for each in found)
    wide = max(len("hardware"), *(len(each.hardware.name) for each in found))
    price = f"{'$/hour':>10}{'$/1e9 samples':>15}" if priced else ""
    lines = [f"{'hardware':<{wide}}{'ranks':>7}{'ms per step':>13}{'samples/s':>15}{'balance':>9}{price}"]
    for each in found:
        head = f"{each.hardware.name:<{wide}}{each.ranks:>7,}"
        if each.plan is None or each.plan.predicted is None or each.samples_per_second is None:
            lines.append(f"{head}  no plan: {each.why or 'the tables cost nothing here'}")
            continue
        predicted = each.plan.predicted
        line = f"{head}{predicted.critical_path_ms:>13.2f}{each.samples_per_second:>15,.0f}"
        line += f"{predicted.mean_ms / predicted.critical_path_ms:>9.0%}"
        if priced:
            hourly = None if each.hardware.dollars_per_hour is None else each.hardware.dollars_per_hour * each.ranks
            line += f"{'-' if hourly is None else f'{hourly:,.2f}':>10}"
            line += f"{'-' if each.dollars is None else f'{each.dollars:,.2f}':>15}"
        lines.append(line)
    return "\n".join(lines)
