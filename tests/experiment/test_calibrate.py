"""Calibration: planted bandwidths come out of measurements that they made, with noise on top."""

import functools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.experiments import cpu, experiment, plan
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.calibrate import BANDWIDTHS, Measurement, calibrate, fit, recalculate
from torchrec_deepfm.experiment.results import Experiment
from torchrec_deepfm.sharding.estimate import predict
from torchrec_deepfm.sharding.inputs.hardware import EXTRA, Hardware
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware, write_hardware
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile

TABLES = tuple(
    Table(name=f"t{number}", num_embeddings=rows, embedding_dim=16, pooling_factor=pooling)
    for number, (rows, pooling) in enumerate([(200, 1.0), (5_000, 20.0), (900, 3.0), (40, 1.0)])
)
KINDS = ("table_wise", "row_wise", "column_wise", "data_parallel")
PLANTED = replace(
    cpu(2),
    ddr_bandwidth=3e9,
    intra_host_bandwidth=5e7,
    inter_host_bandwidth=2e8,
    extra={"step_ms": 0.8, "shard_ms": 0.2, "group_ms": 0.3},
)


def plans() -> Iterator[tuple[str, PlanFile]]:
    for kind in KINDS:
        yield kind, plan(TABLES, [kind] * 4, 2)
    rng = random.Random(0)
    for number in range(16):
        kinds = [rng.choice(KINDS) for _ in TABLES]
        yield f"mix{number}", plan(TABLES, kinds, 2, [rng.randrange(2) for _ in TABLES])


@functools.cache
def measured(*, noise: float) -> Experiment:
    rng = random.Random(1)
    made = dict(plans())
    took = {
        name: predict(one, TABLES, PLANTED).critical_path_ms * rng.uniform(1 - noise, 1 + noise)
        for name, one in made.items()
    }
    return experiment(TABLES, made, took, cpu(2))


def relative_error(found: Hardware) -> dict[str, float]:
    errors = {
        key: abs(getattr(found, key) / getattr(PLANTED, key) - 1)
        for key in ("ddr_bandwidth", "intra_host_bandwidth", "inter_host_bandwidth")
    }
    return errors | {key: abs(found.extra[key] / PLANTED.extra[key] - 1) for key in EXTRA}


def test_planted_figures_come_out_exactly_without_noise() -> None:
    found = calibrate([measured(noise=0.0)], "mine")
    assert max(relative_error(found.hardware).values()) < 1e-4
    assert found.error == pytest.approx(0.0, abs=1e-6)


def test_planted_figures_come_out_of_noise() -> None:
    found = calibrate([measured(noise=0.02)], "mine")
    assert max(relative_error(found.hardware).values()) < 0.15
    assert found.error < 0.02


def test_what_no_plan_depends_on_stays() -> None:
    found = calibrate([measured(noise=0.0)], "mine")
    assert set(found.unseen) == {"hbm_bandwidth", "hbm_to_ddr_bandwidth"}
    assert found.hardware.hbm_bandwidth == cpu(2).hbm_bandwidth
    assert (found.hardware.name, found.hardware.ranks_per_host) == ("mine", 2)
    assert "20 plans measured on 2 ranks" in found.hardware.source


def test_the_slowest_rank_is_fitted_not_the_first() -> None:
    """By hand: two ranks whose costs cross over as the bandwidth changes; two figures, planted as 1/2 and 10."""
    column = [*BANDWIDTHS, *EXTRA].index
    rng = np.random.default_rng(0)
    measurements = []
    for _ in range(12):
        amounts = np.zeros((2, len(BANDWIDTHS) + len(EXTRA)))
        amounts[:, column("ddr_bandwidth")] = rng.uniform(1, 10, 2)
        amounts[:, column("step_ms")] = 1.0
        first, second = amounts[:, column("ddr_bandwidth")]
        measurements.append(Measurement(amounts=amounts, step_ms=max(first, second) / 2 + 10))
    found = fit(measurements, cpu(2), name="mine", source="test")
    assert found.hardware.ddr_bandwidth == pytest.approx(2e9)
    assert found.hardware.extra["step_ms"] == pytest.approx(10)


def test_a_bandwidth_that_costs_nothing_is_reported() -> None:
    column = [*BANDWIDTHS, *EXTRA].index
    measurements = []
    for amount in (1.0, 2.0, 3.0):
        amounts = np.zeros((1, len(BANDWIDTHS) + len(EXTRA)))
        amounts[:, [column("ddr_bandwidth"), column("step_ms")]] = [amount, 1.0]
        measurements.append(Measurement(amounts=amounts, step_ms=5.0 - amount))  # the more, the faster
    found = fit(measurements, cpu(1), name="mine", source="test")
    assert found.unlimited == ("ddr_bandwidth",)
    assert found.hardware.ddr_bandwidth == 1e15


def test_the_file_gives_the_same_predictions(tmp_path: Path) -> None:
    one = measured(noise=0.02)
    found = calibrate([one], "mine")
    write_hardware(found.hardware, tmp_path / "mine.toml")
    again = read_hardware(str(tmp_path / "mine.toml"))
    after = recalculate(one, again)
    for before, now in zip(one.plans, after.plans, strict=True):
        assert now.predicted_ms == predict(before.plan, TABLES, again).critical_path_ms
        assert now.step_ms == before.step_ms
    errors = [abs((plan.predicted_ms or 0.0) / plan.step_ms - 1) for plan in after.plans]
    assert sum(errors) / len(errors) == pytest.approx(found.error)


def test_too_few_plans() -> None:
    one = measured(noise=0.0)
    with pytest.raises(UserError, match=r"1 plan\(s\) measured, but 5 figures to find .* at least 5 plans"):
        calibrate([replace(one, plans=one.plans[:1])], "mine")
    with pytest.raises(UserError, match="no experiment given"):
        calibrate([], "mine")


def test_experiments_of_different_hosts() -> None:
    one = measured(noise=0.0)
    other = replace(one, settings=replace(one.settings, local_ranks=4))
    with pytest.raises(UserError, match=r"differ in ranks on a host \(2, 4\)"):
        calibrate([one, other], "mine")
