"""Lists of tables: Criteo Terabyte's, files, prepared folders, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.tables import Table, read_tables

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


def test_criteo_dcnv2_has_the_ids_per_sample_of_mlperfs_command() -> None:
    sizes = "3,2,1,2,6,1,1,1,1,7,3,8,1,6,9,5,1,1,1,12,100,27,10,3,1,1"  # --multi_hot_sizes, as mlcommons writes it
    tables = read_tables("criteo-dcnv2")
    assert [table.pooling_factor for table in tables] == [float(size) for size in sizes.split(",")]
    one_hot = read_tables("criteo-terabyte")
    assert [replace(table, pooling_factor=1.0) for table in tables] == list(one_hot)
    assert {table.embedding_dim for table in read_tables("criteo-dcnv2", 16)} == {16}


def test_tables_of_the_dlrm_data_sets(tmp_path: Path) -> None:
    """Three tables of two bags: [4, 0], [] | [7] | nothing at all; rows and means are counted here by hand."""
    path = tmp_path / "fbgemm.pt"
    lengths = torch.tensor([[2, 0], [0, 1], [0, 0]], dtype=torch.int32)
    torch.save((torch.tensor([4, 0, 7]), torch.tensor([0, 2, 2, 2, 3, 3, 3]), lengths), path)
    sizes = [(table.num_embeddings, table.pooling_factor) for table in read_tables(str(path))]
    assert sizes == [(5, 1.0), (8, 0.5), (1, 0.001)]
    assert {table.embedding_dim for table in read_tables(str(path))} == {128}
    assert {table.embedding_dim for table in read_tables(str(path), dim=16)} == {16}
    bins = {f"bin_{n}": 0.0 for n in range(17)}
    neuroshard = [{"row": 5, "pooling_factor": 1.0, **bins}, {"row": 8, "pooling_factor": 0.5, **bins}]
    (tmp_path / "neuro.json").write_text(json.dumps(neuroshard))
    names = [(table.name, table.num_embeddings, table.embedding_dim) for table in read_tables(f"{tmp_path}/neuro.json")]
    assert names == [("t0", 5, 128), ("t1", 8, 128)]
    dreamshard = {"tables": [{"index": 7, "dim": 16, "row": 5, "pooling_factor": 3, **bins}]}
    (tmp_path / "dream.json").write_text(json.dumps(dreamshard))
    [table] = read_tables(f"{tmp_path}/dream.json")
    assert table == Table(name="t7", num_embeddings=5, embedding_dim=16, pooling_factor=3.0)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (b"not a file of torch", "not a file of tensors"),
        ({"a": torch.ones(2)}, "does not hold three tensors"),
        ((torch.ones(2), torch.ones(3), torch.ones(1, 2)), "are not those of ids"),
        ((torch.tensor([1, 2]), torch.tensor([0, 1, 9]), torch.tensor([[1, 1]])), "do not divide its 2 ids"),
        ((torch.tensor([1, -2]), torch.tensor([0, 1, 2]), torch.tensor([[1, 1]])), "table 0 has a negative id"),
    ],
)
def test_other_tensors_are_refused_in_one_line(held: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(held, path) if not isinstance(held, bytes) else path.write_bytes(held)
    with pytest.raises(UserError, match=message) as caught:
        read_tables(str(path))
    assert "\n" not in str(caught.value)


def one(**given: object) -> str:
    import json

    return json.dumps([{"name": "a", "num_embeddings": 10, "embedding_dim": 8, **given}])


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("a.json", one(num_embeddings=-3), "tables[0] (a).num_embeddings: expected a whole number >= 1, not -3; cor"),
        ("a.json", one(num_embeddings=0), "tables[0] (a).num_embeddings: expected a whole number >= 1, not 0;"),
        ("a.json", one(num_embeddings="many"), "tables[0] (a).num_embeddings: expected a whole number, not 'many';"),
        ("a.json", one(num_embeddings=1e9), "tables[0] (a).num_embeddings: expected a whole number, not 1000000"),
        ("a.json", one(embedding_dim=10), "tables[0] (a): embedding_dim: 10 is not a multiple of 4, which FBG"),
        ("a.json", one(pooling_factor=0), "tables[0] (a).pooling_factor: expected a number > 0.0, not 0; corr"),
        (
            "a.json",
            one(pooling_factor=float("nan")),
            "damaged (NaN is not a valid number); correct it (every table has n",
        ),
        ("a.json", one(pooling_factor=1e308), "tables[0] (a).pooling_factor: expected a number <= 1000000.0, not "),
        ("a.json", one(weighted=1), "tables[0] (a).weighted: expected true or false, not 1; correct it "),
        ("a.json", one(rows=3), "tables[0]: unknown key 'rows'; choose one of name, num_embeddings, embedd"),
        ("a.json", one(name=""), "tables[0]: name: '' is not a valid name of a table (empty, or not "),
        ("a.json", one(name="a.b"), "tables[0] (a.b): name: 'a.b' has a dot, which torch does not allow"),
        (
            "a.json",
            '[{"name": "a", "num_embeddings": 3}]',
            "tables[0] (a): missing embedding_dim; correct it (every table has ",
        ),
        ("a.json", one()[:-1] + ", " + one()[1:], "table a appears twice; rename one"),
        ("a.json", "[3]", "tables[0]: expected a table of keys, not 3; correct it (every tabl"),
        ("a.json", "[]", "tables: expected a list of length >= 1, not []; correct it (every "),
        ("a.json", "3", "expected a table of keys, not 3; correct it (every table has name,"),
        ("a.json", '{"table": []}', "missing tables, unknown 'table'; correct it (every table has name,"),
        ("a.json", "{", "damaged (Expecting property name enclosed in double quotes: line 1"),
        ("a.toml", "[[tables]", "not valid TOML"),
        ("a.toml", "", "missing tables; correct it (every table has name"),
        ("a.csv", "name,num_embeddings\na\n", "not a CSV file (line 2 has more or fewer cells than the head); cor"),
        (
            "a.csv",
            "name,num_embeddings,embedding_dim\na,x,8\n",
            "tables[0] (a).num_embeddings: expected a whole number, not 'x'; co",
        ),
        ("a.csv", "", "tables: expected a list of length >= 1, not []"),
        ("a.txt", "a", "a list of tables is a .toml, .json, .csv or .pt file"),
    ],
)
def test_a_wrong_file_is_reported_with_its_table(name: str, text: str, reported: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}: {reported}")) as caught:
        read_tables(str(path))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("source", "reported"),
    [
        ("criteo-terrabyte", "did you mean 'criteo-terabyte'"),
        ("nothing.toml", "no such file"),
        ("criteo-terabyte", "--dim: embedding_dim: 10 is not a multiple of 4"),
    ],
)
def test_a_source_that_is_none_is_reported(source: str, reported: str) -> None:
    with pytest.raises(UserError, match=re.escape(reported)):
        read_tables(source, dim=10 if source == "criteo-terabyte" else None)
