"""The commands of docs/movielens.md on generated ratings in the form of the atomic files."""

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.quality import movielens
from tests.benchmarks.scripts import run
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.evaluation.ranking import user_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "movielens.md").read_text(encoding="utf-8")
USERS, ITEMS, RATINGS = 60, 25, 2000


def write_atomic(folder: Path) -> pl.DataFrame:
    """Ratings by the item's quality and the user's sex; a quarter of the users rates at the end only."""
    random = np.random.default_rng(0)
    time = np.sort(random.integers(874_724_710, 893_286_638, RATINGS))
    user = np.where(np.arange(RATINGS) < RATINGS * 3 // 4, random.integers(0, 45, RATINGS), 0)
    user = np.where(user == 0, random.integers(0, USERS, RATINGS), user) + 1
    item = random.integers(1, ITEMS + 1, RATINGS)
    rating = np.clip(np.round(2 + 3 * (item / ITEMS) + (user % 2) + random.normal(0, 0.7, RATINGS)), 1, 5).astype(int)
    order = random.permutation(RATINGS)  # the files are in no order
    ratings = pl.DataFrame({"user": user, "item": item, "rating": rating, "time": time})[order]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in ratings.rows()]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    lines += [f'{i}\tThe "{i}"\t{1950 + i % 40 if i > 2 else ""}\tDrama War' for i in range(1, ITEMS + 1)]
    (folder / "ml-100k.item").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    lines += [f"{i}\t{15 + i % 30}\t{'MF'[i % 2]}\tstudent\t{i:05d}" for i in range(1, USERS + 1)]
    (folder / "ml-100k.user").write_text("\n".join(lines) + "\n")
    return ratings


def test_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ratings = write_atomic(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [schema] = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert {line.split()[2] for line in lines} == {"torchrec_deepfm", "benchmarks.quality.movielens"}
    table = ""
    for line in lines:
        words = shlex.split(line)[3:]
        if words[0] == "tables":
            run(movielens, *words, "--atomic", ".")
        elif words[0] == "compare":
            capsys.readouterr()
            run(movielens, *(word for word in words if word != "--fuxictr"))  # it would be installed
            table = capsys.readouterr().out
        else:
            if words[0] == "prepare":
                Path("ml/chosen.toml").write_text(schema)
            main([*words, *(["--max-ne", "inf"] if words[0] == "train" else [])])
    parts = {name: pl.read_parquet(f"ml/{name}.parquet") for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == RATINGS
    assert parts["train"]["timestamp"].max() < parts["validation"]["timestamp"].min()  # type: ignore[operator]
    assert parts["validation"]["timestamp"].max() < parts["test"]["timestamp"].min()  # type: ignore[operator]
    assert abs(len(parts["test"]) - RATINGS / 10) < 5
    row = parts["train"].filter((pl.col("user_id") == 3) & (pl.col("item_id") == 7)).row(0, named=True)
    same = ratings.filter((pl.col("user") == 3) & (pl.col("item") == 7))
    assert (row["age"], row["gender"], row["title"]) == (18, "F", 'The "7"')
    assert row["rating"] in same["rating"].to_list()
    _check_popularity(table, parts["train"], parts["test"])
    assert [line.split("|")[1].strip() for line in table.splitlines()[-1:]] == ["DeepFM"]


def _check_popularity(table: str, train: pl.DataFrame, test: pl.DataFrame) -> None:
    """GAUC and NDCG of the item's share of positive ratings, by a plain loop over rows."""
    good = train["rating"] >= 4
    mean = good.mean()
    scores = []
    for item in test["item_id"]:
        of_item = good.filter(train["item_id"] == item)
        scores.append((of_item.sum() + 5 * mean) / (len(of_item) + 5))  # type: ignore[operator]
    labels = (test["rating"] >= 4).to_numpy().astype(np.float32)
    ranked = user_metrics(test["user_id"].to_numpy(), np.float32(scores), labels, [10])
    [line] = [line for line in table.splitlines() if "share of positive" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4:6] == [f"{ranked[name].mean():.4f}" for name in ("gauc", "ndcg@10")]
