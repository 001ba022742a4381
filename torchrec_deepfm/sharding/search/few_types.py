"""Plans of few sharding types, where each type in a plan has its price.

Every sharding type in a plan has collectives of its own, whose latency a calibrated description knows (``group_ms``).
TorchRec's estimates are sums over shards and can't hold such a price: a search by them mixes types freely. Here the
search runs again with fewer types to use: each by itself, then the best of those with one more, and
so on, as long as that helps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torchrec.distributed.planner import ParameterConstraints

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES
from torchrec_deepfm.sharding.plan.plan import PlanFile

Constraints = Mapping[str, ParameterConstraints]


def with_fewer_types(
    found: PlanFile, names: Sequence[str], constraints: Constraints, plan: Callable[[Constraints], PlanFile]
) -> PlanFile:
    """Look for a plan that is faster because it has fewer sharding types; ``plan`` plans under narrowed constraints."""
    best = found
    used: tuple[str, ...] = ()
    while len(used) < len(SHARDING_TYPES):
        tried = []
        for kind in SHARDING_TYPES:
            if kind not in used:
                made = _try((*used, kind), names, constraints, plan)
                tried += [((*used, kind), made)] if made is not None else []
        if not tried:
            break
        kinds, made = min(tried, key=lambda pair: _cost(pair[1]))
        if used and _cost(made) >= _cost(best):
            break
        used = kinds
        best = min(best, made, key=_cost)
    return best


def _try(
    kinds: tuple[str, ...], names: Sequence[str], constraints: Constraints, plan: Callable[[Constraints], PlanFile]
) -> PlanFile | None:
    narrowed = {}
    for name in names:
        given = constraints.get(name, ParameterConstraints())
        allowed = [kind for kind in given.sharding_types or SHARDING_TYPES if kind in kinds]
        if not allowed:
            return None
        narrowed[name] = replace(given, sharding_types=allowed)
    try:
        return plan(narrowed)
    except UserError:  # these types alone don't fit
        return None


def _cost(plan: PlanFile) -> float:
    assert plan.predicted is not None
    return plan.predicted.slowest_ms(plan.objective)
