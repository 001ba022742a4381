"""The synthetic click logs against a plain reader of the text and a plain-Python evaluation of the equation."""

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torchrec_deepfm.data.synthetic import generate as synthetic
from torchrec_deepfm.data.synthetic.columns import MISSING_NUMBER, category_values, draw_rows, shares
from torchrec_deepfm.data.synthetic.generate import SyntheticData, generate
from torchrec_deepfm.data.synthetic.ground_truth import Truth, draw_truth, probability
from torchrec_deepfm.errors import UserError

ROWS, DAYS, SEED = 20_001, 2, 7
# Published shares of missing values of Criteo's Kaggle logs, rounded; the synthetic columns echo them.
MISSING = {"I1": 0.45, "I2": 0.0, "I3": 0.21, "I12": 0.77, "C1": 0.0, "C3": 0.035, "C6": 0.13, "C19": 0.45, "C22": 0.78}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticData:
    return generate(tmp_path_factory.mktemp("synthetic") / "raw", rows=ROWS, days=DAYS, seed=SEED)


def read(path: Path) -> list[list[str]]:
    text = path.read_bytes().decode("ascii")
    assert text.endswith("\n")
    assert "\r" not in text
    return [line.split("\t") for line in text[:-1].split("\n")]


def slow_logit(truth: Truth, numbers: list[int | None], ids: list[int]) -> float:
    """bias + sum w x + sum over all pairs <e_i, e_j> + <c, tanh(A e + a)>, one multiplication at a time."""
    fields: list[tuple[float, list[float]]] = []
    for number, row in zip(numbers, truth.numeric.tolist(), strict=True):
        fields.append((0.0 if number is None else math.log(1 + max(number, 0)), row))
    for i, table in zip(ids, truth.categorical, strict=True):
        fields.append((1.0, table[i].tolist()))
    result = truth.bias + math.fsum(x * row[-1] for x, row in fields)
    embeddings = [[x * v for v in row[:-1]] for x, row in fields]
    for i, left in enumerate(embeddings):
        for right in embeddings[i + 1 :]:
            result += sum(a * b for a, b in zip(left, right, strict=True))
    for unit, weight in enumerate(truth.output_weight.tolist()):
        inner = truth.hidden_bias[unit]
        for field, embedding in enumerate(embeddings):
            inner += sum(e * truth.hidden_weight[field, k, unit] for k, e in enumerate(embedding))
        result += weight * math.tanh(inner)
    return result


def logits_of(path: Path, truth: Truth) -> tuple[list[int], list[float]]:
    ids = [{f"{value:08x}": i for i, value in enumerate(category_values(c).tolist()) if i} | {"": 0} for c in range(26)]
    labels, logits = [], []
    for line in read(path):
        labels.append(int(line[0]))
        numbers = [int(text) if text else None for text in line[1:14]]
        logits.append(slow_logit(truth, numbers, [ids[c][text] for c, text in enumerate(line[14:])]))
    return labels, logits


def test_files_and_rows(data: SyntheticData) -> None:
    assert [path.name for path in data.train] == ["day_0.tsv", "day_1.tsv"]
    assert [len(read(path)) for path in data.train] == [10_001, 10_000]
    assert len(read(data.validation)) == len(read(data.test)) == 2_000
    assert sorted(path.name for path in data.folder.iterdir()) == [
        "day_0.tsv", "day_1.tsv", "test.tsv", "truth.json", "validation.tsv",
    ]  # fmt: skip


def test_every_line_is_criteos_format(data: SyntheticData) -> None:
    for path in (*data.train, data.validation, data.test):
        for line in read(path):
            assert len(line) == 40
            assert line[0] in ("0", "1")
            for column, text in enumerate(line[1:14], start=1):
                assert text == "" or str(int(text)) == text
                assert text == "" or int(text) >= (-3 if column == 2 else 0)
            for text in line[14:]:
                assert text == "" or (len(text) == 8 and set(text) <= set("0123456789abcdef"))


def test_values_are_missing_and_spread_as_in_criteo(data: SyntheticData) -> None:
    lines = [line for path in data.train for line in read(path)]
    names = [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    columns = dict(zip(names, list(zip(*lines, strict=True))[1:], strict=True))
    for name, expected in MISSING.items():
        share = sum(text == "" for text in columns[name]) / len(lines)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(lines))), name
        assert expected > 0 or share == 0
    assert any(int(text) < 0 for text in columns["I2"] if text)
    assert max(int(text) for text in columns["I5"] if text) > 100_000
    counts = [columns["C14"].count(value) for value in set(columns["C14"])]
    # Zipf's law: the most frequent of 24 values is 2 ** 1.35 times as frequent as the next
    assert sorted(counts)[-1] / sorted(counts)[-2] == pytest.approx(2**1.35, rel=0.1)


def test_click_rate(data: SyntheticData) -> None:
    labels = [int(line[0]) for path in data.train for line in read(path)]
    error = math.sqrt(0.25 * 0.75 / len(labels)) + 0.001  # of the draw, and of the bias
    assert sum(labels) / len(labels) == pytest.approx(0.25, abs=4 * error)


@pytest.mark.parametrize("rate", [0.03, 0.26, 0.9])
def test_bias_gives_any_click_rate(rate: float) -> None:
    numbers, ids = draw_rows(np.random.default_rng(5), 50_000)
    clicks = probability(draw_truth(seed=1, click_rate=rate).logit(numbers, ids))
    assert clicks.mean() == pytest.approx(rate, abs=0.006)


def test_truth_file_holds_what_the_labels_say(data: SyntheticData) -> None:
    known = json.loads((data.folder / "truth.json").read_text(encoding="utf-8"))
    assert (known["format_version"], known["seed"], known["rows"], known["click_rate"]) == (1, SEED, ROWS, 0.25)
    assert list(known["files"]) == ["day_0.tsv", "day_1.tsv", "validation.tsv", "test.tsv"]
    labels, logits = logits_of(data.test, draw_truth(seed=SEED, click_rate=0.25))
    entry = known["files"]["test.tsv"]
    assert (entry["rows"], entry["positives"]) == (len(labels), sum(labels))
    clicked = [z for label, z in zip(labels, logits, strict=True) if label]
    others = [z for label, z in zip(labels, logits, strict=True) if not label]
    won = sum((a > b) + 0.5 * (a == b) for a in clicked for b in others)
    assert entry["auc"] == pytest.approx(won / (len(clicked) * len(others)), abs=1e-6)
    losses = [
        -math.log(1 / (1 + math.exp(-z)) if label else 1 / (1 + math.exp(z)))
        for label, z in zip(labels, logits, strict=True)
    ]
    assert entry["logloss"] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-6)


def test_labels_follow_the_true_probability(data: SyntheticData) -> None:
    labels, logits = logits_of(data.validation, draw_truth(seed=SEED, click_rate=0.25))
    order = sorted(range(len(labels)), key=logits.__getitem__)
    for quarter in range(4):
        rows = order[quarter * 500 : (quarter + 1) * 500]
        expected = sum(1 / (1 + math.exp(-logits[i])) for i in rows) / len(rows)
        assert sum(labels[i] for i in rows) / len(rows) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 500))


def test_logit_is_the_equation() -> None:
    truth = draw_truth(seed=3, click_rate=0.1)
    numbers, ids = draw_rows(np.random.default_rng(0), 40)
    expected = [
        slow_logit(truth, [None if n == MISSING_NUMBER else n for n in row], row_ids)
        for row, row_ids in zip(numbers.tolist(), ids.tolist(), strict=True)
    ]
    np.testing.assert_allclose(truth.logit(numbers, ids), expected, rtol=1e-10, atol=1e-10)


def test_each_part_of_the_truth_matters() -> None:
    truth = draw_truth(seed=0, click_rate=0.25)
    numbers, ids = draw_rows(np.random.default_rng(0), 20_000)
    whole = truth.logit(numbers, ids)
    assert whole.std() == pytest.approx(1.65, abs=0.05)  # gives an AUC near 0.84
    deep = whole - replace(truth, output_weight=0 * truth.output_weight).logit(numbers, ids)
    assert deep.std() > 0.5


def test_categories_differ_within_and_across_columns() -> None:
    values = np.concatenate([category_values(column)[1:] for column in range(26)])
    assert len(np.unique(values)) == len(values) == sum(len(shares(column)) - 1 for column in range(26))
    assert values.min() < 2**24  # some begin with zeros, which the text must keep
    for column in range(26):
        assert shares(column).sum() == pytest.approx(1)


def test_same_seed_same_bytes_other_seed_other_bytes(data: SyntheticData, tmp_path: Path) -> None:
    # another process with three threads
    code = (
        "import sys; from pathlib import Path;"
        "from torchrec_deepfm.data.synthetic.generate import generate;"
        f"generate(Path(sys.argv[1]), rows={ROWS}, days={DAYS}, seed={SEED})"
    )
    again = tmp_path / "again"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "3")
    environment = threads | {"PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", code, str(again)], check=True, env=environment)
    other = generate(tmp_path / "other", rows=ROWS, days=DAYS, seed=SEED + 1)
    for path in data.folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
        assert (other.folder / path.name).read_bytes() != path.read_bytes()


def test_rows_of_a_chunk_do_not_depend_on_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CHUNK_ROWS", 100)
    short = generate(tmp_path / "short", rows=300).train[0].read_text(encoding="ascii")
    long = generate(tmp_path / "long", rows=450).train[0].read_text(encoding="ascii")
    assert len(set(short.splitlines())) == 300  # chunks differ from each other
    assert long.startswith(short)


def test_summary_names_files_rates_and_the_best_auc(data: SyntheticData) -> None:
    text = data.summary()
    for name, file in data.files.items():
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        assert f"{file.rows:,} rows" in line
        assert f"{file.positives / file.rows:.2%} clicks" in line
        assert f"{file.auc:.4f}" in line
    assert text.splitlines()[-1] == f"best reachable AUC on test.tsv: {data.files['test.tsv'].auc:.4f}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "--rows 0: too small; give 1 or more"),
        ({"days": 0}, "--days 0: too small; give 1 or more"),
        ({"rows": 2, "days": 3}, "--rows 2: fewer rows than the 3 days; give more --rows or fewer --days"),
        ({"seed": -1}, "--seed -1: out of range; give a number from 0 to 2**63 - 1"),
        ({"click_rate": 0.0}, "--click-rate 0.0: out of range; give a number between 0 and 1"),
        ({"click_rate": 1.0}, "--click-rate 1.0: out of range; give a number between 0 and 1"),
        ({"click_rate": math.nan}, "--click-rate nan: out of range; give a number between 0 and 1"),
        (
            {"rows": 10, "click_rate": 1e-9},
            (
                "--click-rate 1e-09: all 1000 rows of validation.tsv have the same label; "
                "raise --rows or choose a click rate nearer to 0.5"
            ),
        ),
    ],
)
def test_a_bad_option_is_named_and_nothing_is_left(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError) as error:
        generate(tmp_path / "raw", **options)  # type: ignore[arg-type]
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_day_of_one_row_has_no_auc(tmp_path: Path) -> None:
    data = generate(tmp_path / "raw", rows=1)
    assert data.files["day_0.tsv"].auc is None
    assert json.loads((data.folder / "truth.json").read_text(encoding="utf-8"))["files"]["day_0.tsv"]["auc"] is None
    assert "best AUC -" in data.summary()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path, rows=10)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    monkeypatch.setattr(synthetic, "_write_text", fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(tmp_path / "raw", rows=10)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_grow_no_further(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"out: no space left on the device; free some or name another output$"):
            generate(tmp_path / "out", rows=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_more_rows_than_the_disk_holds(tmp_path):
    with pytest.raises(UserError, match=r"out: needs about .* TiB of disk, .* are free; free some"):
        generate(tmp_path / "out", rows=10**18)
    assert list(tmp_path.iterdir()) == []
