"""Rows that were prepared with other vocabularies or transforms than a run are neither evaluated nor exported."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.dataset.publish import digest
from torchrec_deepfm.data.prepare.encoder_file import check_same_encoding
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.prepare.row_encoder import RowEncoder
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal


def refused(capsys: Any, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    said = str(capsys.readouterr().err)
    assert said.count("\n") == 1
    return said


def test_a_vocabulary_of_another_run(run: Path, run_data: PreparedData, tmp_path: Path, capsys: Any) -> None:
    """As many ids as the run has, of other users."""
    raw = run_data.folder.parent
    swapped = tmp_path / "train.tsv"
    lines = [line.split("\t") for line in (raw / "train.tsv").read_text().splitlines()]
    swapped.write_text(
        "".join("\t".join([*line[:3], f"{int(line[3], 16) + 500:x}", *line[4:]]) + "\n" for line in lines)
    )
    foreign = prepare([swapped], tmp_path / "foreign", test=[raw / "test.tsv"], schema=run_data.schema, min_count=1)
    assert foreign.num_embeddings == run_data.num_embeddings
    said = refused(capsys, "evaluate", "--run", run, "--data", foreign.folder)
    assert said.startswith(
        f"error: --data {foreign.folder}: column 'user' has another vocabulary than the run; name the"
    )
    said = refused(
        capsys, "export", "--run", run, "--data", foreign.folder, "--to", "torch-export", "--output", tmp_path / "p"
    )
    assert "column 'user' has another vocabulary" in said
    assert not (tmp_path / "p").exists()
    again = prepare([], tmp_path / "again", test=[raw / "test.tsv"], schema=run_data.schema, vocabulary=run_data.folder)
    main(["evaluate", "--run", str(run), "--data", str(again.folder), "--output", str(tmp_path / "e.json")])


def test_what_makes_an_encoding_another_one(tmp_path: Path) -> None:
    schema = Schema(
        label="y", numeric=("x",), categorical=("c",), layout="table", columns={"x": Column(transform="standard")}
    )
    frame = pl.DataFrame(
        {"y": [0, 1] * 50, "x": [float(i) for i in range(100)], "c": [f"v{i % 9}" for i in range(100)]}
    )

    def made(name: str, rows: pl.DataFrame, **options: Any) -> PreparedData:
        rows.write_parquet(tmp_path / f"{name}.parquet")
        options = {"schema": schema, "split": "none", "min_count": 1} | options
        return prepare([tmp_path / f"{name}.parquet"], tmp_path / name, **options)

    data = made("data", frame)
    RowEncoder.save(data, tmp_path / "encoder")
    check_same_encoding(tmp_path / "encoder", data)
    check_same_encoding(tmp_path / "encoder", made("same", frame))
    for found, match in (
        (made("c", frame.with_columns(c=pl.col("c").str.replace("v", "w"))), "column 'c' has another vocabulary"),
        (made("x", frame.with_columns(x=pl.col("x") * 2)), "column 'x' was transformed in another way"),
        (made("h", frame, hash=True, num_embeddings=(10,), min_count=None), "was hashed, unlike the run's"),
    ):
        with pytest.raises(UserError, match=match):
            check_same_encoding(tmp_path / "encoder", found)
    # The bytes of a vocabulary depend on what wrote it; its values count.
    path, file = tmp_path / "encoder" / "vocabulary_0.parquet", tmp_path / "encoder" / "encoder.json"
    pl.read_parquet(path).write_parquet(path, compression="lz4")
    file.write_bytes(seal(json.loads(file.read_text()) | {"files": {path.name: digest(path)}}))
    check_same_encoding(tmp_path / "encoder", data)
