"""Plan files for any model of TorchRec: several collections, pooled or not, embedding towers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.launch.processes import local_world_size, pod_size
from torchrec_deepfm.sharding.plan.io import load_plan, save_plan
from torchrec_deepfm.sharding.plan.plan import PlanFile, PlannedTable
from torchrec_deepfm.sharding.plan.torchrec_plan import planned_tables, to_module_plan
from torchrec_deepfm.sharding.plan.validate import check_fits, check_sound

Sharders = Sequence[ModuleSharder[nn.Module]]


def load_sharding_plan(
    path: str | Path, module: nn.Module, *, device: torch.device, sharders: Sharders | None = None
) -> ShardingPlan:
    """Read a plan file for a model of one's own, on each rank of the process group.

        plan = load_sharding_plan("plan.json", model, device=device)
        model = DistributedModelParallel(model, device=device, plan=plan)

    A table belongs to the collection that the file names (``module``), otherwise to the one that has a table of its
    name.

    Args:
        path: The file: of the command ``plan``, of a run, or of ``save_sharding_plan``.
        module: The model, its tables on ``meta`` or not.
        device: This rank's device.
        sharders: As ``DistributedModelParallel`` gets them. Default: TorchRec's.

    Returns:
        The plan.

    Raises:
        UserError: The file is not a sound plan, or does not fit the model's tables, the ranks or the device.
    """
    plan, where = load_plan(Path(path)), str(path)
    there = sharded_tables(module, sharders)
    by_module: dict[str, list[PlannedTable]] = {name: [] for name in there}
    for table in plan.tables:
        homes = [name for name in there if table.name in there[name] and table.module in ("", name)]
        if not homes:
            raise UserError(
                f"table {table.label} does not exist here", where=where, remedy="make a plan for this model"
            )
        if len(homes) > 1:
            raise UserError(
                f"table {table.name} is in {' and '.join(homes)}, and the plan does not say which",
                where=where,
                remedy=f'add "module": "{homes[0]}" to it, or rename one',
            )
        by_module[homes[0]].append(table)
    for name, tables in by_module.items():
        check_fits(
            replace(plan, tables=tuple(tables)),
            there[name].values(),
            dist.get_world_size(),
            local_world_size=local_world_size(),
            pod_size=pod_size(),
            compute_device=device.type,
            where=where,
        )
    # Where no table depends on hosts, the plan may run on hosts of another size.
    local = local_world_size()
    return ShardingPlan(
        plan={name: to_module_plan(tables, local, device) for name, tables in by_module.items() if tables}
    )


def save_sharding_plan(
    plan: ShardingPlan,
    path: str | Path,
    module: nn.Module,
    *,
    world_size: int,
    local_world_size: int,
    pod_size: int = 1,
    batch_size: int | None = None,
    search: str = "torchrec",
    sharders: Sharders | None = None,
) -> None:
    """Write TorchRec's plan of a model as a file for ``load_sharding_plan``, before the model is sharded by it.

    Args:
        plan: The plan. Sharding an embedding tower changes it.
        path: The file; an existing one is replaced.
        module: The unsharded model.
        world_size: Ranks.
        local_world_size: Ranks per host.
        pod_size: Hosts per NVLink domain.
        batch_size: Samples per rank and step, where known.
        search: How it was found.
        sharders: As for ``load_sharding_plan``.

    Raises:
        UserError: The file can't be written, or the plan has kernels that a file does not hold.
    """
    there = {path: tables.values() for path, tables in sharded_tables(module, sharders).items()}
    made = PlanFile(
        world_size=world_size,
        local_world_size=local_world_size,
        pod_size=pod_size,
        batch_size=batch_size,
        search=search,
        tables=planned_tables(plan, there, world_size),
    )
    check_sound(made, str(path))
    save_plan(made, Path(path))


@dataclass(frozen=True)
class ShardedTable:
    """A table of a model, and its size."""

    name: str
    num_embeddings: int
    embedding_dim: int


def sharded_tables(module: nn.Module, sharders: Sharders | None) -> Mapping[str, Mapping[str, ShardedTable]]:
    """Return the tables of a model that sharders shard, by path of their module."""
    by_type = {sharder.module_type: sharder for sharder in sharders or get_default_sharders()}
    found: dict[str, dict[str, ShardedTable]] = {}
    queue = [("", module)]
    while queue:
        path, child = queue.pop(0)
        if (sharder := by_type.get(type(child))) is not None:
            sizes = {name: tuple(each.shape) for name, each in sharder.shardable_parameters(child).items()}
            found[path] = {name: ShardedTable(name, *shape) for name, shape in sizes.items()}
        else:
            queue += [(f"{path}.{name}".removeprefix("."), each) for name, each in child.named_children()]
    return found
