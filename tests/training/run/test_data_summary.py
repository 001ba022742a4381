"""``data.json``: counted by hand from the rows themselves."""

from pathlib import Path

from tests.faults.runs import ROWS, SCHEMA, make_data
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.training.run.data_summary import data_summary
from torchrec_deepfm.training.scoring.row_sample import sample_rows


def test_it_counts_the_rows(tmp_path: Path) -> None:
    make_data(tmp_path / "raw")
    train, validation = tmp_path / "raw" / "train.tsv", tmp_path / "raw" / "validation.tsv"
    data = prepare([train], tmp_path / "data", validation=[validation], schema=SCHEMA, min_count=25)
    found = data_summary(data)
    assert found["mode"] == "vocabulary"
    assert found["splits"].keys() == {"train", "validation"}
    rows = {
        split: [line.split("\t") for line in path.read_text().splitlines()]
        for split, path in (("train", train), ("validation", validation))
    }
    users = [row[3] for row in rows["train"]]
    frequent = {user for user in users if users.count(user) >= 25}
    for split, lines in rows.items():
        summary = found["splits"][split]
        assert summary["rows"] == summary["sampled"] == len(lines)
        assert summary["positives"] == sum(row[0] == "1" for row in lines)
        assert summary["zero"]["user"] == sum(row[3] not in frequent for row in lines) / len(lines)
        assert summary["zero"]["shop"] == 0.0
    assert found["splits"]["train"]["zero"]["user"] > 0


def test_the_sample_is_bounded_and_spread(tmp_path: Path) -> None:
    data = make_data(tmp_path / "raw", rows=5000)
    blocks = [block.dense[:, 0] for block in sample_rows(data, "train", 2)]
    assert [len(block) for block in blocks] == [1024, 1024]
    assert blocks[0][0] < blocks[0][-1] < blocks[1][0] < blocks[1][-1]
    assert sum(len(block.labels) for block in sample_rows(data, "train", 5)) == 5000
    assert sum(len(block.labels) for block in sample_rows(make_data(tmp_path / "b"), "train", 5)) == ROWS
