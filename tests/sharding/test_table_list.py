"""Lists of tables: Criteo Terabyte's, files, prepared folders, and what is refused."""

import re
from pathlib import Path

import pytest

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.table_list import Table, read_tables

WANTED = (
    Table(name="user", num_embeddings=1000, embedding_dim=64, pooling_factor=20.0),
    Table(name="item", num_embeddings=50, embedding_dim=16, weighted=True),
)
TEXTS = {
    "a.toml": """
        embedding_dim = 64
        [[tables]]
        name = "user"
        num_embeddings = 1000
        pooling_factor = 20
        [[tables]]
        name = "item"
        num_embeddings = 50
        embedding_dim = 16
        weighted = true
    """,
    "a.json": """{"embedding_dim": 64, "tables": [
        {"name": "user", "num_embeddings": 1000, "pooling_factor": 20},
        {"name": "item", "num_embeddings": 50, "embedding_dim": 16, "weighted": true}]}
    """,
    "a.csv": "name,num_embeddings,embedding_dim,pooling_factor,weighted\nuser,1000,64,20,\nitem,50,16,,true\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_lists_tables(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(TEXTS[name])
    assert read_tables(str(path)) == WANTED
    assert [table.embedding_dim for table in read_tables(str(path), dim=128)] == [128, 128]


def test_criteo_terabyte_has_mlperfs_tables() -> None:
    tables = read_tables("criteo-terabyte")
    assert len(tables) == 26
    assert (tables[0].name, tables[25].name) == ("t_C1", "t_C26")
    assert {table.embedding_dim for table in tables} == {128}
    assert sum(table.num_embeddings == 40_000_000 for table in tables) == 5
    assert sum(table.num_embeddings > 1e5 for table in tables) == 8
    assert {table.embedding_dim for table in read_tables("criteo-terabyte", 16)} == {16}


def one(**given: object) -> str:
    import json

    return json.dumps([{"name": "a", "num_embeddings": 10, "embedding_dim": 8, **given}])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", one(num_embeddings=-3), "table 1 (a): num_embeddings: -3 is no count; give a whole number from 1"),
        ("a.json", one(num_embeddings=0), "table 1 (a): num_embeddings: 0 is no count"),
        ("a.json", one(num_embeddings="many"), "table 1 (a): num_embeddings: 'many' is no count"),
        ("a.json", one(num_embeddings=1e9), "table 1 (a): num_embeddings: 1000000000.0 is no count"),
        ("a.json", one(embedding_dim=10), "table 1 (a): embedding_dim: 10 is no multiple of 4"),
        ("a.json", one(pooling_factor=0), "table 1 (a): pooling_factor: 0 is no number of ids"),
        ("a.json", one(pooling_factor=float("nan")), "table 1 (a): pooling_factor: nan is no number of ids"),
        ("a.json", one(pooling_factor=1e308), "table 1 (a): pooling_factor: 1e+308 is no number of ids"),
        ("a.json", one(weighted=1), "table 1 (a): weighted: 1 is neither true nor false"),
        ("a.json", one(rows=3), "table 1 (a): rows: there is no such key; choose from name, num_embeddings"),
        ("a.json", one(name=""), "table 1 (): name: '' is no name of a table"),
        ("a.json", one(name="a.b"), "table 1 (a.b): name: 'a.b' has a dot"),
        (
            "a.json",
            '[{"name": "a", "num_embeddings": 3}]',
            "table 1 (a): embedding_dim is missing; add it, or give --dim",
        ),
        ("a.json", one()[:-1] + ", " + one()[1:], "table a stands twice (the second time at 2)"),
        ("a.json", "[3]", "table 1: 3 is no table"),
        ("a.json", "[]", "no table in it"),
        ("a.json", "3", "this is no list of tables"),
        ("a.json", '{"table": []}', "table: there is no such key; give embedding_dim and tables"),
        ("a.json", "{", "this is no JSON"),
        ("a.toml", "[[tables]", "this is no TOML"),
        ("a.toml", "", "no table in it"),
        ("a.csv", "name,num_embeddings\na\n", "this is no CSV: line 2 has more or fewer cells than the head"),
        ("a.csv", "name,num_embeddings,embedding_dim\na,x,8\n", "table 1 (a): num_embeddings: 'x' is no count"),
        ("a.csv", "", "no table in it"),
        ("a.txt", "a", "a list of tables is a .toml, .json or .csv file"),
    ],
)
def test_a_wrong_file_is_told_with_its_table(name: str, text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}: {told}")) as caught:
        read_tables(str(path))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("criteo-terrabyte", "did you mean 'criteo-terabyte'"),
        ("nothing.toml", "there is no such file"),
        ("criteo-terabyte", "--dim: 10 is no multiple of 4"),
    ],
)
def test_a_source_that_is_none_is_told(source: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        read_tables(source, dim=10)
