"""Whole trainings by ``train`` on one and on two ranks: one loss curve, one result, one checkpoint for both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.evaluations import evaluated
from tests.support.ranks import CPU, one_rank, run_ranks
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.training import loop, trainer
from torchrec_deepfm.training.config import TrainConfig

GLOBAL_BATCH = 400
STEPS = 50  # two epochs of 10,000 rows; 1,000 rows to evaluate leave half a batch, which has to be filled up
# Gentle rates: where the loss jumps about, the rounding of sums in another order grows past any tolerance.
CONFIG = TrainConfig(
    factor_dim=4, over_arch_layer_sizes=(16, 8), dropout=0.0, epochs=2, sparse_lr=0.02, dense_lr=0.003,
    data_parallel_rows=20, warmup=0.1, decay=0.5, eval_every=15,
)  # fmt: skip


def train(folder: Path, output: Path, world_size: int) -> dict[str, Any]:
    loop.RECORD_EVERY = 1
    config = replace(CONFIG, batch_size=GLOBAL_BATCH // world_size)
    return trainer.train(config, PreparedData.open(folder), output, CPU).summary


def train_and_evaluate(folder: Path, output: Path, damaged: Path) -> dict[str, Any]:
    summary = train(folder, output, 2)
    data = PreparedData.open(folder)
    figures = {split: evaluated(output, data, split, CPU) for split in ("validation", "test")}
    if torch.distributed.get_rank() == 0:
        damage(output, damaged, "cut")
    torch.distributed.barrier()
    try:
        evaluated(damaged, data, "test", CPU)
        refusal = "none"
    except UserError as error:
        refusal = str(error)
    return {"summary": summary, "evaluated": figures, "refusal": refusal}


def damage(run: Path, copy: Path, how: str) -> None:
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluate_*.json"))
    checkpoint = copy / "checkpoint"
    shards = sorted(checkpoint.glob("*.distcp"))
    assert shards
    if how == "cut":
        for shard in shards:
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif how == "a file is lost":
        shards[0].unlink()
    elif how == "other bytes":
        for shard in shards:
            shard.write_bytes(bytes(shard.stat().st_size))
    elif how == "no metadata":
        (checkpoint / ".metadata").unlink()
    elif how == "broken metadata":
        (checkpoint / ".metadata").write_bytes(b"no pickle")
    elif how == "no checkpoint":
        shutil.rmtree(checkpoint)
    else:
        assert how == "another model"
        config = json.loads((copy / "config.json").read_text())
        config["config"]["over_arch_layer_sizes"] = [16, 9]
        (copy / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(data: PreparedData, folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch, one_rank():
        patch.setattr(loop, "RECORD_EVERY", 1)
        train(data.folder, folder / "alone", 1)
    return folder / "alone"


@pytest.fixture(scope="module")
def reported(data: PreparedData, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(train_and_evaluate, 2, data.folder, folder / "two", folder / "two_damaged")


@pytest.fixture(scope="module")
def two(reported: list[dict[str, Any]], folder: Path) -> Path:
    return folder / "two"


def records(run: Path, split: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_reliability_curve_covers_every_row_of_all_ranks(two: Path) -> None:
    summary, curves = read(two / "summary.json"), read(two / "calibration.json")["splits"]
    for split in ("validation", "test"):
        bins = curves[split]
        rows = [one["rows"] for one in bins]
        assert sum(rows) == summary[split]["rows"]
        assert len(bins) > 5
        predicted = sum(one["predicted"] * n for one, n in zip(bins, rows, strict=True))
        clicks = sum(one["observed"] * n for one, n in zip(bins, rows, strict=True))
        assert predicted / clicks == pytest.approx(summary[split]["calibration"], rel=1e-9)
    assert (two / "report.html").stat().st_size > 10_000


def test_two_ranks_have_the_loss_curve_of_one(alone: Path, two: Path) -> None:
    curves = [[line["loss"] for line in records(run, "train")] for run in (alone, two)]
    assert len(curves[0]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert sum(curves[0][-5:]) / 5 < sum(curves[0][:5]) / 5 - 0.03, "nothing is learnt, so nothing is compared"
    assert (read(alone / "plan.json")["world_size"], read(two / "plan.json")["world_size"]) == (1, 2)


def test_the_plan_used_both_ranks_and_both_kinds_of_tables(two: Path) -> None:
    tables = read(two / "plan.json")["tables"]
    sharded = [table for table in tables if table["sharding_type"] != "data_parallel"]
    assert {rank for table in sharded for rank in table["ranks"]} == {0, 1}
    assert len(sharded) < len(tables)


def test_two_ranks_reach_the_metrics_of_one(alone: Path, two: Path) -> None:
    for split in ("validation", "test"):
        one, other = read(alone / "summary.json")[split], read(two / "summary.json")[split]
        assert one["rows"] == other["rows"] == 1000
        for name in ("auc", "logloss", "ne", "calibration", "lift"):
            assert other[name] == pytest.approx(one[name], abs=1e-5 if name == "calibration" else 2e-6), name
        assert one["auc"] > 0.55


def test_rates_in_the_record_follow_the_schedule(two: Path) -> None:
    # 5 steps of warm-up, 20 at the full rate, 25 of quadratic decay.
    factors = [(step + 1) / 5 for step in range(5)] + [1.0] * 20 + [((25 - step) / 25) ** 2 for step in range(25)]
    for name, rate in (("sparse", 0.02), ("dense", 0.003)):
        rates = [line["lr"][name] for line in records(two, "train")]
        assert rates == pytest.approx([rate * factor for factor in factors], rel=1e-6)  # kept in float32


def test_evaluations_come_when_they_are_asked_for(two: Path) -> None:
    assert [line["step"] for line in records(two, "validation")] == [15, 30, 45, 50]
    assert [line["step"] for line in records(two, "test")] == [50]
    assert records(two, "validation")[-1]["auc"] == read(two / "summary.json")["validation"]["auc"]


def test_the_summary_is_the_same_on_every_rank(reported: list[dict[str, Any]], two: Path) -> None:
    clocks = ("train_seconds", "samples_per_second")  # each rank has its own
    summaries = [{name: value for name, value in rank["summary"].items() if name not in clocks} for rank in reported]
    assert summaries[0] == summaries[1]
    assert read(two / "summary.json") == reported[0]["summary"]
    assert (summaries[0]["steps"], summaries[0]["batch_size"], summaries[0]["world_size"]) == (STEPS, 200, 2)


def test_evaluation_says_what_the_training_said(reported: list[dict[str, Any]], two: Path) -> None:
    summary = read(two / "summary.json")
    for rank in reported:
        for split in ("validation", "test"):
            assert rank["evaluated"][split] == pytest.approx(summary[split], rel=1e-9)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_one_rank_reads_what_two_wrote(two: Path, data: PreparedData, device: torch.device, split: str) -> None:
    values = evaluated(two, data, split, device)
    assert values == pytest.approx(read(two / "summary.json")[split], rel=1e-5)
    assert values.items() <= read(two / f"evaluate_{split}.json").items()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", ".distcp has "),
        ("a file is lost", "__0_0.distcp is missing"),
        ("other bytes", "__0_0.distcp is not what was written (its checksum differs)"),
        ("no metadata", ".metadata is missing"),
        ("broken metadata", ".metadata has 9 bytes, "),
        ("another model", "these are weights of another run, with --over-arch-layer-sizes 16 8"),
    ],
)
def test_a_damaged_checkpoint(
    two: Path, data: PreparedData, device: torch.device, tmp_path: Path, how: str, reason: str
) -> None:
    damage(two, tmp_path / "copy", how)
    with pytest.raises(UserError) as raised:
        evaluated(tmp_path / "copy", data, "test", device)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'copy' / 'checkpoint'}: ")
    assert message.endswith("train again")
    assert ("the checkpoint can't be read (" in message) == (how != "another model")
    assert reason in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "copy" / "evaluate_test.json").exists()


def test_a_run_without_a_checkpoint(two: Path, data: PreparedData, device: torch.device, tmp_path: Path) -> None:
    damage(two, tmp_path / "copy", "no checkpoint")
    with pytest.raises(UserError) as raised:
        evaluated(tmp_path / "copy", data, "test", device)
    checkpoint = tmp_path / "copy" / "checkpoint"
    assert str(raised.value) == (
        f"{checkpoint}: no final weights; finish the training with the same train command, or choose a checkpoint, "
        "such as last"
    )


def test_a_damaged_checkpoint_on_two_ranks(reported: list[dict[str, Any]], folder: Path) -> None:
    for rank in reported:
        assert rank["refusal"].startswith(f"{folder / 'two_damaged' / 'checkpoint'}: the checkpoint can't be read (")
        assert len(rank["refusal"].splitlines()) == 1


def changed(data: PreparedData, copy: Path, change: Any) -> PreparedData:
    shutil.copytree(data.folder, copy)
    manifest = read(copy / "manifest.json")
    change(manifest)
    (copy / "manifest.json").write_bytes(seal(manifest))
    return PreparedData.open(copy)


def test_data_with_other_ids(two: Path, data: PreparedData, device: torch.device, tmp_path: Path) -> None:
    mine = data.num_embeddings["C3"]
    other = changed(data, tmp_path / "other", lambda manifest: manifest["num_embeddings"].update(C3=mine + 1))
    with pytest.raises(UserError) as raised:
        evaluated(two, other, "test", device)
    assert str(raised.value) == (
        f"--data {tmp_path / 'other'}: column 'C3' has {mine + 1} ids, but {two} was trained on {mine}; "
        "name the data that it was trained on, or data prepared with the same vocabulary"
    )


def test_data_with_other_numbers(two: Path, data: PreparedData, device: torch.device, tmp_path: Path) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["schema"]["numeric"][0] = "price"

    other = changed(data, tmp_path / "other", rename)
    with pytest.raises(UserError) as raised:
        evaluated(two, other, "test", device)
    message = str(raised.value)
    assert message.startswith(f"--data {tmp_path / 'other'}: numeric columns ('price', ")
    assert message.endswith("'I13')")


def test_no_run(data: PreparedData, device: torch.device, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        evaluated(tmp_path, data, "test", device)
    assert str(raised.value) == (
        f"--run {tmp_path}: not a run folder (no config.json); name the folder that train wrote"
    )
