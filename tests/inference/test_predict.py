"""``predict``: files of raw rows in, a Parquet file of probabilities out."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import polars as pl
import pytest
import torch.distributed as dist
from sklearn.metrics import roc_auc_score

import torchrec_deepfm
from tests.inference.test_load import by_hand, read_raw
from tests.support.fork import Fork
from tests.support.ranks import run_ranks
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.prepare.workers import Workers
from torchrec_deepfm.distributed import process_group
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference import predict as module
from torchrec_deepfm.inference.load import Predictor, load, load_sharded
from torchrec_deepfm.inference.predict import open_sources, predict_files
from torchrec_deepfm.inference.scorer import ModelScorer


@pytest.fixture(scope="session")
def text(run_data: PreparedData) -> Path:
    """300 labelled rows as Criteo's text."""
    return run_data.folder.parent / "test.tsv"


def small_pieces() -> None:
    module._PIECE_BYTES = 1000
    module._PIECE_ROWS = 40


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(module, "_PIECE_ROWS", 40)


def probabilities(path: Path) -> list[float | None]:
    return pl.read_parquet(path)["probability"].to_list()


@pytest.mark.usefixtures("small")
def test_the_command(run: Path, run_data: PreparedData, text: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "p.parquet"
    command = ["predict", "--run", str(run), "--input", str(text), "--output", str(output), "--keep", "label", "user"]
    main(command)
    found = pl.read_parquet(output)
    assert found.columns == ["label", "user", "probability"]
    assert found["label"].to_list() == read_raw(text)["label"].to_list()
    assert [int(user, 16) for user in found["user"]] == [int(user, 16) for user in read_raw(text)["user"]]
    assert np.abs(found["probability"].to_numpy() - by_hand(run, run_data, "test")).max() <= 1e-6
    measured = json.loads((run / "summary.json").read_text())["test"]["auc"]
    assert roc_auc_score(found["label"], found["probability"]) == pytest.approx(measured, abs=1e-9)
    assert list(tmp_path.iterdir()) == [output]
    main(command)
    assert "p.parquet: is finished already: 300 rows" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_every_kind_of_file(predictor: Predictor, text: Path, tmp_path: Path) -> None:
    frame = read_raw(text)
    predict_files(predictor, [str(text)], tmp_path / "expected.parquet")
    expected = np.array(probabilities(tmp_path / "expected.parquet"))
    frame.write_parquet(tmp_path / "a.parquet")
    frame.drop("label").write_csv(tmp_path / "a.csv")
    frame.drop("label").write_csv(tmp_path / "unlabelled.txt", separator="\t", include_header=False)
    for filesystem, name in ((fsspec.filesystem("memory"), "/rows.tsv"), (fsspec.filesystem("memory"), "/rows.csv")):
        local = text if name.endswith("tsv") else tmp_path / "a.csv"
        filesystem.pipe_file(name, local.read_bytes())
    named = [str(tmp_path / name) for name in ("a.parquet", "a.csv", "unlabelled.txt")]
    for i, one in enumerate([*named, "memory://rows.tsv", "memory://rows.csv"]):
        predict_files(predictor, [one], tmp_path / f"{i}.parquet")
        assert np.abs(np.array(probabilities(tmp_path / f"{i}.parquet")) - expected).max() <= 1e-6, one
    predict_files(predictor, named[:2], tmp_path / "both.parquet", keep=("row",))
    both = pl.read_parquet(tmp_path / "both.parquet")
    assert both["row"].cast(pl.Int64).to_list() == 2 * frame["row"].to_list()
    assert np.abs(both["probability"].to_numpy() - np.tile(expected, 2)).max() <= 1e-6


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_bad_row(predictor: Predictor, text: Path, tmp_path: Path, name: str) -> None:
    predict_files(predictor, [str(text)], tmp_path / "expected.parquet")
    expected = probabilities(tmp_path / "expected.parquet")
    lines = text.read_text().splitlines()
    lines[50] = lines[50].replace("\t", "\tx", 1)
    lines[250] += "\t0"
    tab = "\n".join(lines) + "\n"
    path = tmp_path / name
    path.write_text(tab if name == "a.tsv" else "label,row,noise,user,item,shop\n" + tab.replace("\t", ","))
    with pytest.raises(UserError, match=r"a\.(tsv: line 51|csv: row 52), column '?row'?: 'x20050' is n"):
        predict_files(predictor, [str(path)], tmp_path / "p.parquet")
    assert not (tmp_path / ".p.parquet.partial").exists()
    found = predict_files(predictor, [str(path)], tmp_path / "p.parquet", keep=["item"], on_bad_row="skip")
    assert (found.rows, found.bad) == (300, 2)
    frame = pl.read_parquet(tmp_path / "p.parquet")
    assert [row for row, value in enumerate(frame["probability"]) if value is None] == [50, 250]
    assert [a for a in frame["probability"] if a is not None] == pytest.approx(
        [value for row, value in enumerate(expected) if row not in (50, 250)], abs=1e-6
    )
    items = [int(value, 16) for value in read_raw(text)["item"]]
    kept = [None if value is None else int(value, 16) for value in frame["item"]]
    assert all(kept[row] == items[row] for row in range(300) if row not in (50, 250))


def on_ranks(run: str, text: str, output: str) -> int:
    small_pieces()
    ranks = Workers(rank=dist.get_rank(), count=dist.get_world_size(), gather=process_group.gather)
    return predict_files(load(run), [text], Path(output), ranks=ranks).rows


def sharded_on_ranks(run: str, text: str, output: str) -> list[int]:
    small_pieces()
    ranks = Workers(rank=dist.get_rank(), count=dist.get_world_size(), gather=process_group.gather)
    predictor = load_sharded(Path(run))
    written = predict_files(predictor, [text], Path(output), ranks=ranks).rows
    bad = Path(output).with_name("bad.tsv")
    if ranks.is_main:
        lines = Path(text).read_text().splitlines()
        lines[100] = "9" + lines[100]
        bad.write_text("\n".join(lines) + "\n")
    process_group.gather(None)
    with pytest.raises(UserError, match="line 101, column label"):  # on every rank, none hangs
        predict_files(predictor, [str(bad)], Path(output).with_name("none.parquet"), ranks=ranks)
    model = predictor.score._model  # type: ignore[union-attr]
    local = [p for name, p in model.sparse_arch.named_parameters() if "weight" in name]
    return [written, sum(each.numel() for each in local)]


@pytest.mark.usefixtures("small")
def test_sharded_tables_end_in_the_same_bytes(predictor: Predictor, run: Path, text: Path, tmp_path: Path) -> None:
    predict_files(predictor, [str(text)], tmp_path / "p.parquet")
    output = tmp_path / "ranks" / "p.parquet"
    output.parent.mkdir()
    found = run_ranks(sharded_on_ranks, 2, str(run), str(text), str(output))
    assert [rows for rows, _ in found] == [300, 300]
    assert output.read_bytes() == (tmp_path / "p.parquet").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == ["bad.tsv", "p.parquet"]
    whole = sum(each.numel() for each in torchrec_deepfm.load_model(run).sparse_arch.parameters())
    assert all(local < whole for _, local in found)


@pytest.mark.usefixtures("small")
def test_ranks_and_resumed_calls_end_in_the_same_bytes(
    predictor: Predictor, run: Path, text: Path, tmp_path: Path
) -> None:
    predict_files(predictor, [str(text)], tmp_path / "p.parquet")
    expected = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "ranks").mkdir()
    output = tmp_path / "ranks" / "p.parquet"
    assert run_ranks(on_ranks, 2, str(run), str(text), str(output)) == [300, 300]
    assert output.read_bytes() == expected

    calls = 0

    def stopped(rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return predictor.score(rows)

    (tmp_path / "stopped").mkdir()
    output = tmp_path / "stopped" / "p.parquet"
    with pytest.raises(KeyboardInterrupt):
        predict_files(replace(predictor, score=stopped), [str(text)], output)
    assert not output.exists()
    pieces = len(list((tmp_path / "stopped" / ".p.parquet.partial").glob("part_*")))
    assert pieces == 3
    calls = 100
    predict_files(replace(predictor, score=stopped), [str(text)], output)
    whole = calls - 100 + pieces
    assert whole == -(-text.stat().st_size // 1000)
    assert [float(np.float32(one or 0)) for one in probabilities(tmp_path / "p.parquet")] == probabilities(output)


def killed_in_the_third_piece(run: str, text: str, output: str) -> None:
    small_pieces()
    predictor, calls = load(run), 0

    def score(rows: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return predictor.score.logits(rows)  # type: ignore[attr-defined]

    killed = cast("Any", ModelScorer.__new__(ModelScorer))
    killed.logits = score
    predict_files(replace(predictor, score=killed), [text], Path(output), keep=["user"])


@pytest.mark.usefixtures("small")
def test_a_killed_call_is_resumed_to_the_same_bytes(
    predictor: Predictor, run: Path, text: Path, tmp_path: Path
) -> None:
    predict_files(predictor, [str(text)], tmp_path / "whole.parquet", keep=["user"])
    (tmp_path / "killed").mkdir()
    output = tmp_path / "killed" / "p.parquet"
    script = tmp_path / "killed.py"
    script.write_text(
        f"from {__name__} import *\nkilled_in_the_third_piece({str(run)!r}, {str(text)!r}, {str(output)!r})"
    )
    assert Fork([str(script)], env=os.environ).wait(60) == -signal.SIGKILL
    assert not output.exists()
    assert len(list((output.parent / ".p.parquet.partial").glob("part_*"))) == 2
    scored = []

    def counting(rows: Any) -> Any:
        scored.append(len(rows))
        return predictor.score.logits(rows)  # type: ignore[attr-defined]

    resumed = cast("Any", ModelScorer.__new__(ModelScorer))
    resumed.logits = counting
    assert predict_files(replace(predictor, score=resumed), [str(text)], output, keep=["user"]).rows == 300
    assert 0 < sum(scored) < 300
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert list(output.parent.iterdir()) == [output]


def test_two_calls_at_once(predictor: Predictor, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)

    def second(rows: Any) -> Any:
        with pytest.raises(UserError, match=r"another predict is writing it; wait for its end, or name another file$"):
            predict_files(predictor, [str(text)], output)
        return predictor.score(rows)

    output = tmp_path / "p.parquet"
    assert predict_files(replace(predictor, score=second), [str(text)], output).rows == 300
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_rank_parses_its_own_pieces(text: Path, predictor: Predictor, tmp_path: Path, ending: str) -> None:
    """The others are read, and their lines counted, so that messages name the right ones."""
    path = tmp_path / "rows.tsv"
    path.write_bytes(text.read_text().replace("\n", ending).encode())
    [source] = open_sources(predictor.encoder, [str(path)])
    start = {"start": 0, "line": 0, "skip_bad": False}
    every = list(source.pieces(**start))
    odd = list(source.share(**start, mine=lambda number: number % 2 == 1))
    assert len(odd) == len(every) > 4
    for number, (found, expected) in enumerate(zip(odd, every, strict=True)):
        if number % 2 == 0:
            assert found is None
        else:
            assert (found.end, found.line, found.done) == (expected.end, expected.line, expected.done)
            assert found.frame.equals(expected.frame)


def test_refusals(run: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken.parquet").write_bytes(b"mine")
    pl.DataFrame({"row": [1.0]}).write_parquet(tmp_path / "lacks.parquet")
    one, out = str(text), str(tmp_path / "p.parquet")
    for words, message in [
        (["--run", str(tmp_path), "--input", one, "--output", out], "not a run folder"),
        (["--input", one, "--output", out], "--run, --package: name one of the two"),
        (["--package", str(run), "--input", one, "--output", out], "not a package (no package.json)"),
        (["--run", str(run), "--input", "gone.tsv", "--output", out], "gone.tsv: no such file; check the path"),
        (["--run", str(run), "--input", str(tmp_path / "lacks.parquet"), "--output", out], "no column 'noise'"),
        (["--run", str(run), "--input", one, "--output", str(tmp_path / "taken.parquet")], "the file exists;"),
        (["--run", str(run), "--input", one, "--output", str(tmp_path / "no" / "p")], "its folder does not exist"),
        (
            ["--run", str(run), "--input", one, "--output", str(tmp_path / "p.csv")],
            "will be Parquet; name it p.parquet",
        ),
        (["--run", str(run), "--input", one, "--output", out, "--keep", "usr"], "(did you mean 'user'?)"),
        (["--run", str(run), "--input", one, "--output", out, "--keep", "probability"], "of this name already"),
        (["--run", str(run), "--input", one, "--output", one], "this command reads or writes that file already"),
        (["--run", str(run), "--input", one, "--output", out, "--checkpoint", "3"], "no such checkpoint"),
        (["--run", str(run), "--input", one, "--output", out, "--shard-tables", "always"], "there is one rank; start"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["predict", *words])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lacks.parquet", "taken.parquet"]
    assert (tmp_path / "taken.parquet").read_bytes() == b"mine"
