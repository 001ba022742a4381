"""``evaluate`` on a prepared folder: its figures against scikit-learn and plain Python, one rank against two."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import log_loss, roc_auc_score

from tests.evaluation.test_ranking import by_loops
from tests.support.ranks import CPU, run_ranks
from torchrec_deepfm import load_model
from torchrec_deepfm.cli import main as cli_main
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.evaluation.evaluate import evaluate_run
from torchrec_deepfm.evaluation.options import EvaluateOptions
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.scoring.evaluation import gather_predictions
from torchrec_deepfm.training.trainer import train

USER, COUNTRY = "C14", "C6"
SHARED = {"by_user": USER, "by": (COUNTRY,), "k": (1, 5), "bootstrap": 50, "seed": 3, "slices": 4}


def train_two(data: Path, folder: Path) -> None:
    config = TrainConfig(factor_dim=4, over_arch_layer_sizes=(16,), dropout=0.0, batch_size=96)
    for seed in (0, 1):
        train(TrainConfig(**{**config.__dict__, "seed": seed}), PreparedData.open(data), folder / f"run_{seed}", CPU)


def evaluate_on_ranks(data: Path, folder: Path, output: Path) -> dict[str, Any]:
    options = EvaluateOptions(**SHARED, compare=folder / "run_1", output=output)  # type: ignore[arg-type]
    return evaluate_run(folder / "run_0", PreparedData.open(data), CPU, options)


def scattered(rows: int, batch_size: int) -> tuple[list[float], list[float]] | None:
    """Row i has the logit i and the label i % 2, wherever the ranks hold it."""
    step = batch_size * dist.get_world_size()
    mine = [i for i in range(rows) if i % step // batch_size == dist.get_rank()]
    logits = torch.tensor(mine, dtype=torch.float32)
    found = gather_predictions(logits, logits % 2, batch_size)
    return None if found is None else (found.logits.tolist(), found.labels.tolist())


def evaluate_raw(data: Path, folder: Path, output: Path) -> dict[str, Any]:
    options = EvaluateOptions(**SHARED, compare=folder / "run_1", output=output)  # type: ignore[arg-type]
    return evaluate_run(folder / "run_0", raw_files(data), CPU, options)


def raw_files(data: Path) -> list[str]:
    """What the test split was prepared from."""
    return sorted(str(path) for path in (data.parent / "raw").glob("test*.tsv"))


def on_two_ranks(data: Path, folder: Path) -> dict[str, Any]:
    return {
        "raw": evaluate_raw(data, folder, folder / "raw_two.json"),
        "result": evaluate_on_ranks(data, folder, folder / "two.json"),
        "scattered": {(rows, size): scattered(rows, size) for rows in (3, 8, 29) for size in (1, 4, 10)},
    }


@pytest.fixture(scope="module")
def runs(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(train_two, 1, data.folder, folder)
    return folder


@pytest.fixture(scope="module")
def one(runs: Path, data: PreparedData) -> dict[str, Any]:
    return run_ranks(evaluate_on_ranks, 1, data.folder, runs, runs / "one.json")[0]


@pytest.fixture(scope="module")
def two(runs: Path, data: PreparedData, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, data.folder, runs)


@pytest.fixture(scope="module")
def rows(runs: Path, data: PreparedData) -> dict[str, Any]:
    """Logits of both runs by the unsharded model, labels and ids, in the order of the rows."""
    loader = Loader(data, "test", batch_size=data.rows("test"))
    [batch] = loader
    found: dict[str, Any] = {"labels": batch.labels.numpy()}
    for seed in (0, 1):
        with torch.inference_mode():
            model = load_model(runs / f"run_{seed}")
            found[seed] = model(batch.dense_features, batch.sparse_features).squeeze(1).numpy()
    for name in (USER, COUNTRY):
        found[name] = batch.sparse_features[name].values().numpy()
    return found


def metrics(logits: Any, labels: Any) -> dict[str, float]:
    predicted, rate = 1 / (1 + np.exp(-logits.astype(np.float64))), labels.mean()
    loss = log_loss(labels, predicted)
    return {
        "auc": roc_auc_score(labels, logits),
        "logloss": loss,
        "ne": loss / log_loss(labels, np.full(len(labels), rate)),
        "calibration": predicted.mean() / rate,
    }


def test_the_figures(one: dict[str, Any], rows: dict[str, Any], runs: Path) -> None:
    for found, seed in ((one, 0), (one["compare"]["metrics"], 1)):
        expected = metrics(rows[seed], rows["labels"])
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        summary = json.loads((runs / f"run_{seed}" / "summary.json").read_text())["test"]
        names = ("rows", "auc", "logloss", "ne", "calibration")
        assert [found[name] for name in names] == [summary[name] for name in names]  # to the last bit
    for name in ("auc", "logloss", "ne", "calibration"):
        assert one["compare"]["difference"][name] == one[name] - one["compare"]["metrics"][name]


def test_the_metrics_by_user(one: dict[str, Any], rows: dict[str, Any]) -> None:
    known = rows[USER] != 0
    listed = list(zip(rows[USER][known].tolist(), rows[0][known].tolist(), rows["labels"][known].tolist(), strict=True))
    expected = by_loops(listed, 1) | by_loops(listed, 5)
    assert one["by_user"] == pytest.approx(expected, abs=1e-6)
    assert one["users"] == len({user for user, _, _ in listed})
    assert one["rows_without_user"] == int((~known).sum())


def test_the_slices(one: dict[str, Any], rows: dict[str, Any], data: PreparedData) -> None:
    """Their values are those of the raw text; rare ones and missing ones are one slice."""
    lines = [line.split("\t") for path in raw_files(data.folder) for line in Path(path).read_text().splitlines()]
    texts = [line[13 + int(COUNTRY[1:])] for line in lines]
    keys = np.where([text == "" for text in texts], 0, rows[COUNTRY])
    value = dict(zip(keys.tolist(), [text.rjust(8, "0") for text in texts], strict=True))
    codes, counts = np.unique(keys, return_counts=True)
    order = sorted(zip(-counts, codes, strict=True))
    found = one["slices"][COUNTRY]
    assert [each.get("value") for each in found] == [value[code] if code else None for _, code in order[:4]] + [None]
    assert found[-1]["others"] == len(codes) - 4
    assert sum(each["rows"] for each in found) == len(rows["labels"])
    for each, (_, code) in zip(found, order[:4], strict=False):
        mine = keys == code
        assert each["auc"] == pytest.approx(roc_auc_score(rows["labels"][mine], rows[0][mine]), abs=1e-6)
        assert each["rows"] == mine.sum()


def test_the_intervals(one: dict[str, Any], rows: dict[str, Any]) -> None:
    """The same draws, each metric of the rows that were drawn by scikit-learn."""
    rng, labels = np.random.default_rng((3, 0)), rows["labels"]
    aucs = []
    for _ in range(50):
        drawn = rng.integers(0, len(labels), len(labels))
        aucs.append([roc_auc_score(labels[drawn], rows[seed][drawn]) for seed in (0, 1)])
    alone, paired = np.array(aucs)[:, 0], np.subtract(*np.array(aucs).T)
    assert one["intervals"]["auc"] == pytest.approx(np.quantile(alone, [0.025, 0.975]), abs=1e-6)
    assert one["compare"]["intervals"]["auc"] == pytest.approx(np.quantile(paired, [0.025, 0.975]), abs=1e-6)
    low, high = one["intervals"]["gauc"]
    assert low < one["by_user"]["gauc"] < high
    assert {"gauc", "ndcg@5", "recall@1", "map@5"} <= one["compare"]["intervals"].keys()


def test_two_ranks_put_rows_in_order(two: list[dict[str, Any]]) -> None:
    for (count, _), found in two[0]["scattered"].items():
        assert found == ([float(i) for i in range(count)], [float(i % 2) for i in range(count)])
    assert all(found is None for found in two[1]["scattered"].values())


def test_two_ranks_equal_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    def figures(result: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in result.items() if name != "file"}

    assert figures(two[0]["result"]) == figures(two[1]["result"])
    assert figures(two[0]["result"]) == figures(one)


@pytest.fixture(scope="module")
def raw(runs: Path, data: PreparedData, one: dict[str, Any]) -> dict[str, Any]:
    return run_ranks(evaluate_raw, 1, data.folder, runs, runs / "raw_one.json")[0]


def test_raw_files_give_the_figures_of_the_prepared_split(
    raw: dict[str, Any], one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    names = ("rows", "auc", "logloss", "ne", "calibration")
    assert [raw[name] for name in names] == [one[name] for name in names]  # to the last bit
    assert raw["compare"]["metrics"]["auc"] == one["compare"]["metrics"]["auc"]
    assert raw["intervals"]["auc"] == one["intervals"]["auc"]
    assert {name: value for name, value in raw.items() if name != "file"} == {
        name: value for name, value in two[0]["raw"].items() if name != "file"
    }


def test_columns_of_raw_files_hold_their_values(raw: dict[str, Any], data: PreparedData, rows: dict[str, Any]) -> None:
    lines = [line.split("\t") for path in raw_files(data.folder) for line in Path(path).read_text().splitlines()]
    places = {name: 13 + int(name[1:]) for name in (USER, COUNTRY)}
    users = [line[places[USER]] for line in lines]
    numbers = {value: number for number, value in enumerate(sorted(set(users)))}
    listed = [
        (numbers[user], logit, label)
        for user, logit, label in zip(users, rows[0].tolist(), rows["labels"].tolist(), strict=True)
        if user
    ]
    assert raw["by_user"] == pytest.approx(by_loops(listed, 1) | by_loops(listed, 5), abs=1e-6)
    countries = [line[places[COUNTRY]] for line in lines]
    found = raw["slices"][COUNTRY]
    assert sum(each["rows"] for each in found) == len(lines)
    assert all(each["rows"] == countries.count(each["value"] or "") for each in found if "others" not in each)


def test_a_column_that_raw_files_lack(runs: Path, data: PreparedData, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli_main.main(["evaluate", "--run", str(runs / "run_0"), "--input", *raw_files(data.folder), "--by", "country"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --by country: ")
    assert "there is no column 'country'" in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli_main.main(["evaluate", "--run", str(runs / "run_0"), "--input", "x.tsv", "--split", "test"])
    assert "--split test: raw files have no splits; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\n", "bad.tsv: line 1"),
        ("", "bad.tsv"),
    ],
)
def test_bad_raw_files(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "bad.tsv").write_text(text)
    with pytest.raises(SystemExit) as ended:
        cli_main.main(["evaluate", "--run", str(runs / "run_0"), "--input", str(tmp_path / "bad.tsv")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (runs / "run_0" / "evaluate_input.json").exists()


def test_the_file_names_what_was_evaluated(one: dict[str, Any], runs: Path, data: PreparedData) -> None:
    written = json.loads((runs / "one.json").read_text())
    assert {**written, "file": one["file"]} == json.loads(json.dumps(one))
    assert written["data"] == {
        "folder": str(data.folder),
        "split": "test",
        "sha256": json.loads((runs / "run_0" / "config.json").read_text())["data_sha256"],
    }
    step = json.loads((runs / "run_0" / "summary.json").read_text())["steps"]
    run = runs / "run_0"
    assert written["weights"] == {"run": str(run), "folder": str(run / "checkpoint"), "step": step}
    assert written["compare_weights"]["run"] == str(runs / "run_1")


def test_another_evaluation_is_not_overwritten_without_a_word(
    runs: Path, data: PreparedData, device: torch.device, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "run_0", run)
    first = evaluate_run(run, data, device)
    assert first["file"] == str(run / "evaluate_test.json")
    assert evaluate_run(run, data, device) == first  # the same question, the same file
    other = EvaluateOptions(by=(COUNTRY,))
    before = (run / "evaluate_test.json").read_bytes()
    with pytest.raises(UserError) as raised:
        evaluate_run(run, data, device, other)
    assert str(raised.value) == (
        f"{run / 'evaluate_test.json'}: holds another evaluation; name another file with --output, or replace it with "
        "--overwrite"
    )
    assert (run / "evaluate_test.json").read_bytes() == before
    found = evaluate_run(run, data, device, EvaluateOptions(by=(COUNTRY,), overwrite=True))
    assert json.loads((run / "evaluate_test.json").read_text())["slices"] == found["slices"]
    trained = evaluate_run(run, data, device, EvaluateOptions(split="train", checkpoint="last"))
    assert trained["file"] == str(run / "evaluate_train_last.json")
    assert trained["rows"] == data.rows("train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "country"], "--by country: {data} has no such column; choose one of C1, C2, "),
        (["--by-user", "I1"], "--by-user I1: the column is numeric; choose one of C1, C2, "),
        (["--k", "0"], "--k 0: must be at least 1"),
        (["--bootstrap", "1"], "--bootstrap 1: give 0 for no intervals, or at least 2, such as 1000"),
        (["--confidence", "1"], "--confidence 1.0: must lie between 0 and 1, such as 0.95"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        (["--input", "x.tsv"], "--data, --input: give one of the two, a prepared folder or raw files"),
        (["--slices", "0"], "--slices 0: must be at least 1"),
        (["--compare-checkpoint", "best"], "--compare-checkpoint: name the other run with --compare"),
        (["--compare", "{data}"], "--compare {data}: not a run folder (no config.json); name one that train wrote"),
        (["--output", "{data}"], "--output {data}: this is a folder; name a file, such as evaluation.json"),
        (["--checkpoint", "999"], "--checkpoint 999: no such checkpoint; "),
    ],
)
def test_bad_options(
    runs: Path, data: PreparedData, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(path.name for path in (runs / "run_0").iterdir())
    with pytest.raises(SystemExit) as ended:
        cli_main.main(
            ["evaluate", "--run", str(runs / "run_0"), "--data", str(data.folder)]
            + [word.format(data=data.folder) for word in words]
        )
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(data=data.folder)}")
    assert said.count("\n") == 1
    assert sorted(path.name for path in (runs / "run_0").iterdir()) == before


def test_what_it_prints(runs: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--by",
        COUNTRY,
        "--slices",
        "2",
        "--by-user",
        USER,
        "--bootstrap",
        "5",
        "--compare",
        str(runs / "run_1"),
    ]
    output = tmp_path / "result.json"
    words = ["evaluate", "--run", str(runs / "run_0"), "--data", str(data.folder), "--output", str(output), *options]
    cli_main.main(words)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(output.read_text())
    assert f"{result['auc']:.5f}" in next(line for line in lines if line.startswith("test "))
    assert f"{result['compare']['difference']['auc']:+.5f}" in next(line for line in lines if "difference" in line)
    assert sum(line.startswith(f"{COUNTRY}=") for line in lines) == 4  # in both tables
    assert any("gauc" in line and "ndcg@10" in line for line in lines)
    assert lines[-1] == f"wrote {output}"
