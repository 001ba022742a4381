"""Fits a hardware description to measured steps, so that the next prediction is for that machine.

For given shards every term of TorchRec's estimators is bytes divided by one of the description's bandwidths, or a sum
of such quotients. So the cost of a rank is linear in the reciprocals of the bandwidths and in the fixed costs of
``hardware.EXTRA``, and how many bytes each bandwidth divides comes out of ``predict_plan`` itself, when all other
bandwidths are as good as endless. What is measured is the slowest rank. Which one that is depends on the costs, so
these two steps alternate until nothing changes:

1. Of each plan, take the rank that costs most under the present description.
2. Fit the reciprocals and the fixed costs to the measured milliseconds of these ranks by non-negative least squares,
   with relative errors, so that slow plans do not drown fast ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.results import Experiment, PlanMeasured
from torchrec_deepfm.sharding.estimate import predict_plan, with_prediction
from torchrec_deepfm.sharding.inputs.hardware import BANDWIDTHS, EXTRA, FixedCost, Hardware

_ONE: Final = 1e9  # bytes per second: the unit in which terms are taken apart
_ENDLESS: Final = 1e30
_ROUNDS: Final = 100
# A bandwidth that costs next to nothing in the best fit: only that it is large is known.
_LARGEST: Final = 1e15

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted description.

    Attributes:
        hardware: the description.
        unseen: what no plan depends on, and so is what it was before.
        unlimited: bandwidths that cost nothing in the best fit; they are set to a very large number.
        inseparable: lines that name figures of which only a sum is known, since no plan changes one without the others.
        error: mean of |predicted - measured| / measured, over the plans that it was fitted to.
    """

    hardware: Hardware
    unseen: tuple[str, ...]
    unlimited: tuple[str, ...]
    inseparable: tuple[str, ...]
    error: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A plan's step, and what each of its ranks does in it.

    Attributes:
        amounts: [ranks, terms], milliseconds at one GB/s of each of ``BANDWIDTHS``, then how often each cost of
            ``EXTRA`` is paid.
        step_ms: what was measured.
    """

    amounts: Matrix
    step_ms: float


def calibrate(experiments: Sequence[Experiment], name: str) -> Calibration:
    """Fit a description to experiments of one kind of host, with the same number of ranks on each.

    UserError: there are fewer plans than figures to find, or the experiments are of different hosts.
    """
    if not experiments:
        raise UserError("no experiment given", remedy="name folders that experiment wrote")
    first = experiments[0]
    for other in experiments[1:]:
        for key, mine, theirs in (
            ("ranks on a host", first.settings.local_ranks, other.settings.local_ranks),
            ("device", first.settings.device, other.settings.device),
        ):
            if mine != theirs:
                raise UserError(
                    f"the experiments differ in {key} ({mine}, {theirs})", remedy="calibrate each kind by itself"
                )
    measurements = [
        Measurement(amounts=amounts(one, experiment), step_ms=one.step_ms)
        for experiment in experiments
        for one in experiment.plans
    ]
    where = f"{sum(len(one.plans) for one in experiments)} plans measured on {first.settings.ranks} ranks"
    return fit_hardware(
        measurements, first.hardware, name=name, source=f"calibrate: fitted to {where}, {first.made_at}"
    )


def fit_hardware(measurements: Sequence[Measurement], base: Hardware, *, name: str, source: str) -> Calibration:
    """Fit bandwidths and fixed costs to measurements; what they do not depend on keeps the value of ``base``."""
    names = [*BANDWIDTHS, *EXTRA]
    seen = np.flatnonzero(np.concatenate([one.amounts for one in measurements]).any(axis=0))
    if len(measurements) < len(seen):
        wanted = ", ".join(names[column] for column in seen)
        raise UserError(
            f"{len(measurements)} plan(s) measured, but {len(seen)} figures to find ({wanted})",
            remedy=f"run an experiment with at least {len(seen)} plans",
        )
    target = np.array([one.step_ms for one in measurements])
    costs = np.ones(len(seen))
    best, least = costs, np.inf
    for _ in range(_ROUNDS):
        slowest = np.stack([one.amounts[np.argmax(one.amounts[:, seen] @ costs)][seen] for one in measurements])
        scale = slowest.max(axis=0)
        scale[scale == 0] = 1.0
        fitted, _ = nnls(slowest / scale / target[:, None], np.ones(len(target)))
        new = fitted / scale
        error = float(np.mean(np.abs(_slowest(measurements, seen, new) / target - 1.0)))
        if error < least:
            best, least = new, error
        if np.allclose(new, costs, rtol=1e-9, atol=0.0):
            break
        costs = new
    found = {names[column]: float(cost) for column, cost in zip(seen, best, strict=True)}
    unlimited = tuple(key for key in BANDWIDTHS if key in found and found[key] * _LARGEST < _ONE)
    bandwidths: dict[str, float] = {
        key: min(_ONE / found[key], _LARGEST) if found[key] > 0 else _LARGEST for key in found if key in BANDWIDTHS
    }
    extra: dict[FixedCost, float] = {**base.extra, **{key: found[key] for key in EXTRA if key in found}}
    hardware = replace(_with(base, bandwidths, extra), name=name, source=source)
    unseen = tuple(key for key in names if key not in found)
    slowest = np.stack([one.amounts[np.argmax(one.amounts[:, seen] @ best)][seen] for one in measurements])
    return Calibration(
        hardware=hardware,
        unseen=unseen,
        unlimited=unlimited,
        inseparable=_inseparable(slowest / target[:, None], [names[column] for column in seen], least),
        error=least,
    )


def _inseparable(shares: Matrix, names: Sequence[str], error: float) -> tuple[str, ...]:
    """Find figures that others could stand in for.

    A figure can't be separated where its share of the plans' steps is, up to the error of the fit (at least 10%), a sum
    of multiples of the others' shares. ``shares`` [plans, figures] is a figure's part of each plan's step, up to a
    factor per figure.
    """
    norms = np.linalg.norm(shares, axis=0)
    columns = shares / np.where(norms > 0, norms, 1.0)
    groups: dict[frozenset[str], float] = {}
    for at, name in enumerate(names):
        others = np.delete(columns, at, axis=1)
        factors = np.linalg.lstsq(others, columns[:, at], rcond=None)[0]
        left = float(np.linalg.norm(others @ factors - columns[:, at]))
        if norms[at] > 0 and left < max(2 * error, 0.1):
            rest = [other for other in names if other != name]
            with_it = [other for other, factor in zip(rest, factors, strict=True) if abs(factor) > 0.3]
            group = frozenset((name, *with_it))
            groups[group] = min(groups.get(group, 1.0), left)
    return tuple(
        f"{', '.join(name for name in names if name in group)}: these plans can't separate them (except for {left:.0%} "
        "they change together), so one may hold what belongs to another; measure plans of more types (--rules)"
        for group, left in sorted(groups.items(), key=lambda each: each[1])
    )


def _with(hardware: Hardware, bandwidths: Mapping[str, float], extra: Mapping[FixedCost, float]) -> Hardware:
    return replace(hardware, **bandwidths, extra=dict(extra))  # type: ignore[arg-type]


def _slowest(measurements: Sequence[Measurement], seen: npt.NDArray[np.intp], costs: Matrix) -> Matrix:
    return np.array([np.max(one.amounts[:, seen] @ costs) for one in measurements])


def amounts(one: PlanMeasured, experiment: Experiment) -> Matrix:
    """Split the predicted cost of each rank into what it depends on: [ranks, terms], see ``Measurement``."""
    base, settings = experiment.hardware, experiment.settings
    endless = dict.fromkeys(BANDWIDTHS, _ENDLESS)
    alone = [_with(base, {**endless, key: _ONE}, {}) for key in BANDWIDTHS]
    alone += [_with(base, endless, {key: 1.0}) for key in EXTRA]
    found = []
    for hardware in alone:
        predicted = predict_plan(one.plan, settings.tables, hardware, settings.ranks, settings.batch_size)
        # An unlimited bandwidth costs next to nothing, not nothing.
        found.append([cost.total_ms if cost.total_ms > 1e-15 else 0.0 for cost in predicted.per_rank])
    return np.array(found).T


def recalculate(experiment: Experiment, hardware: Hardware) -> Experiment:
    """Predict the plans of an experiment again for a description; its scaling curve is left out."""
    settings = experiment.settings
    plans = tuple(
        replace(
            one,
            plan=with_prediction(
                one.plan,
                settings.tables,
                hardware,
                settings.ranks,
                settings.batch_size,
                optimizer=settings.optimizer,
            ),
        )
        for one in experiment.plans
    )
    return replace(experiment, plans=plans, hardware=hardware, scaling={})
