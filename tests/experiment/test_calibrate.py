"""Calibration: planted bandwidths come out of measurements that they made, with noise on top."""

import functools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchrec.distributed.planner import ParameterConstraints

from tests.support.plans.experiments import cpu, experiment, plan
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.calibrate import BANDWIDTHS, Measurement, calibrate, fit_hardware, recalculate
from torchrec_deepfm.experiment.results import Experiment
from torchrec_deepfm.sharding.estimate import predict_plan
from torchrec_deepfm.sharding.hardware_module import write_hardware_module
from torchrec_deepfm.sharding.inputs.hardware import EXTRA, Hardware
from torchrec_deepfm.sharding.inputs.hardware_toml import read_hardware, write_hardware
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.plan import PlanFile
from torchrec_deepfm.sharding.search.plan_tables import plan_tables

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
        name: predict_plan(one, TABLES, PLANTED).critical_path_ms * rng.uniform(1 - noise, 1 + noise)
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
    found = fit_hardware(measurements, cpu(2), name="mine", source="test")
    assert found.hardware.ddr_bandwidth == pytest.approx(2e9)
    assert found.hardware.extra["step_ms"] == pytest.approx(10)


def test_what_cant_be_separated_is_named() -> None:
    """Every plan has one type, so a cost per step and one per type are the same to it; with two types they differ."""
    column = [*BANDWIDTHS, *EXTRA].index
    rng = np.random.default_rng(0)

    def fitted(types: list[int]) -> tuple[str, ...]:
        measurements = []
        for count in types:
            amounts = np.zeros((1, len(BANDWIDTHS) + len(EXTRA)))
            amounts[:, column("ddr_bandwidth")] = rng.uniform(1, 10)
            amounts[:, [column("step_ms"), column("group_ms")]] = 1.0, count
            step = float(amounts[0] @ np.where(np.arange(amounts.shape[1]) == column("shard_ms"), 0.0, 2.0))
            measurements.append(Measurement(amounts=amounts, step_ms=step))
        return fit_hardware(measurements, cpu(1), name="mine", source="test").inseparable

    (line,) = fitted([1] * 12)
    assert line.startswith("step_ms, group_ms: these plans can't separate them (except for 0% ")
    assert fitted([1, 2, 3, 4] * 3) == ()


def test_a_bandwidth_that_costs_nothing_is_reported() -> None:
    column = [*BANDWIDTHS, *EXTRA].index
    measurements = []
    for amount in (1.0, 2.0, 3.0):
        amounts = np.zeros((1, len(BANDWIDTHS) + len(EXTRA)))
        amounts[:, [column("ddr_bandwidth"), column("step_ms")]] = [amount, 1.0]
        measurements.append(Measurement(amounts=amounts, step_ms=5.0 - amount))  # the more, the faster
    found = fit_hardware(measurements, cpu(1), name="mine", source="test")
    assert found.unlimited == ("ddr_bandwidth",)
    assert found.hardware.ddr_bandwidth == 1e15


def test_the_file_gives_the_same_predictions(tmp_path: Path) -> None:
    one = measured(noise=0.02)
    found = calibrate([one], "mine")
    write_hardware(found.hardware, tmp_path / "mine.toml")
    again = read_hardware(str(tmp_path / "mine.toml"))
    after = recalculate(one, again)
    for before, now in zip(one.plans, after.plans, strict=True):
        assert now.predicted_ms == predict_plan(before.plan, TABLES, again).critical_path_ms
        assert now.step_ms == before.step_ms
    errors = [abs((plan.predicted_ms or 0.0) / plan.step_ms - 1) for plan in after.plans]
    assert sum(errors) / len(errors) == pytest.approx(found.error)


FOREIGN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mine, torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.estimator import EmbeddingPerfEstimatorFactory

ranks = mine.make_topology(world_size=4)
tables = [EmbeddingBagConfig(name="t", feature_names=["f"], num_embeddings=1000, embedding_dim=16)]
rules = {"t": ParameterConstraints(pooling_factors=[7.0])}
estimator = EmbeddingPerfEstimatorFactory.create(mine.NAME, topology=ranks, constraints=rules)
options = EmbeddingEnumerator(ranks, 512, rules, estimator).enumerate(
    EmbeddingBagCollection(tables=tables, device=torch.device("meta")), [EmbeddingBagCollectionSharder()]
)
assert not any(name.startswith("torchrec_deepfm") for name in sys.modules)
print(json.dumps({o.sharding_type: [o.shards[0].perf.total, o.shards[0].perf.input_dist_comms] for o in options}))
"""


def test_plain_torchrec_imports_the_description_and_estimates_the_same(tmp_path: Path) -> None:
    """On two hosts, in a process that has nothing of this package."""
    hardware = replace(PLANTED, name='my "own" \\ hosts', extra={"step_ms": 0.8, "shard_ms": 0.0, "group_ms": 0.3})
    write_hardware_module(hardware, tmp_path / "mine.py")
    script = tmp_path / "foreign.py"
    script.write_text(FOREIGN)
    done = subprocess.run(
        [sys.executable, "-I", script, tmp_path], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert set(theirs) >= {"data_parallel", "table_wise"}
    assert "- step_ms = 0.8 ms for" in (tmp_path / "mine.py").read_text()
    table = Table(name="t", num_embeddings=1000, embedding_dim=16, pooling_factor=7.0)
    for kind, (total, ids) in theirs.items():
        rules = {"t": ParameterConstraints(sharding_types=[kind])}
        made = plan_tables([table], hardware, 4, batch_size=512, constraints=rules, search="torchrec")
        (shard, *_) = made.tables[0].shards
        assert shard.predicted is not None
        assert shard.predicted.input_dist_comms_ms == pytest.approx(ids)
        assert shard.predicted.total_ms == pytest.approx(total + ids)


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
