"""The moving average of the weights: its equation, and that what counts is evaluated, saved and exported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.runs import make_data, read_tensors
from tests.support.evaluations import evaluated
from tests.support.samples import draw, read_state, to_batch
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.estimate import memory_by_rank
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.runtime.plan_model import local_topology
from torchrec_deepfm.training import build
from torchrec_deepfm.training.build import build_model
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.memory_estimate import size_of
from torchrec_deepfm.training.optim.ema import MovingAverage
from torchrec_deepfm.training.optim.optimizers import make_optimizer
from torchrec_deepfm.training.trainer import train

SIZES = {"big": 40, "small": 6}
CONFIG = TrainConfig(
    factor_dim=6, over_arch_layer_sizes=(8,), dropout=0.0, batch_norm=True, sparse_lr=0.3, dense_lr=0.03,
    data_parallel_rows=10,
)  # fmt: skip


@pytest.mark.parametrize(("decay", "every", "sparse_optimizer"), [(0.9, 1, "rowwise_adagrad"), (0.6, 3, "adam")])
def test_the_average_is_what_its_equation_says(
    device: torch.device, decay: float, every: int, sparse_optimizer: str
) -> None:
    config = replace(CONFIG, sparse_optimizer=sparse_optimizer)  # type: ignore[arg-type]
    model = build_model(config, SIZES, 2, device).model
    optimizer = make_optimizer(model, config)
    average = MovingAverage(model, decay, every)
    expected = {name: value.double() for name, value in read_state(model).items() if value.is_floating_point()}
    for step in range(1, 14):
        optimizer.zero_grad()
        model(to_batch(draw(16, SIZES, 2, seed=step), list(SIZES)))[0].backward()
        optimizer.step()
        average.update(step)
        if step % every == 0:
            d = min(decay, (1 + (step - 1)) / (10 + (step - 1))) ** every
            now = read_state(model)
            expected = {name: d * value + (1 - d) * now[name].double() for name, value in expected.items()}
    raw = read_state(model)
    with average.in_place():
        inside = read_state(model)
    assert all(torch.equal(value, raw[name]) for name, value in read_state(model).items())
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        assert (raw[name] - inside[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(inside[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_large_tables_change_places_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_deepfm.training.optim.ema._CHUNK", 20)  # 2 rows of 8, 20 of what has one number each
    model = build_model(CONFIG, SIZES, 2, device).model
    average, before = MovingAverage(model, 0.9), read_state(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            local = value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
            local.fill_(7)
    with average.in_place():
        inside = read_state(model)
    for name, value in read_state(model).items():
        assert value.eq(7).all()
        assert torch.equal(inside[name], before[name]) or not value.is_floating_point()


@pytest.mark.parametrize("options", [{}, {"data_parallel_rows": 0, "batch_norm": False}, {"sparse_optimizer": "adam"}])
def test_its_bytes_are_those_that_the_planner_counts(device: torch.device, options: dict[str, Any]) -> None:
    config = replace(CONFIG, **options)
    built = build_model(config, SIZES, 2, device)
    kept = {
        name: sum(cut.tensor.numel() * cut.tensor.element_size() for cut in pieces.cuts)
        for name, pieces in MovingAverage(built.model, 0.9)._average.items()
    }
    of_tables = sum(count for name, count in kept.items() if ".embedding_bags." in name)
    assert of_tables == (40 + 6) * 8 * 4  # rows of 8 float32: 6 + 1, and one of padding
    tables = [Table(name=f"t_{name}", num_embeddings=rows, embedding_dim=8) for name, rows in SIZES.items()]
    held = [
        memory_by_rank(
            built.plan_file,
            tables,
            local_topology(device),
            batch_size=config.batch_size,
            optimizer=config.sparse_optimizer,
            ema=ema,
        )[0].ddr
        for ema in (False, True)
    ]
    assert held[1] - held[0] == of_tables
    size = size_of(replace(config, ema=0.9), table_rows=46, fields=4, numeric=2, train_rows=1000)
    without = size_of(config, table_rows=46, fields=4, numeric=2, train_rows=1000)
    assert size.average_bytes == sum(kept.values()) == size.rank_bytes - without.rank_bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_data(tmp_path_factory.mktemp("data") / "rows")


def averages(folder: Path) -> dict[str, Tensor]:
    """The averages in a checkpoint, named as the weights."""
    found = read_tensors(folder)
    return {name.replace("average.", "model.", 1): value for name, value in found.items() if name.startswith("average")}


@pytest.mark.parametrize(("options", "restored"), [({"sparse_lr": 0.1}, False), ({"patience": 2}, True)])
def test_what_counts_is_the_average(
    data: Any, tmp_path: Path, device: torch.device, options: dict[str, Any], restored: bool
) -> None:
    """It is evaluated on the way, it decides which step was the best, and the run ends in it."""
    config = replace(CONFIG, batch_size=100, epochs=4, ema=0.95, eval_every=10, keep_last=9, **options)
    summary = train(config, data, tmp_path / "run", device).summary
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # The first of each step: the last lines are of the end, which evaluates the best step once more.
    history = {line["step"]: line for line in reversed(lines) if line["split"] == "validation"}
    final = read_tensors(tmp_path / "run" / "checkpoint")
    ended_in = summary.get("restored_step", summary["steps"])
    assert ("restored_step" in summary) == restored
    assert not restored or ended_in == max(history, key=lambda step: history[step]["auc"]) < max(history)
    kept = averages(tmp_path / "run" / "checkpoints" / f"step_{ended_in:08d}")
    raw = read_tensors(tmp_path / "run" / "checkpoints" / f"step_{ended_in:08d}")
    assert {name for name in final if final[name].is_floating_point()} == kept.keys()
    for name, value in kept.items():
        assert torch.equal(final[name], value), name
        assert not torch.equal(raw[name], value), name
    assert summary["validation"]["auc"] == history[ended_in]["auc"]
    for split in ("validation", "test"):
        assert evaluated(tmp_path / "run", data, split, device) == summary[split]


def test_the_end_does_not_lag(data: Any, tmp_path: Path, device: torch.device) -> None:
    """Of 8 steps, with an update each 3, the last one comes after 2: what is evaluated and exported has it."""
    config = replace(CONFIG, batch_size=250, ema=0.9, ema_every=3, checkpoint_every=1, keep_last=9)
    train(config, data, tmp_path / "run", device)
    checkpoints = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in range(1, 9)]
    expected = {name: value.double() for name, value in averages(checkpoints[0]).items()}  # as it began
    for step, steps in ((3, 3), (6, 3), (8, 2)):
        now, d = read_tensors(checkpoints[step - 1]), (step / (9 + step)) ** steps
        expected = {name: d * value + (1 - d) * now[name].double() for name, value in expected.items()}
    final = read_tensors(tmp_path / "run" / "checkpoint")
    for name, value in expected.items():
        torch.testing.assert_close(final[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)
    for at, name in ((7, "checkpoint"), (8, "checkpoint")):  # stopped before the last step, and after it
        again = tmp_path / f"again_{at}"
        shutil.copytree(tmp_path / "run", again)
        for file in ("summary.json", "calibration.json", "report.html"):
            (again / file).unlink()
        shutil.rmtree(again / name)
        for step in range(at + 1, 9):
            shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
        train(config, data, again, device)
        resumed = read_tensors(again / name)
        assert all(torch.equal(resumed[key], value) for key, value in final.items())


def test_an_epoch_shorter_than_its_updates(data: Any, tmp_path: Path, device: torch.device) -> None:
    with pytest.raises(UserError) as raised:
        train(replace(CONFIG, batch_size=500, ema=0.9, ema_every=5), data, tmp_path / "run", device)
    assert str(raised.value) == (
        f"--ema-every 5: an epoch of {data.folder} has 4 steps, so it would be evaluated before the first update; take "
        "at most as many"
    )
    assert not (tmp_path / "run").exists()


def test_without_a_decay_nothing_is_kept(data: Any, tmp_path: Path, device: torch.device) -> None:
    train(replace(CONFIG, batch_size=500), data, tmp_path / "run", device)
    assert not averages(tmp_path / "run" / "checkpoints" / "step_00000004")


@pytest.mark.parametrize(("option", "value"), [("ema", 0.9), ("embedding_weight_decay", 0.1)])
def test_a_table_behind_a_cache_is_refused(device: torch.device, option: str, value: float) -> None:
    table = SimpleNamespace(sharding_type="row_wise", compute_kernel="fused_uvm_caching")
    plan: Any = SimpleNamespace(plan={"sparse": {"t_a": table}})
    build._check_plan(CONFIG, plan, set())
    with pytest.raises(UserError) as raised:
        build._check_plan(replace(CONFIG, **{option: value}), plan, set())  # type: ignore[arg-type]
    name = option.replace("_", "-")
    assert str(raised.value) == (
        f"table t_a: the plan keeps it out of the device's memory (fused_uvm_caching), where --{name} would read stale "
        f"rows or move all of them at each step; plan it as fused, or leave out --{name}"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data_parallel_rows": 9},
            (
                "the plan shards it (column_wise), but --data-parallel-rows 9 replicates it; "
                "plan it as data_parallel, or change the option"
            ),
        ),
        (
            {"sparse_optimizer": "adam"},
            (
                "the plan cuts its columns (column_wise), but --sparse-optimizer adam steps on whole rows; "
                "plan it as table_wise or row_wise, or take another optimizer"
            ),
        ),
    ],
)
def test_a_plan_that_the_options_refuse(options: dict[str, Any], message: str) -> None:
    table = SimpleNamespace(sharding_type="column_wise", compute_kernel="fused")
    plan: Any = SimpleNamespace(plan={"sparse": {"t_a": table}})
    with pytest.raises(UserError) as raised:
        build._check_plan(replace(CONFIG, **options), plan, {"t_a"} if "data_parallel_rows" in options else set())
    assert str(raised.value) == f"table t_a: {message}"


def test_cowclip_wants_adams_tables_replicated() -> None:
    table = SimpleNamespace(sharding_type="row_wise", compute_kernel="fused")
    plan: Any = SimpleNamespace(plan={"sparse": {"t_a": table}})
    config = replace(CONFIG, sparse_optimizer="adam")
    build._check_plan(config, plan, set())
    with pytest.raises(UserError) as raised:
        build._check_plan(replace(config, clip_embedding="cowclip"), plan, set())
    assert str(raised.value) == (
        "table t_a: the plan shards it (row_wise), but --clip-embedding cowclip clips the rows of Adam's tables where "
        "they are replicated; plan it as data_parallel, or leave one of these options out"
    )
