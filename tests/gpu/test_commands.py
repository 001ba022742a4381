"""Every command on a GPU that is not there: what is only for CUDA runs, and computes what the CPU computes."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.pretend_gpu import Calls, pretend_gpu
from torchrec_deepfm import doctor
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.synthetic.generate import generate
from torchrec_deepfm.training.monitoring import quality

# Two tables of Adam, checkpoints and evaluations in the middle, a moving average: what CUDA has branches for.
OPTIONS = ["--batch-size", "256", "--data-parallel-rows", "8", "--eval-every", "4", "--checkpoint-every", "3"]
OPTIONS += ["--recipe", "paper", "--ema", "0.5", "--max-ne", "inf", "--clip-norm", "1.0", "--factor-dim", "4"]
OPTIONS += ["--over-arch-layer-sizes", "16", "8"]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A run of each command, on the CPU and on the pretended GPU; `said`: what the trainings on them printed."""

    folder: Path
    said: list[str]
    train: Calls
    resume: Calls
    predict: Calls
    experiment: Calls


def run(*words: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(word) for word in words])
    return said.getvalue()


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("walk")
    generate(folder / "raw", rows=2000, seed=0)
    prepare(
        [folder / "raw" / "day_0.tsv"],
        folder / "data",
        validation=[folder / "raw" / "validation.tsv"],
        test=[folder / "raw" / "test.tsv"],
    )
    with mock.patch.object(quality, "_FEW_STEPS", 0):
        said = [run("train", "--data", folder / "data", "--output", folder / "cpu", *OPTIONS)]
        with pretend_gpu() as trained:
            said.append(run("train", "--data", folder / "data", "--output", folder / "gpu", *OPTIONS))
    with pretend_gpu():
        run("evaluate", "--run", folder / "gpu", "--data", folder / "data")
    rules = ["--constraint", "C1=table_wise:kernel=fused_uvm_caching"]
    plain = [word for word in OPTIONS if word not in ("--ema", "0.5")]
    run("train", "--data", folder / "data", "--output", folder / "cpu_plain", *plain)
    with pretend_gpu():
        run("train", "--data", folder / "data", "--output", folder / "caching", *plain, *rules)
    # As if killed after its first checkpoint.
    shutil.copytree(folder / "gpu", folder / "resumed")
    (folder / "resumed" / "summary.json").unlink()
    newest = sorted((folder / "resumed" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    with pretend_gpu() as resumed:
        run("train", "--data", folder / "data", "--output", folder / "resumed", *OPTIONS)
    with pretend_gpu() as predicted:
        words = ["--run", folder / "gpu", "--input", folder / "raw" / "test.tsv"]
        run("predict", *words, "--output", folder / "rows.parquet")
    tables = folder / "tables.csv"
    tables.write_text("name,num_embeddings,embedding_dim\na,100,8\nb,50,8\n")
    with pretend_gpu() as measured:
        words = ["--tables", tables, "--batch-size", "32", "--steps", "2", "--turns", "1"]
        run("experiment", *words, "--output", folder / "experiment")
    return Walk(folder=folder, said=said, train=trained, resume=resumed, predict=predicted, experiment=measured)


def figures(run: Path) -> Any:
    summary = json.loads((run / "summary.json").read_text())
    return [summary["validation"], summary["test"], summary["weights"]["last"]["test"]]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_training_on_a_gpu_computes_what_the_cpu_does(walk: Walk) -> None:
    assert losses(walk.folder / "gpu") == losses(walk.folder / "cpu")
    assert figures(walk.folder / "gpu") == figures(walk.folder / "cpu")
    evaluated = json.loads((walk.folder / "gpu" / "evaluate_test.json").read_text())
    assert evaluated["auc"] == figures(walk.folder / "cpu")[1]["auc"]


def test_a_small_batch_is_advised_against_on_a_gpu_only(walk: Walk) -> None:
    line = "warning: --batch-size 256: a step takes a GPU as long as one of 8192"
    assert [line in said for said in walk.said] == [False, True]


def test_a_plan_that_caches_fetches_ahead_and_computes_the_same(walk: Walk) -> None:
    assert losses(walk.folder / "caching") == losses(walk.folder / "cpu_plain")
    assert figures(walk.folder / "caching") == figures(walk.folder / "cpu_plain")
    tables = json.loads((walk.folder / "caching" / "plan.json").read_text())["tables"]
    assert [table["compute_kernel"] for table in tables if table["name"] == "t_C1"] == ["fused_uvm_caching"]


def test_a_resumed_training_ends_in_the_same_figures(walk: Walk) -> None:
    assert figures(walk.folder / "resumed") == figures(walk.folder / "cpu")


def test_the_group_is_for_both_devices(walk: Walk) -> None:
    for calls in (walk.train, walk.resume, walk.experiment):
        assert {group["backend"] for group in calls.groups} == {"cpu:gloo,cuda:nccl"}
        assert torch.device("cuda", 0) in calls.devices
        assert calls.placements == {"rank:0/cuda:0"}


def test_an_experiment_knows_the_gpu(walk: Walk) -> None:
    results = json.loads((walk.folder / "experiment" / "results.json").read_text())
    assert results["settings"]["device"] == "NVIDIA H100 80GB HBM3"
    assert results["hardware"]["name"] == "h100"


def test_predicting_leaves_the_gpu_alone(walk: Walk) -> None:
    assert (walk.folder / "rows.parquet").exists()
    assert walk.predict.groups == []


def test_the_doctor_runs_an_operator_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pretend_gpu(count=2):
        exec(doctor._PROBE, {})
    stages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [stage["stage"] for stage in stages] == list(doctor._STAGES)
    assert stages[0]["gpus"] == 2
    assert stages[1]["device"] == "cuda"
