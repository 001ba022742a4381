"""Measures plans on real ranks: each gets a turn, then each another one, so that what drifts meets all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from torchrec_deepfm.distributed.process_group import gather
from torchrec_deepfm.experiment.comm_bytes import CollectiveCounter
from torchrec_deepfm.experiment.memory import PeakMemory
from torchrec_deepfm.experiment.noise import release_memory, without_garbage_collection
from torchrec_deepfm.experiment.results import CollectiveBytes, PlanMeasured, RankMeasured
from torchrec_deepfm.experiment.step_timer import PHASES, UNTIMED_STEPS, split_step, step_seconds
from torchrec_deepfm.experiment.workload import BatchOptions, batches, build_workload, table_bytes
from torchrec_deepfm.sharding.inputs.sharding_types import FusedOptimizer
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile

WARM_UP = 3  # steps: DistributedDataParallel rebuilds its buckets after the first
BATCHES = 4  # drawn once, used in turn


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How often and on what the plans run; half as many more ``steps`` of a turn are split into phases."""

    tables: tuple[Table, ...]
    batch: BatchOptions
    steps: int = 10
    turns: int = 5
    optimizer: FusedOptimizer = "rowwise_adagrad"
    over_arch_layer_sizes: tuple[int, ...] = (64,)


@dataclass(kw_only=True)
class _PlanRecord:
    """What this rank has measured of a plan so far."""

    step_ms: list[float] = field(default_factory=list)
    splits: list[dict[str, float]] = field(default_factory=list)
    traffic: dict[str, CollectiveBytes] = field(default_factory=dict)
    table_bytes: int = 0
    peaks: list[int | None] = field(default_factory=list)

    def result(self) -> RankMeasured:
        peaks = [peak for peak in self.peaks if peak is not None]
        return RankMeasured(
            rank=dist.get_rank(),
            step_ms=tuple(self.step_ms),
            split_ms={phase: 1e3 * median(split[phase] for split in self.splits) for phase in PHASES},
            traffic=self.traffic,
            table_bytes=self.table_bytes,
            peak_bytes=int(median(peaks)) if peaks else None,
        )


def measure_plans(
    plans: Sequence[tuple[str, PlanFile]],
    options: RunnerOptions,
    device: torch.device,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[PlanMeasured, ...]:
    """Measure plans over the current process group; a collective.

    A model is built for each turn and dropped after it, so that only one plan's memory is in use at a time.

    Args:
        plans: by name; each fits the tables and the ranks.
        options: how often and on what.
        device: this rank's device.
        report: takes a line of progress, on rank 0.

    Returns:
        What was measured on all ranks, in the order of the plans; the same on every rank.
    """
    own = batches(options.tables, options.batch, dist.get_rank(), BATCHES, device)
    records = [_PlanRecord() for _ in plans]
    for turn in range(options.turns):
        # Every other time backwards: what comes after a large plan is another one then.
        order = range(len(plans)) if turn % 2 == 0 else range(len(plans) - 1, -1, -1)
        for number in order:
            _turn(plans[number][1], records[number], options, own, device, first=turn == 0)
        if dist.get_rank() == 0:
            report(f"turn {turn + 1} of {options.turns}: {len(plans)} plans measured")
    gathered = gather([one.result() for one in records])
    return tuple(
        PlanMeasured(name=name, plan=plan, ranks=tuple(of_rank[number] for of_rank in gathered))
        for number, (name, plan) in enumerate(plans)
    )


def _turn(
    plan: PlanFile,
    record: _PlanRecord,
    options: RunnerOptions,
    own: Sequence[Any],
    device: torch.device,
    *,
    first: bool,
) -> None:
    release_memory()
    memory = PeakMemory(device)
    dist.barrier()
    trained = build_workload(
        options.tables,
        plan,
        device,
        optimizer=options.optimizer,
        over_arch_layer_sizes=options.over_arch_layer_sizes,
    )
    for step in range(WARM_UP):
        trained.step(own[step % len(own)])
    timed = [own[step % len(own)] for step in range(options.steps + UNTIMED_STEPS)]
    with without_garbage_collection():
        record.step_ms.append(1e3 * step_seconds(trained, timed))
    record.peaks.append(memory.bytes())
    record.splits += [split_step(trained, own[step % len(own)]) for step in range((options.steps + 1) // 2)]
    if first:
        with CollectiveCounter() as traffic:
            trained.step(own[0])
        record.traffic = traffic.by_kind()
        record.table_bytes = table_bytes(trained)
