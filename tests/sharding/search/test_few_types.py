"""A price on every sharding type in a plan: the search finds plans of fewer types."""

from dataclasses import replace

import pytest

from tests.support.plans.experiments import cpu
from torchrec_deepfm.sharding.inputs.constraints import parse_constraints
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.search.plan_tables import plan_tables

TABLES = tuple(
    Table(name=f"t{number}", num_embeddings=rows, embedding_dim=32, pooling_factor=pooling)
    for number, (rows, pooling) in enumerate([(6000, 1.0), (4000, 10.0), (2000, 4.0), (300, 20.0), (40, 1.0)])
)


def planned(group_ms: float, *rules: str) -> PlanFile:
    hardware = replace(cpu(2), extra={"group_ms": group_ms})
    constraints = parse_constraints(rules, TABLES, local_world_size=2)
    return plan_tables(TABLES, hardware, 2, batch_size=1024, constraints=constraints)


def kinds(plan: PlanFile) -> set[str]:
    return {table.sharding_type for table in plan.tables}


def cost(plan: PlanFile) -> float:
    assert plan.predicted is not None
    return plan.predicted.critical_path_ms


def test_a_high_price_leaves_one_type_and_the_best_one() -> None:
    assert len(kinds(planned(0.0))) > 1
    found = planned(100.0)
    assert len(kinds(found)) == 1
    # No type by itself, as the same search plans it, is better.
    assert cost(found) == pytest.approx(min(cost(planned(100.0, f"*={kind}")) for kind in SHARDING_TYPES))


def test_constraints_hold() -> None:
    found = planned(100.0, "t0=row_wise")
    assert {table.name: table.sharding_type for table in found.tables}["t0"] == "row_wise"


def test_a_price_never_makes_the_choice_worse() -> None:
    """The plan found without a price, priced afterwards, is not better than the one found with it."""
    for price in (0.05, 0.5):
        assert cost(planned(price)) <= cost(planned(0.0)) + price * len(kinds(planned(0.0))) + 1e-9
