"""``export``: a package scores as its run does, in other runtimes, or is not written at all."""

import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

import torchrec_deepfm
from torchrec_deepfm import DeepFM, embedding_tables
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.inference.export import export as module
from torchrec_deepfm.inference.export.export import export
from torchrec_deepfm.inference.export.graph import ScoringGraph, Tables

# Blocks what a machine that only has the package lacks, and runs the README's second block.
ALONE = """
import sys
for name in ("torch", "torchrec", "torchrec_deepfm", "fbgemm_gpu"):
    sys.modules[name] = None
text = open("README.md", encoding="utf-8").read()
lines = text.split("```python\\n")[-1].split("```")[0].replace("print(", "found = (")
exec(lines)
import json, numpy as np
given = json.load(open(sys.argv[1]))
types = {entry.name: entry.type for entry in session.get_inputs()}
arrays = {n: np.array(v, np.float32 if "float" in types[n] else np.int64) for n, v in given.items()}
print(json.dumps(session.run(["probability"], arrays)[0].tolist()))
"""


def test_the_command_prints_the_parity(
    run: Path, frame: pl.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["export", "--run", str(run), "--output", str(tmp_path / "p"), "--to", "torch-export"])
    said = capsys.readouterr().out
    assert "tables: " in said
    assert "parity on " in said
    found = torchrec_deepfm.load(tmp_path / "p").predict(frame)
    assert np.abs(found - torchrec_deepfm.load(run).predict(frame)).max() <= 1e-6
    check_explains(tmp_path / "p", run, frame)
    run_readme(tmp_path / "p", monkeypatch)
    with zipfile.ZipFile(tmp_path / "p" / "model.pt2") as archive:  # none of its files is a pickle
        assert not any(archive.read(name).startswith(b"\x80\x02") for name in archive.namelist())


def test_onnx_scores_as_the_run(run: Path, onnx: Path, frame: pl.DataFrame) -> None:
    predictor = torchrec_deepfm.load(onnx)
    expected = torchrec_deepfm.load(run).predict(frame)
    found = predictor.predict(frame)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-6
    for size in (0, 1, 7):
        assert np.abs(predictor.predict(frame[:size]) - expected[:size]).max(initial=0) <= 1e-6


def check_explains(package: Path, run: Path, frame: pl.DataFrame, most: float = 1e-6) -> None:
    """Compare every part of the logits with the run's own; see ``test_explain`` for these."""
    found, expected = (torchrec_deepfm.load(each).explain(frame[:30]) for each in (package, run))
    assert found.parts.bias == expected.parts.bias
    for part in ("first_order", "factors", "deep"):
        assert np.abs(getattr(found.parts, part) - getattr(expected.parts, part)).max() <= most, part
    assert np.abs(found.probabilities - torchrec_deepfm.load(package).predict(frame[:30])).max() <= 1e-6
    assert found.values == expected.values


def test_a_package_explains_as_its_run(
    onnx: Path, run: Path, run_data: PreparedData, frame: pl.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    check_explains(onnx, run, frame)
    assert torchrec_deepfm.load(onnx).explain(frame[:0]).logits.shape == (0,)
    text = str(run_data.folder.parent / "test.tsv")
    said = []
    for which in (["--package", str(onnx)], ["--run", str(run)]):
        main(["explain", *which, "--input", text])
        said.append([line.split()[:-1] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1]  # except the last figure of a line
    assert len(said[0]) > 20


def run_readme(package: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Run the blocks of a package's README as typed in its folder; return what they define."""
    monkeypatch.chdir(package)
    found = []
    for block in (package / "README.md").read_text().split("```python\n")[1:]:
        found.append({})
        exec(block.split("```")[0], found[-1])
    return found


def test_aoti(
    run: Path, run_data: PreparedData, frame: pl.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Compiles for some ten seconds of CPU time, a second less without optimizing what surrounds the kernels."""
    monkeypatch.setattr("torch._inductor.config.aot_inductor.compile_wrapper_opt_level", "O0")
    monkeypatch.setitem(module.MAX_AUC_LOSS, "int8", 0.01)  # a few hundred rows: their AUC is not that exact
    package = tmp_path / "p"
    main(["export", "--run", str(run), "--output", str(package), "--to", "aoti", "--tables", "int8"])
    said = capsys.readouterr()
    assert re.search(r"^tables: .* in training, .* as int8$", said.out, re.M)
    assert re.search(r"^parity on 300 rows of .*: largest difference .*, AUC 0.\d+ \(loss [+-]0.00", said.out, re.M)
    assert said.err == ""
    predictor, expected = torchrec_deepfm.load(package), torchrec_deepfm.load(run).predict(frame)
    found = predictor.predict(frame)
    assert 0 < np.abs(found - expected).max() < 0.01
    for size in (0, 1, 7):
        assert np.abs(predictor.predict(frame[:size]) - found[:size]).max(initial=0) <= 1e-6
    check_explains(package, run, frame, most=0.02)
    text = str(run_data.folder.parent / "test.tsv")
    main(["predict", "--package", str(package), "--input", text, "--output", str(tmp_path / "p.parquet")])
    assert np.abs(pl.read_parquet(tmp_path / "p.parquet")["probability"].to_numpy() - found).max() <= 1e-6
    rows = predictor.encoder.encode(frame)
    rows.sparse[5, 1] = 10**6
    with pytest.raises(UserError, match=r"^column 'item': id 1000000 is not one of 0 to "):
        predictor.score(rows)
    capsys.readouterr()
    raw, arrays = run_readme(package, monkeypatch)
    assert raw["predictor"].predict([raw["row"]]).shape == (1,)  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    assert "row 1: probability 0." in printed
    assert re.search(r"tensor\(\[0\.\d+, 0\.\d+\]\)", printed)
    assert list(arrays["inputs"]) == ["dense", "ids"]  # type: ignore[call-overload]


def test_without_a_compiler(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"^--to aoti: no C\+\+ compiler was found"):
        export(run, tmp_path / "p", to="aoti")
    assert list(tmp_path.iterdir()) == []


def test_onnx_runs_without_torch_and_this_package(onnx: Path, run: Path, frame: pl.DataFrame, tmp_path: Path) -> None:
    rows = torchrec_deepfm.load(run).encoder.encode(frame[:50])
    (tmp_path / "rows.json").write_text(json.dumps({"dense": rows.dense.tolist(), "ids": rows.sparse.tolist()}))
    words = [sys.executable, "-c", ALONE, str(tmp_path / "rows.json")]
    done = subprocess.run(words, cwd=onnx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = torchrec_deepfm.load(run).predict(frame[:50])
    assert json.loads(done.stdout) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("tables", ["fp16", "int8", "int4"])
def test_small_tables_lose_little(
    tables: Tables, run: Path, frame: pl.DataFrame, run_data: PreparedData, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(module.MAX_AUC_LOSS, tables, 0.01)  # a few hundred rows: their AUC is not that exact
    done = export(run, tmp_path / "p", to="onnx", tables=tables)
    share = {"fp16": 14, "int8": 6 + 4 + 2, "int4": 3 + 4 + 2}[tables] / 32  # of 8 float32 columns: 6 of v, 1 of w
    assert done.bytes_after == share * done.bytes_before
    found, expected = (torchrec_deepfm.load(each).predict(frame) for each in (tmp_path / "p", run))
    assert 0 < np.abs(found - expected).max() < {"fp16": 0.001, "int8": 0.01, "int4": 0.1}[tables]


def test_nothing_is_written_where_the_scores_differ(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DIFFERENCE", -1.0)  # below what any rounding makes up for
    with pytest.raises(UserError, match="would not score as the run does; nothing was written"):
        export(run, tmp_path / "p", to="torch-export")
    monkeypatch.setitem(module.MAX_AUC_LOSS, "int8", -1.0)
    with pytest.raises(UserError, match=r"--tables int8: parity .* nothing was written; take --tables fp32$"):
        export(run, tmp_path / "p", to="torch-export", tables="int8")
    assert list(tmp_path.iterdir()) == []


def test_damage(onnx: Path, tmp_path: Path) -> None:
    def copy(name: str, change: object) -> Path:
        folder = tmp_path / name
        subprocess.run(["cp", "-r", str(onnx), str(folder)], check=True)
        change(folder)  # type: ignore[operator]
        return folder

    def newer(folder: Path) -> None:
        content = json.loads((folder / "package.json").read_text())
        (folder / "package.json").write_text(json.dumps(content | {"format_version": 3}))

    def older(folder: Path) -> None:
        content = json.loads((folder / "package.json").read_text())
        (folder / "package.json").write_text(json.dumps(content | {"format_version": 1}))

    def flip(folder: Path) -> None:
        content = bytearray((folder / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "model.onnx").write_bytes(content)

    for name, change, message in (
        ("none", lambda folder: (folder / "package.json").unlink(), "not a run folder"),
        ("newer", newer, "format_version is 3, this version reads up to 2; update"),
        ("older", older, "an earlier version wrote this package, .*; export the run again"),
        ("flipped", flip, "model.onnx: the file is damaged"),
        ("missing", lambda folder: (folder / "encoder" / "encoder.json").unlink(), "encoder.json: can't be read"),
        ("edited", lambda folder: (folder / "package.json").write_text("{}"), "package.json: the file is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            torchrec_deepfm.load(copy(name, change))


def test_an_encoder_of_another_run(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    path = own / "encoder" / "encoder.json"
    path.write_bytes(seal(json.loads(path.read_text()) | {"minimum": -7}))
    with pytest.raises(UserError, match=r"encoder: the encoder is of another run; restore the folder, or train again$"):
        export(own, tmp_path / "p", to="torch-export")
    (own / "encoder" / "vocabulary_1.parquet").unlink()
    shutil.copyfile(run / "encoder" / "encoder.json", path)
    with pytest.raises(UserError, match=rf"^{own}/encoder/vocabulary_1.parquet: the vocabulary can't be read"):
        export(own, tmp_path / "p", to="torch-export")
    shutil.rmtree(own / "encoder")
    with pytest.raises(UserError, match="encoder: the folder is missing"):
        export(own, tmp_path / "p", to="torch-export")
    assert not (tmp_path / "p").exists()


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for words, message in (
        (["--run", str(tmp_path), "--output", str(tmp_path / "p")], "not a run folder"),
        (["--run", str(run), "--output", str(tmp_path / "full")], "not empty"),
        (["--run", str(run), "--output", str(tmp_path / "p"), "--checkpoint", "1"], "no such checkpoint"),
        (["--run", str(run), "--output", str(tmp_path / "p"), "--data", str(tmp_path / "full")], "full"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *words, "--to", "torch-export"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


SIZES = {"b": 5, "tags": 40, "a": 9, "words": 30}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_graph_is_the_model_with_bags(weighted: bool) -> None:
    torch.manual_seed(3)

    def fresh() -> DeepFM:
        ebc = EmbeddingBagCollection(tables=embedding_tables(SIZES, 3), is_weighted=weighted)
        return DeepFM(ebc, 2, (6,), 3, dropout=0.0).eval()

    model = fresh()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    copied = fresh()
    copied.load_state_dict(model.state_dict())
    graph, draw, rows = ScoringGraph(copied, ("tags", "words")), random.Random(0), 33
    bags = {
        name: [[draw.randrange(SIZES[name]) for _ in range(draw.randint(0, 3))] for _ in range(rows)] for name in SIZES
    }
    for name in ("a", "b"):
        bags[name] = [[draw.randrange(SIZES[name])] for _ in range(rows)]
    flat = {name: torch.tensor([i for bag in of for i in bag]) for name, of in bags.items()}
    lengths = {name: torch.tensor([len(bag) for bag in of]) for name, of in bags.items()}
    given = {name: torch.rand(len(flat[name])) if name in ("tags", "words") else torch.ones(rows) for name in SIZES}
    kjt = KeyedJaggedTensor(
        keys=list(SIZES), values=torch.cat(list(flat.values())), lengths=torch.cat(list(lengths.values())),
        weights=torch.cat(list(given.values())) if weighted else None,
    )  # fmt: skip
    dense = torch.randn(rows, 2)
    inputs = {
        "dense": dense,
        "ids": torch.stack([flat["b"], flat["a"]], dim=1),
        "values": torch.cat([flat["tags"], flat["words"]]),
        "lengths": torch.stack([lengths["tags"], lengths["words"]]),
    }
    if weighted:
        inputs["weights"] = torch.cat([given["tags"], given["words"]])
    assert graph.inputs == tuple(inputs)
    expected = torch.sigmoid(model(dense, kjt)).squeeze(1)
    torch.testing.assert_close(graph(**inputs)["probability"], expected, rtol=0, atol=1e-6)
    inputs["ids"][4, 0] = SIZES["b"]  # the next table's first row
    wrong = graph(**inputs)["probability"]
    assert wrong.isnan().nonzero().flatten().tolist() == [4]
