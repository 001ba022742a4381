"""Google's and Azure's object storage, with faults and through the commands; skipped where a server is missing."""

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.faults.runs import read_tensors, records
from tests.support.s3_server import FaultProxy, Kind
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote import cache
from torchrec_deepfm.remote.objects import Objects

ROWS = 1_000
OPTIONS = [
    "--factor-dim", "3", "--over-arch-layer-sizes", "4", "--batch-size", "100", "--checkpoint-every", "3", "--max-ne",
    "100", "--epochs", "2",
]  # fmt: skip
STORES = pytest.mark.parametrize(("store", "method"), [("gs", "POST"), ("az", "PUT")])


@STORES
@pytest.mark.parametrize("kind", ["503", "reset"])
def test_a_fault_that_passes_is_not_noticed(
    store: str, method: str, kind: Kind, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    proxy: FaultProxy = request.getfixturevalue(store)
    objects = Objects(f"{store}://bucket/passing-{kind}")
    (tmp_path / "a").write_bytes(bytes(range(200)))
    for work, verb in ((lambda: objects.store(tmp_path, ["a"]), method), (lambda: objects.read("a"), "GET")):
        with proxy.fault(kind, times=1, method=verb) as met:
            work()
        assert [one[2] for one in met] == [kind]
    assert objects.read("a") == bytes(range(200))


@STORES
def test_a_fault_that_stays_is_one_line(
    store: str, method: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    proxy: FaultProxy = request.getfixturevalue(store)
    objects = Objects(f"{store}://bucket/staying")
    (tmp_path / "a").write_bytes(b"abc")
    objects.store(tmp_path, ["a"])
    for work in (objects.entries, lambda: objects.read("a"), lambda: objects.store(tmp_path, ["a"])):
        with proxy.fault("503") as met, pytest.raises(UserError) as raised:
            work()
        message = str(raised.value)
        assert message.startswith(f"{store}://bucket/staying")
        assert "can't be reached (Please reduce your request rate." in message
        assert message.endswith("check address, network and credentials, then run the same command again")
        assert "\n" not in message
        assert len(met) > 1, "it was not tried again"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert objects.read("a") == b"abc"


@STORES
def test_every_command_works_there(
    store: str, method: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Prepared, trained with an interruption, evaluated and predicted at an address: the same bits as in a folder."""
    proxy: FaultProxy = request.getfixturevalue(store)
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 50, ROWS)
    frame = {"label": (shop % 3 + rng.integers(0, 2, ROWS)) % 2, "price": rng.random(ROWS), "shop": shop.astype(str)}
    pl.DataFrame(frame).write_parquet(tmp_path / "clicks.parquet")
    (schema := tmp_path / "schema.toml").write_text('label = "label"\nnumeric = ["price"]\ncategorical = ["shop"]\n')
    there = f"{store}://bucket/job"
    Objects(there).store(tmp_path, ["clicks.parquet"])

    def run(place: str) -> None:
        raw = f"{place}/clicks.parquet"
        cli.main(["prepare", "--input", raw, "--output", f"{place}/data", "--schema", str(schema), "--min-count", "1"])
        train = ["train", "--data", f"{place}/data", "--output", f"{place}/run", *OPTIONS]
        if place == there:
            with proxy.fault("503", method=method, path="step_00000006"), pytest.raises(SystemExit) as ended:
                cli.main(train)
            assert ended.value.code == 2
            (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
            assert line.startswith(f"error: {there}/run/checkpoints/step_00000006: can't be written (Please reduce")
            stored = Objects(f"{there}/run").entries()
            assert "checkpoints/step_00000003/checkpoint.json" in stored
            assert not {"checkpoints/step_00000006/checkpoint.json", "summary.json"} & stored.keys()
            monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache_of_another_host"))
        cli.main(train)
        assert ("Resuming from step 3" in capsys.readouterr().out) == (place == there)
        cli.main(["evaluate", "--run", f"{place}/run", "--data", f"{place}/data"])
        cli.main(["predict", "--run", f"{place}/run", "--input", raw, "--output", f"{place}/predicted.parquet"])

    run(str(tmp_path))
    run(there)
    objects, copy = Objects(there), tmp_path / "copy"
    objects.fetch(objects.entries(), copy)
    for path in (tmp_path / "data").iterdir():
        if path.name != "manifest.json":  # which names the sources
            assert (copy / "data" / path.name).read_bytes() == path.read_bytes(), path.name
    found, wanted = (read_tensors(one / "run" / "checkpoint") for one in (copy, tmp_path))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert records(copy / "run") == records(tmp_path / "run")
    (evaluated,) = (tmp_path / "run").glob("evaluate*.json")
    figures = [json.loads((one / "run" / evaluated.name).read_text()) for one in (copy, tmp_path)]
    for one in figures:
        del one["data"], one["weights"]  # which name the folders
    assert figures[0] == figures[1]
    assert figures[0]["options"]
    assert pl.read_parquet(copy / "predicted.parquet").equals(pl.read_parquet(tmp_path / "predicted.parquet"))
    assert cli.main(["runs", there]) is None
    assert f"{there}/run" in capsys.readouterr().out
