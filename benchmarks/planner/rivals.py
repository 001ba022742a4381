"""TorchRec's planner, its proposers at every width, and a loop that a user would tune, each with its CPU time."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.proposers import (
    DynamicProgrammingProposer,
    GreedyProposer,
    GridSearchProposer,
    UniformProposer,
)
from torchrec.distributed.planner.types import Enumerator, PlannerError, Proposer, ShardingOption

from benchmarks.planner.cases import Case
from benchmarks.planner.score import score
from torchrec_deepfm.sharding.estimate import table_module
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES
from torchrec_deepfm.sharding.runtime.sharder import AllTypesSharder
from torchrec_deepfm.sharding.search.plan_tables import Planning

PROPOSERS: Final[dict[str, Callable[[], list[Proposer]]]] = {
    "greedy": lambda: [GreedyProposer(), GreedyProposer(use_depth=False)],
    "uniform": lambda: [UniformProposer(), UniformProposer(use_depth=False)],
    "grid search": lambda: [GridSearchProposer()],
    "dynamic programming": lambda: [DynamicProgrammingProposer()],
}
WAYS: Final = (
    ("table_wise", None),
    ("row_wise", None),
    ("table_row_wise", None),
    ("column_wise", 8),
    ("column_wise", 16),
    ("column_wise", 32),
    ("column_wise", 64),
    ("grid_shard", 16),
    ("grid_shard", 32),
)
THRESHOLDS: Final = (1e3, 1e4, 1e5, 1e6)


class Clock:
    """CPU time that a rival has.

    Args:
        seconds: How much.
    """

    def __init__(self, seconds: float) -> None:
        self._limit, self._since = seconds, 0.0
        self.used = 0.0
        self.ran_out = False

    def start(self) -> None:
        """Count from here."""
        self._since = time.process_time()

    def stop(self) -> None:
        """Count until here."""
        self.used += time.process_time() - self._since

    def left(self) -> bool:
        """Whether there is time for more; remembers when there was none. Only while it runs."""
        self.ran_out |= self.used + time.process_time() - self._since > self._limit
        return not self.ran_out


class TimedProposer(Proposer):
    """A proposer of TorchRec's that ends with its rival's time.

    Args:
        proposer: The proposer.
        clock: The time.
    """

    def __init__(self, proposer: Proposer, clock: Clock) -> None:
        self._proposer, self._clock = proposer, clock

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take the options of all tables."""
        if self._clock.left():
            self._proposer.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        """Return the next proposal while there is time."""
        return self._proposer.propose() if self._clock.left() else None

    def feedback(self, *args: Any, **named: Any) -> None:
        """Pass on the outcome of a proposal."""
        self._proposer.feedback(*args, **named)


class EnumeratedOptions(Enumerator):
    """Gives TorchRec's planner options that were enumerated and estimated before.

    Args:
        options: Options of all tables, with their estimates.
    """

    def __init__(self, options: list[ShardingOption]) -> None:
        self._options = options

    def enumerate(self, *args: Any, **named: Any) -> list[ShardingOption]:
        """Return the options."""
        return self._options

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Leave the estimates as they are."""


class TorchRecs:
    """TorchRec's planner on a case; its options are enumerated once per width, on nobody's time.

    Args:
        case: The case.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._module = table_module(case.tables)
        self._options: dict[int | None, list[ShardingOption]] = {}

    def plan(
        self,
        clock: Clock,
        proposers: list[Proposer] | None = None,
        width: int | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> dict[str, float] | None:
        """Run the planner; None where it finds no plan.

        Args:
            clock: The time that it has.
            proposers: In the place of its own.
            width: Columns of a shard (``min_partition``) in tables that it divides.
            kinds: The only sharding type of each table. Default: all that TorchRec offers unasked.
        """
        case = self._case
        planner = Planning(case.tables, case.hardware, case.ranks, case.batch_size).torchrec_planner()
        options = [
            option
            for option in self._options.get(width) or self._enumerate(width)
            if (option.sharding_type == kinds[option.name] if kinds else option.sharding_type != "grid_shard")
        ]
        planner._enumerator = EnumeratedOptions(options)
        clock.start()
        planner._proposers = [TimedProposer(each, clock) for each in proposers or planner._proposers]
        try:
            planner.plan(self._module, [AllTypesSharder()])  # type: ignore[list-item]
        except (PlannerError, RuntimeError):
            return None
        finally:
            clock.stop()
        tables = {table.name: table for table in case.tables}
        placed = []
        for option in planner._best_plan or []:
            shards = [(int(shard.rank or 0), shard.size[0], shard.size[1]) for shard in option.shards]
            placed.append((tables[option.name], option.sharding_type, option.compute_kernel, shards))
        return score(placed, case)

    def _enumerate(self, width: int | None) -> list[ShardingOption]:
        case = self._case
        rules = {
            table.name: ParameterConstraints(
                sharding_types=list(SHARDING_TYPES),
                min_partition=width if width and table.embedding_dim % width == 0 else None,
            )
            for table in case.tables
        }
        planning = Planning(case.tables, case.hardware, case.ranks, case.batch_size, constraints=rules)
        planner = planning.torchrec_planner()
        self._options[width] = planner._enumerator.enumerate(self._module, [AllTypesSharder()])  # type: ignore[list-item]
        return self._options[width]


def tuned_loop(torchrecs: TorchRecs, case: Case, clock: Clock) -> list[dict[str, float]]:
    """The plans of a loop over thresholds and ways."""
    found = []
    for threshold, (kind, width) in itertools.product(THRESHOLDS, WAYS):
        kinds = {
            table.name: kind
            if table.num_embeddings > threshold and (width is None or table.embedding_dim % width == 0)
            else "data_parallel"
            for table in case.tables
        }
        plan = None if clock.ran_out else torchrecs.plan(clock, width=width, kinds=kinds)
        found += [] if plan is None else [plan]
    return found


def best_of_proposer(torchrecs: TorchRecs, clock: Clock, make: Callable[[], list[Proposer]]) -> list[dict[str, float]]:
    """The plans of a proposer at every ``min_partition``."""
    found = []
    for width in (None, 8, 16, 32, 64):
        plan = None if clock.ran_out else torchrecs.plan(clock, make(), width)
        found += [] if plan is None else [plan]
    return found
