"""Best and last weights: which are kept, where they are found, and that their figures are those of the summary."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.runs import read_tensors
from tests.support.evaluations import evaluated
from tests.support.ranks import one_rank
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.run.weights import find_weights
from torchrec_deepfm.training.trainer import train

# Rates at which the validation AUC falls from some epoch on, so that the best is not the last.
CONFIG = TrainConfig(
    factor_dim=4, over_arch_layer_sizes=(16,), dropout=0.0, batch_size=512, epochs=4, sparse_lr=0.5, dense_lr=0.05
)


def trained(data: PreparedData, folder: Path, device: torch.device, **options: Any) -> Path:
    train(TrainConfig(**{**CONFIG.__dict__, **options}), data, folder, device)
    return folder


@pytest.fixture(scope="module")
def runs(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the name of the run's own weights."""
    folder = tmp_path_factory.mktemp("runs")
    with one_rank() as device:
        return {
            "last": trained(data, folder / "last", device, keep_last=9),
            "best": trained(data, folder / "best", device, patience=3, ema=0.5, keep_last=9),
        }


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def best_epoch(run: Path) -> int:
    """By the recorded evaluations alone: the step of the first highest validation AUC."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [(line["auc"], -line["step"]) for line in lines if line["split"] == "validation"]
    return -max(seen)[1]


@pytest.mark.parametrize("own", ["last", "best"])
def test_both_are_kept_and_named(runs: dict[str, Path], own: str) -> None:
    run, found = runs[own], summary(runs[own])
    assert found["weights"]["own"] == own
    assert found["weights"]["best"]["step"] == best_epoch(run) < found["weights"]["last"]["step"] == found["steps"]
    other = {"last": "best", "best": "last"}[own]
    assert found["weights"][own]["folder"] == "checkpoint"
    assert found["weights"][other]["folder"] == f"checkpoint_{other}"
    assert {split: found["weights"][own][split] for split in ("validation", "test")} == {
        split: found[split] for split in ("validation", "test")
    }
    assert found["weights"]["best"]["validation"]["auc"] == found["best"]["value"]
    assert sorted(path.name for path in run.glob("checkpoint_*")) == [f"checkpoint_{other}"]


@pytest.mark.parametrize("own", ["last", "best"])
def test_they_are_the_states_of_their_steps(runs: dict[str, Path], own: str) -> None:
    run, found = runs[own], summary(runs[own])
    for which in ("best", "last"):
        weights = find_weights(run, which)
        assert weights.step == found["weights"][which]["step"]
        mine = read_tensors(Path(weights.shown))
        state = read_tensors(run / "checkpoints" / f"step_{weights.step:08d}")
        prefix = "model." if own == "last" else "average."  # the run with the average evaluates that
        for name, value in mine.items():
            assert torch.equal(value, state[name.replace("model.", prefix, 1)])


@pytest.mark.parametrize("own", ["last", "best"])
def test_the_figures_are_those_of_the_summary(
    runs: dict[str, Path], own: str, data: PreparedData, device: torch.device, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[own], run)
    found = summary(run)
    for checkpoint, weights in ((None, own), ("best", "best"), ("last", "last")):
        assert evaluated(run, data, "test", device, checkpoint) == found["weights"][weights]["test"]
    del found["weights"]  # as in a run of an earlier version, which kept its own weights only
    (run / "summary.json").write_text(json.dumps(found))
    for which in ("best", "last"):
        kept = summary(runs[own])["weights"][which]
        folder = run / "checkpoint" if which == own else run / "checkpoints" / f"step_{kept['step']:08d}"
        assert find_weights(run, which).shown == find_weights(run, kept["step"]).shown == str(folder)
        assert evaluated(run, data, "test", device, str(kept["step"])) == kept["test"]


def test_no_second_copy_where_the_best_is_the_last(data: PreparedData, device: torch.device, tmp_path: Path) -> None:
    run = trained(data, tmp_path / "run", device, epochs=1, patience=1)
    found = summary(run)["weights"]
    assert found["best"] == found["last"]
    assert found["own"] == "last"
    assert not list(run.glob("checkpoint_*"))
    assert find_weights(run, "best").shown == find_weights(run).shown == str(run / "checkpoint")


def test_best_weights_that_are_lost_cost_only_the_best(
    data: PreparedData, device: torch.device, tmp_path: Path, runs: dict[str, Path]
) -> None:
    """Killed before its summary, with the checkpoint of the best step damaged; the training itself is whole."""
    run = tmp_path / "run"
    shutil.copytree(runs["last"], run)
    found = summary(run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint_best")
    (run / "checkpoints" / f"step_{found['best']['step']:08d}" / ".metadata").unlink()
    said: list[str] = []
    again = train(TrainConfig(**{**CONFIG.__dict__, "keep_last": 9}), data, run, device, say=said.append).summary
    assert any("the best weights can't be kept, only the last ones" in line for line in said)
    assert again["weights"] == {"own": "last", "last": found["weights"]["last"]}
    with pytest.raises(UserError, match=r"--checkpoint best: .* keeps no best weights"):
        find_weights(run, "best")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("old", "--checkpoint old: choose one of best, last, or the number of a step"),
        ("-3", "--checkpoint -3: choose one of best, last, or the number of a step"),
        (3, "--checkpoint 3: no such checkpoint; {}/checkpoints has steps 19, 38, 57, 76"),
    ],
)
def test_what_there_is_not(runs: dict[str, Path], checkpoint: str | int, message: str) -> None:
    with pytest.raises(UserError) as raised:
        find_weights(runs["last"], checkpoint)
    assert str(raised.value).startswith(message.format(runs["last"]))
    assert len(str(raised.value).splitlines()) == 1


def test_an_unfinished_run(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["last"], run)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"^--checkpoint best: .* is not finished; finish it with the same train comm"):
        find_weights(run, "best")
    assert find_weights(run, "last").key == 76
    step = int(sorted((run / "checkpoints").iterdir())[0].name.removeprefix("step_"))
    assert find_weights(run, str(step)).key == step


def test_weights_of_another_run_are_not_taken_for_its_own(runs: dict[str, Path], tmp_path: Path) -> None:
    """Their tensors have the same names and sizes, so that nothing else would notice."""
    mixed = Path(shutil.copytree(runs["last"], tmp_path / "mixed"))
    for folder in ("checkpoint", "checkpoints"):
        shutil.rmtree(mixed / folder)
        shutil.copytree(runs["best"] / folder, mixed / folder)
    step = best_epoch(runs["best"])
    with pytest.raises(UserError, match=r"checkpoint: these are weights of another run, with --ema 0\.5; restore the"):
        find_weights(mixed)
    (mixed / "summary.json").unlink()  # it names the steps of the final weights
    with pytest.raises(UserError, match=rf"step_{step:08d}: these are weights of another run, with --ema 0\.5"):
        find_weights(mixed, step)
