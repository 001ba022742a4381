"""``load_model``: the weights of any plan in one model, without a process group."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchrec_deepfm import DeepFM, load_model
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError


def by_torch(folder: Path, tmp_path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by torch's own reader."""
    dcp_to_torch_save(folder, tmp_path / "plain.pt")
    return torch.load(tmp_path / "plain.pt", weights_only=True)  # type: ignore[no-any-return]


def probabilities(model: DeepFM, data: PreparedData, split: str) -> tuple[list[float], list[int]]:
    scores, labels = [], []
    for batch in Loader(data, split, batch_size=128, rank=0, world_size=1, shuffle=False, drop_last=False):
        scores += torch.sigmoid(model(batch.dense_features, batch.sparse_features).double()).flatten().tolist()
        labels += batch.labels.flatten().tolist()
    return scores, labels


def test_the_final_weights_are_those_of_the_summary(run: Path, run_data: PreparedData, tmp_path: Path) -> None:
    model = load_model(run)
    assert not dist.is_initialized()
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    saved = by_torch(run / "checkpoint", tmp_path)
    assert saved.keys() == {f"model.model.{name}" for name in model.state_dict()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"model.model.{name}"]), name
    summary = json.loads((run / "summary.json").read_text())
    for split in ("validation", "test"):
        scores, labels = probabilities(model, run_data, split)
        scores, labels = scores[: run_data.rows(split)], labels[: run_data.rows(split)]
        assert roc_auc_score(labels, scores) == pytest.approx(summary[split]["auc"], abs=1e-9)
        assert log_loss(labels, scores) == pytest.approx(summary[split]["logloss"], abs=1e-7)


@pytest.mark.parametrize("checkpoint", ["last", "best", 28, "28"])
def test_a_checkpoint_gives_its_averages(run: Path, tmp_path: Path, checkpoint: str | int) -> None:
    step = {"last": 30, "best": json.loads((run / "summary.json").read_text())["best"]["step"]}.get(str(checkpoint), 28)
    saved = by_torch(run / "checkpoints" / f"step_{step:08d}", tmp_path)
    for name, value in load_model(run, checkpoint).state_dict().items():
        kind = "average" if value.is_floating_point() else "model"
        assert torch.equal(value, saved[f"{kind}.model.{name}"]), name
        if kind == "average":
            assert not torch.equal(value, saved[f"model.model.{name}"]), name


def test_one_copy_of_the_tables(run: Path, tmp_path: Path) -> None:
    """Nothing of the tables' size is held besides the tables."""
    rows = sum(json.loads((run / "config.json").read_text())["num_embeddings"].values())
    model = load_model(run)
    bags = model.sparse_arch.embedding_bag_collection.embedding_bags
    assert sum(bag.weight.numel() for bag in bags.values()) == rows * 8  # 6 + 1, a multiple of 4
    assert all(bag.weight.device.type == "cpu" and bag.weight.is_leaf for bag in bags.values())


def test_a_moved_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "moved")
    found, there = load_model(tmp_path / "moved", "last").state_dict(), load_model(str(run), "last").state_dict()
    assert all(torch.equal(value, there[name]) for name, value in found.items())


def test_wrong_requests(run: Path, tmp_path: Path) -> None:
    for checkpoint, message in {
        "bets": r"^--checkpoint bets: choose one of best, last \(did you mean 'best'\?\), or the number of a step$",
        "999": r"^--checkpoint 999: no such checkpoint; .*/checkpoints has steps 20, 21, 28, 30$",
        True: r"^checkpoint True: give best, last or the number of a step$",
    }.items():
        with pytest.raises(UserError, match=message):
            load_model(run, checkpoint)
    with pytest.raises(UserError, match=r"^--run .*: not a run folder \(no config.json\)"):
        load_model(tmp_path)


def test_damaged_weights(run: Path, tmp_path: Path) -> None:
    for name, break_it, message in (
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, .* were written"),
        ("lost", lambda path: path.unlink(), "is missing"),
        ("changed", lambda path: path.write_bytes(b"\0" * path.stat().st_size), "is not what was written"),
    ):
        copy = tmp_path / name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
        break_it(next((copy / "checkpoint").glob("*.distcp")))
        with pytest.raises(UserError, match=rf"^{copy}/checkpoint: the checkpoint can't be read \(.*{message}"):
            load_model(copy)
    copy = tmp_path / "other model"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((copy / "config.json").read_text())
    config["num_embeddings"]["user"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"checkpoint can't be read \(ValueError: Size mismatch between saved"):
        load_model(copy)
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(UserError, match="no final weights; finish the training"):
        load_model(copy)
