"""``explain``: the parts of a logit, against sums in plain Python; which fields matter, against shuffles by hand."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec import EmbeddingBagCollection

from tests.inference.test_load import read_raw
from torchrec_deepfm import DeepFM, embedding_tables, load, load_model
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.row_reader import CopiedBags
from torchrec_deepfm.data.prepare.row_encoder import EncodedRows
from torchrec_deepfm.data.schema import Column, Schema
from torchrec_deepfm.inference.explain import explain_rows
from torchrec_deepfm.inference.scorer import ModelScorer


def test_the_parts_of_a_row(run: Path, run_data: PreparedData) -> None:
    """By the equation, from the weights themselves."""
    predictor, model = load(run), load_model(run)
    frame = read_raw(run_data.folder.parent / "test.tsv").drop("label")[:5]
    found = predictor.explain(frame)
    assert found.fields == ("row", "noise", "user", "item", "shop")
    assert found.values[0] == tuple(
        [str(frame["row"][0]), str(frame["noise"][0])]
        + [f"{int(frame[name][0], 16):08x}" for name in ("user", "item", "shop")]
    )
    encoded, state = predictor.encoder.encode(frame), model.state_dict()
    tables = [state[f"sparse_arch.embedding_bag_collection.embedding_bags.t_{n}.weight"] for n in found.fields[2:]]
    for row in range(5):
        fields = [x * state["dense_arch.rows"][j].double() for j, x in enumerate(encoded.dense[row].tolist())]
        fields += [table[id_].double()[:7] for table, id_ in zip(tables, encoded.sparse[row].tolist(), strict=True)]
        vectors = [field[:6] for field in fields]
        with torch.no_grad():
            deep = float(model.over_arch(torch.cat(vectors).float()[None]))  # type: ignore[misc]
        assert found.parts.bias == float(state["bias"])
        assert found.parts.first_order[row].tolist() == pytest.approx([float(field[6]) for field in fields], abs=1e-6)
        pairs = {(i, j): float(vectors[i] @ vectors[j]) for i in range(5) for j in range(i + 1, 5)}
        listed = found.pairs(row)
        assert {(i, j): product for i, j, product in listed} == pytest.approx(pairs, abs=1e-6)
        assert [abs(product) for _, _, product in listed] == sorted((abs(p) for _, _, p in listed), reverse=True)
        assert found.parts.deep[row] == pytest.approx(deep, abs=1e-6)
        lines = found.table().filter(pl.col("row") == row)
        probability = float(predictor.predict(frame)[row])
        assert math.fsum(lines["contribution"]) == pytest.approx(math.log(probability / (1 - probability)), abs=2e-6)
        assert found.logits[row] == pytest.approx(float(predictor.score.logits(encoded)[row]), abs=1e-6)  # type: ignore
        rest = found.parts.bias + found.parts.deep[row]
        assert found.contributions()[row].sum() + rest == pytest.approx(found.logits[row], abs=1e-9)


@pytest.mark.parametrize("terms", [("linear",), ("linear", "fm"), ("deep",), ("fm", "deep")])
def test_terms_and_lists(terms: tuple[Any, ...]) -> None:
    schema = Schema(
        label="y", numeric=(), categorical=("a", "b"), columns={"b": Column(list=True, weights="w")}, layout="table"
    )
    torch.manual_seed(0)
    tables = EmbeddingBagCollection(tables=embedding_tables({"a": 9, "b": 9}, factor_dim=3), is_weighted=True)
    model = DeepFM(tables, 0, (8,), 3, terms=terms).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    bags = CopiedBags(ids=np.int32([1, 2, 8]), lengths=np.int64([2, 0, 1]), weights=np.float32([0.5, -1, 2]))
    rows = EncodedRows(dense=np.empty((3, 0), "f"), sparse=np.int32([[1], [2], [3]]), bags={"b": bags}, bad={})
    scorer = ModelScorer(model, schema)
    found = explain_rows(scorer, rows, [("1", "[]")] * 3)
    assert found.logits.tolist() == pytest.approx(scorer.logits(rows).tolist(), abs=2e-6)
    assert ("linear" in terms) == bool(found.parts.first_order.any())
    assert ("fm" in terms) == bool(found.parts.factors.any())
    assert ("deep" in terms) == bool(found.parts.deep.any())


def test_the_command(run: Path, run_data: PreparedData, tmp_path: Path, capsys: Any) -> None:
    text = run_data.folder.parent / "test.tsv"
    words = ["--run", str(run), "--input", str(text), "--rows", "2", "--output", str(tmp_path / "e.parquet")]
    main(["explain", *words, "--page", str(tmp_path / "e.html")])
    shown = capsys.readouterr().out
    frame, predictor = read_raw(text), load(run)
    probability = predictor.predict(frame)
    assert f"row 1: probability {probability[0]:.5f}" in shown
    parts = pl.read_parquet(tmp_path / "e.parquet")
    sums = parts.group_by("row", maintain_order=True).agg(pl.col("contribution").sum())["contribution"]
    assert (1 / (1 + np.exp(-sums.to_numpy()))).tolist() == pytest.approx(probability[:2].tolist(), abs=1e-6)
    fields = pl.read_parquet(tmp_path / "e_fields.parquet")
    measured = dict(zip(fields["field"], fields["auc_loss"], strict=True))
    order = np.random.default_rng(0).permutation(len(frame))
    auc = roc_auc_score(frame["label"], probability)
    for name in ("row", "user", "shop"):
        moved = frame.with_columns(frame[name].gather(order))
        expected = auc - roc_auc_score(frame["label"], predictor.predict(moved))
        assert measured[name] == pytest.approx(expected, abs=1e-4)
    assert fields["auc_loss"].is_sorted(descending=True)
    html = (tmp_path / "e.html").read_text()
    assert "Row 2" in html
    assert f"user={int(frame['user'][0], 16):08x}" in html
    frame.drop("label").write_parquet(tmp_path / "unlabelled.parquet")
    main(["explain", "--run", str(run), "--input", str(tmp_path / "unlabelled.parquet"), "--rows", "0"])
    assert "user" in capsys.readouterr().out


def test_the_commands_of_the_page(run: Path, run_data: PreparedData, tmp_path: Path, monkeypatch: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(run)
    (tmp_path / "data" / "clicks").mkdir(parents=True)
    (tmp_path / "data" / "clicks" / "test.tsv").write_bytes((run_data.folder.parent / "test.tsv").read_bytes())
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 2
    for command in commands:
        main(command.removeprefix("python -m torchrec_deepfm ").split())
    assert {"predictions.parquet", "parts.parquet", "explain.html"} <= {path.name for path in tmp_path.iterdir()}
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    frame = read_raw(tmp_path / "data" / "clicks" / "test.tsv")
    predicted = pl.read_parquet("predictions.parquet")["probability"].to_numpy()
    assert np.abs(names["score"](run, frame) - predicted).max() <= 1e-6


def test_more_rows_than_the_importance_takes(run: Path, run_data: PreparedData, capsys: Any) -> None:
    text = run_data.folder.parent / "test.tsv"
    main(["explain", "--run", str(run), "--input", str(text), "--rows", "7", "--importance-rows", "5"])
    said = capsys.readouterr().out
    assert "row 7: probability" in said
    assert "over 5 rows" in said


def test_refusals(run: Path, run_data: PreparedData, tmp_path: Path, capsys: Any) -> None:
    text = str(run_data.folder.parent / "test.tsv")
    (tmp_path / "e_fields.parquet").write_text("mine")
    (tmp_path / "e.html").write_text("mine")
    for words, message in [
        (["--run", str(run), "--input", text, "--output", str(tmp_path / "e.csv")], "name it e.parquet"),
        (
            ["--run", str(run), "--input", text, "--output", str(tmp_path / "e.parquet")],
            "e_fields.parquet: the file exists",
        ),
        (
            ["--run", str(run), "--input", text, "--page", str(tmp_path / "e.html")],
            "e.html: the file exists; name another",
        ),
        (
            ["--run", str(run), "--input", text, "--page", "a.parquet", "--output", "a.parquet"],
            "writes that file already",
        ),
        (["--run", str(tmp_path), "--input", "a.tsv"], "not a run folder"),
        (["--run", str(run), "--input", "gone.tsv"], "gone.tsv: no such file"),
        (["--run", str(run), "--input", "a.tsv", "--rows", "-1"], "--rows -1: must be at least 0"),
        (["--run", str(run), "--input", "a.tsv", "--page", str(tmp_path)], "this is a folder"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["explain", *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
