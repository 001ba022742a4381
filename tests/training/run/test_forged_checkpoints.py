"""Checkpoints whose manifest was changed, or whose files are something else: named, and not used."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.run.killed_runs import CONFIG, reseal
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.training.run.formats import Manifest, convert
from torchrec_deepfm.training.trainer import train


@pytest.fixture
def alarm() -> Iterator[None]:
    """A test that waits on a FIFO fails."""

    def late(*_: object) -> None:
        raise AssertionError("this waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


FORGED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("point.step", lambda m: m["point"].update(step=21)),
    ("point.step", lambda m: m["point"].update(step=-1)),
    ("point.step", lambda m: m["point"].update(step=True)),
    ("point.epoch", lambda m: (m["point"].update(epoch=9), m["position"].update(epoch=9))),
    ("point.epoch contradicts position.epoch", lambda m: m["point"].update(epoch=0)),
    ("point.row contradicts position.row", lambda m: m["point"].update(row=150)),
    ("point.samples", lambda m: (m["point"].update(epoch=0), m["position"].update(epoch=0))),
    ("point.dropped", lambda m: (m["point"].update(epoch=2, row=0), m["position"].update(epoch=2, row=0))),
    ("point.row", lambda m: (m["point"].update(row=2000), m["position"].update(row=2000))),
    ("point.samples", lambda m: m["point"].update(samples="x")),
    ("point.samples", lambda m: m["point"].update(samples=5)),
    ("point.samples", lambda m: m["point"].update(samples=10**9)),
    ("point.dropped", lambda m: m["point"].update(samples=2999)),
    ("point.dropped", lambda m: m["point"].update(dropped=51)),
    ("point.seconds", lambda m: m["point"].update(seconds=None)),
    ("point.seconds", lambda m: m["point"].update(seconds=-1.0)),
    ("point.seconds", lambda m: m["point"].update(seconds=1e300)),
    ("point.evaluated", lambda m: m["point"].update(evaluated=1)),
    ("point", lambda m: m["point"].update(other=1)),
    ("point", lambda m: m.update(point=[])),
    ("tracker.stopped", lambda m: m["tracker"].update(stopped=True)),
    ("tracker.stopped", lambda m: m["tracker"].update(stopped="no")),
    ("tracker.best_step", lambda m: m["tracker"].update(best_step=24)),
    ("tracker.best_step", lambda m: m["tracker"].update(best_step=None)),
    ("tracker.best_value", lambda m: m["tracker"].update(best_value="high")),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.3)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.5**300)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=0.0)),
    ("tracker.factor", lambda m: m["tracker"].update(factor=2.0)),
    ("tracker.bad", lambda m: m["tracker"].update(bad=21, bad_since_drop=0)),
    ("tracker.bad_since_drop", lambda m: m["tracker"].update(bad_since_drop=1)),
    ("world_size", lambda m: m.update(world_size=0)),
    ("world_size", lambda m: m.update(world_size=2**30)),
    ("plan.world_size", lambda m: m.update(world_size=2)),
    ("plan: table", lambda m: m["plan"]["tables"][0].update(num_embeddings=-1)),
    ("random", lambda m: m.update(random=2**40)),
    ("random", lambda m: m.pop("random")),
    ("losses", lambda m: m.update(losses=21)),
    ("losses", lambda m: m.update(losses=-1)),
    ("columns", lambda m: m["columns"].popitem()),
    ("columns", lambda m: m.update(columns={key: [-4] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [4] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [0, 0] for key in m["columns"]})),
    ("columns.", lambda m: m.update(columns={key: [0, 4] for key in m["columns"]})),
    ("format_version", lambda m: m.update(format_version="1")),
    ("num_embeddings", lambda m: m["num_embeddings"].update(user=0)),
    ("numeric", lambda m: m["numeric"].append(3)),
    ("data_sha256", lambda m: m.update(data_sha256="?")),
    ("schema_sha256", lambda m: m.update(schema_sha256=7)),
    ("versions", lambda m: m["versions"].update(torch=2)),
    ("position", lambda m: m["position"].update(row="x")),
    ("config", lambda m: m["config"].update(epochs=-3)),
    ("config.speed", lambda m: m["config"].update(speed=9)),
]


@pytest.fixture(scope="module")
def manifest(templates: Path) -> bytes:
    return (templates / "unfinished" / "checkpoints" / "step_00000020" / "checkpoint.json").read_bytes()


@pytest.mark.parametrize(("name", "forge"), FORGED, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FORGED)])
def test_a_forged_value_is_named(manifest: bytes, name: str, forge: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(manifest)
    widths = dict.fromkeys(value["columns"], 4)

    def check(manifest: dict[str, Any]) -> None:
        found = convert(manifest, Manifest)
        found.train_config()
        found.check(CONFIG, rows=2000, widths=widths)

    check(value)  # as it was written
    forge(value)
    with pytest.raises(ValueError, match=re.escape(name)):
        check(value)


@pytest.mark.parametrize(
    ("forge", "wrong"),
    [
        (lambda m: m["tracker"].update(stopped=True), "tracker.stopped contradicts the other values"),
        (lambda m: m["point"].update(epoch=0), "point.epoch contradicts position.epoch"),
    ],
)
def test_a_forged_checkpoint_is_not_used(
    clicks: PreparedData, unfinished: Path, device: torch.device, forge: Callable[[dict[str, Any]], Any], wrong: str
) -> None:
    folder = unfinished / "checkpoints" / "step_00000020"
    reseal(folder, forge)
    reported: list[str] = []
    train(CONFIG, clicks, unfinished, device, say=reported.append)
    assert reported[:2] == [
        f"not used: {folder}: checkpoint.json: {wrong}",
        f"Resuming from step 16 of {unfinished}",
    ]


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["checkpoint.json", "__0_0.distcp", ".metadata"])
def test_a_fifo_is_refused_at_once(clicks: PreparedData, unfinished: Path, device: torch.device, name: str) -> None:
    path = unfinished / "checkpoints" / "step_00000020" / name
    path.unlink()
    os.mkfifo(path)
    reported: list[str] = []
    train(CONFIG, clicks, unfinished, device, say=reported.append)
    assert reported[0] == f"not used: {path.parent}: {name} is not a regular file"


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["config.json", "saved.json", "metrics.jsonl", "summary.json"])
def test_a_fifo_for_a_small_file(clicks: PreparedData, unfinished: Path, device: torch.device, name: str) -> None:
    (unfinished / name).unlink(missing_ok=True)
    os.mkfifo(unfinished / name)
    if name == "saved.json":
        shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        train(CONFIG, clicks, unfinished, device)
