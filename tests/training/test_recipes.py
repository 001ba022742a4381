"""The named recipes, those of users, and what is said of their size."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection

from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.cli.data import Prepare
from torchrec_deepfm.cli.train import Train
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model.deepfm import DeepFM
from torchrec_deepfm.model.tables import embedding_tables
from torchrec_deepfm.training.config import TrainConfig
from torchrec_deepfm.training.memory_estimate import dense_parameters, size_of
from torchrec_deepfm.training.recipe_text import recipe_text, recipes_table
from torchrec_deepfm.training.recipes import DATA, RECIPES, paper, recipe, recipe_for, recipe_line, small_table

OWN = """
from dataclasses import replace
from torchrec_deepfm.training.recipes import TrainConfig, criteo_x1

def wider():
    return replace(criteo_x1(), factor_dim=20, dropout=0.2)

def nothing():
    pass

def bad():
    return replace(criteo_x1(), dropout=2.0)

def broken():
    raise RuntimeError("no\\nluck")

def leaves():
    raise SystemExit(3)

def text():
    return replace(criteo_x1(), factor_dim="20")

def another():
    class Mine(TrainConfig):
        pass
    return Mine()

number = 3
"""


def test_the_values_of_each_recipe_are_those_of_its_source() -> None:
    """The values that the sources give, typed from the sources."""
    paper = recipe("paper")
    assert (paper.factor_dim, paper.over_arch_layer_sizes, paper.dropout) == (10, (400, 400, 400), 0.5)
    d2l = recipe("d2l")
    assert (d2l.factor_dim, d2l.over_arch_layer_sizes, d2l.dropout, d2l.batch_size) == (10, (30, 20, 10), 0.1, 2048)
    assert (d2l.sparse_optimizer, d2l.sparse_lr, d2l.dense_lr) == ("adam", 0.01, 0.01)
    x1, x4 = recipe("criteo-x1"), recipe("criteo-x4")
    assert (x1.factor_dim, x1.over_arch_layer_sizes, x1.batch_norm, x1.batch_size) == (10, (400,) * 3, True, 4096)
    assert (x1.dropout, x1.embedding_l2, x1.linear_l2, x1.metric) == (0.1, 1e-5, 1e-5, "auc")
    assert (x4.factor_dim, x4.over_arch_layer_sizes, x4.batch_norm, x4.batch_size) == (16, (1000,) * 5, False, 10_000)
    assert (x4.dropout, x4.embedding_l2, x4.linear_l2, x4.metric) == (0.2, 1e-5, 1e-5, "auc-logloss")
    for one in (x1, x4):
        assert (one.sparse_optimizer, one.sparse_lr, one.dense_lr, one.clip_norm) == ("adam", 1e-3, 1e-3, 10.0)
        assert (one.patience, one.lr_patience, one.lr_factor, one.init_std) == (2, 1, 0.1, 1e-4)
    terabyte = recipe("criteo-terabyte")
    assert terabyte.batch_size * DATA["criteo-terabyte"].ranks == 65_536
    assert (terabyte.sparse_optimizer, terabyte.sparse_lr, terabyte.epochs) == ("adagrad", 0.005, 1)
    assert (terabyte.warmup, terabyte.decay) == (0.0, 0.0)
    assert DATA["criteo-terabyte"].table_rows == 204_184_588


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_where_it_comes_from(name: str) -> None:
    assert isinstance(recipe(name), TrainConfig)
    assert len(recipe_line(name)) < 110
    documentation = RECIPES[name].__doc__ or ""
    if name not in ("smoke", "small-table", "synthetic"):
        assert re.search(r"arXiv|d2l\.ai|reczoo/BARS|mlcommons/training", documentation)
    text = recipe_text(name)
    assert "--output runs/" in text or name not in DATA
    assert name in recipes_table()


def test_the_text_of_a_recipe_is_a_command_line(tmp_path: Path) -> None:
    """The options that are reported, given to train, are the recipe."""
    text = recipe_text("criteo-x4").partition("Options that differ")[2].partition("Commands:")[0]
    words = []
    for option, value in re.findall(r"^  (--[a-z0-9-]+) +(.*)$", text, re.MULTILINE):
        words += [option] if value == "yes" else [option, *value.split()]
    command = cli.parse(["train", "--data", "x", *words])
    assert isinstance(command, Train)
    assert command.config == recipe("criteo-x4")
    for name in ("criteo-x1", "criteo-x4", "frappe-x1", "criteo-terabyte"):
        [line] = [line for line in recipe_text(name).splitlines() if " -m torchrec_deepfm prepare " in line]
        prepare = cli.parse(line.split()[3:])
        assert isinstance(prepare, Prepare)
        assert str(prepare.output) == DATA[name].folder


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert recipe(f"{path}:wider") == replace(recipe("criteo-x1"), factor_dim=20, dropout=0.2)
    command = cli.parse(["train", "--data", "x", "--recipe", f"{path}:wider", "--seed", "4"])
    assert isinstance(command, Train)
    assert command.config == replace(recipe("criteo-x1"), factor_dim=20, dropout=0.2, seed=4)
    assert "--factor-dim              20" in recipe_text(f"{path}:wider")
    with pytest.raises(UserError) as without_data:
        recipe_text(f"{path}:wider", ranks=2)
    assert str(without_data.value) == f"--ranks: needs --data as well, as {path}:wider has no published data"
    (tmp_path / "syntax.py").write_text("def a(:\n")
    for name, message in {
        f"{path}:gone": "has no 'gone'; name a function that returns a TrainConfig",
        f"{path}:number": "number returns None; it must return a TrainConfig",
        f"{path}:nothing": "nothing returns None; it must return a TrainConfig",
        f"{path}:bad": "--dropout 2.0: the probability of dropping a unit lies in [0, 1)",
        f"{path}:broken": "the file could not be run (RuntimeError: no luck); correct it",
        f"{path}:leaves": "the file could not be run (SystemExit: 3); correct it",
        f"{path}:text": "--factor-dim '20': must be a whole number",
        f"{path}:another": "another returns ",
        f"{path}:": "has no ''; name a function",
        f"{tmp_path}/none.py:a": f"no file {tmp_path}/none.py; name a Python file and a function in it",
        f"{tmp_path}/syntax.py:a": "the file could not be run (SyntaxError",
    }.items():
        with pytest.raises(UserError) as refused:
            recipe(name)
        assert str(refused.value).startswith(f"--recipe {name}: ")
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def prepared(rows: int, *, validation: int = 100, ids: int = 3) -> Any:
    """What the choice of a recipe looks at."""
    splits = {"train": rows, "validation": validation}
    schema = SimpleNamespace(multi_hot=())
    return SimpleNamespace(rows=splits.__getitem__, num_embeddings={"a": ids - 1, "b": 1}, schema=schema)


@pytest.mark.parametrize(("validation", "epochs", "patience"), [(0, 3, 0), (100, 20, 2)])
def test_small_table_fits_its_rows(validation: int, epochs: int, patience: int, tmp_path: Path) -> None:
    """40,000 rows: global batches of 128 are the largest power of two with 256 steps; options still override."""
    data = prepared(40_000, validation=validation)
    command = cli.parse(["train", "--data", "x", "--recipe", "small-table", "--dropout", "0.4"])
    assert isinstance(command, Train)
    config = command._config_for(data, 2, tmp_path)
    assert (config.batch_size, config.epochs, config.patience, config.dropout) == (64, epochs, patience, 0.4)
    assert (config.embedding_l2, config.linear_l2) == (25 / 40_000, 25 / 40_000)
    other = cli.parse(["train", "--data", "x", "--recipe", "paper", "--dropout", "0.4"])
    assert isinstance(other, Train)
    assert other._config_for(data, 2, tmp_path) == TrainConfig(dropout=0.4)


@pytest.mark.parametrize(
    ("rows", "patience", "epochs"),
    [(10, 10, 40), (1500, 10, 40), (4800, 8, 32), (9600, 4, 20), (20_000, 2, 20), (202_027, 2, 20)],
)
def test_few_rows_have_the_patience_of_600_steps(rows: int, patience: int, epochs: int) -> None:
    """64 rows per step, of which the quickstart's table has 75 per epoch; row-wise Adagrad stays at two epochs."""
    config = small_table(rows)
    assert (config.patience, config.epochs) == (patience, epochs)
    assert (small_table(rows, whole=False).patience, small_table(rows, validation=False).patience) == (2, 0)


@pytest.mark.parametrize(
    ("rows", "ids", "is_small"), [(999_999, 999_999, True), (1_000_000, 3, False), (3, 1_000_000, False)]
)
def test_the_default_depends_on_the_data(
    rows: int, ids: int, is_small: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = cli.parse(["train", "--data", "x", "--factor-dim", "7"])
    assert isinstance(command, Train)
    expected = replace(small_table(rows, ids=ids) if is_small else paper(), factor_dim=7)
    assert command._config_for(prepared(rows, ids=ids), 1, tmp_path) == expected
    said = capsys.readouterr().out
    assert said.count("--recipe paper") == said.count("\n") == is_small


@pytest.mark.parametrize(
    ("about", "words", "optimizer"),
    [
        ({}, [], "adam"),
        ({"ids": 200_000}, [], "adam"),
        ({"ids": 200_001}, [], "rowwise_adagrad"),
        ({"ids": 200_001}, ["--sparse-optimizer", "adam"], "adam"),
        ({}, ["--sparse-lr", "0.1"], "rowwise_adagrad"),
        ({}, ["--sparse-lr", "0.1", "--sparse-optimizer", "adam"], "adam"),
        ({}, ["--sparse-optimizer", "adagrad"], "adagrad"),
        ({}, ["--data-parallel-rows", "10"], "rowwise_adagrad"),
        ({}, ["--constraint", "a=row_wise"], "adam"),
        ({}, ["--constraint", "a=row_wise,column_wise"], "rowwise_adagrad"),
        ({}, ["--plan", "row_wise fused.json"], "adam"),
        ({}, ["--plan", "row_wise fused_uvm.json"], "rowwise_adagrad"),
        ({}, ["--plan", "grid_shard fused.json"], "rowwise_adagrad"),
        ({}, ["--plan", "data_parallel dense.json"], "adam"),
    ],
)
def test_adam_ends_where_tables_are_large_or_placed_as_it_cannot_have_them(
    about: dict[str, int], words: list[str], optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a rate is given, which is row-wise Adagrad's."""

    def load(path: Path) -> Any:
        kind, kernel = path.stem.split()
        return SimpleNamespace(tables=[SimpleNamespace(sharding_type=kind, compute_kernel=kernel)])

    monkeypatch.setattr("torchrec_deepfm.sharding.plan.io.load_plan", load)
    command = cli.parse(["train", "--data", "x", *words])
    assert isinstance(command, Train)
    config = command._config_for(prepared(20_000, **about), 1, tmp_path)
    assert config.sparse_optimizer == optimizer
    assert (config.embedding_l2 > 0, config.touched_embedding_l2 > 0) == (optimizer == "adam", optimizer != "adam")


def test_lists_leave_out_the_penalty_that_does_not_fit_them() -> None:
    about: Any = {"rows": 50_000, "ids": 3, "validation": True}
    options = {"sparse_optimizer": "rowwise_adagrad"}
    found = [recipe_for(None, options, **about, multi_hot=multi_hot) for multi_hot in (False, True)]
    assert found[0].touched_embedding_l2 > 0.0
    assert found[1] == replace(found[0], touched_embedding_l2=0.0)


@pytest.mark.parametrize(("rows", "layers", "ema"), [(4_999, (64, 32), 0.0), (5_000, (400, 400, 400), 0.99)])
def test_few_rows_have_a_small_mlp_without_adam(rows: int, layers: tuple[int, ...], ema: float) -> None:
    config = small_table(rows, whole=False)
    assert (config.over_arch_layer_sizes, config.ema, config.touched_embedding_l2 > 0) == (layers, ema, ema > 0)
    assert small_table(rows) == replace(small_table(5001), batch_size=64, embedding_l2=25 / rows, linear_l2=25 / rows)


@pytest.mark.parametrize("place", [".", "seed_3"])
def test_a_run_keeps_what_it_began_with(place: str, tmp_path: Path) -> None:
    """The paper's options if an earlier version made it, as far as they are the command's; batches follow the ranks."""
    (tmp_path / place).mkdir(exist_ok=True)
    options = asdict(TrainConfig(factor_dim=7, batch_size=17, seed=3))
    written = {"format_version": 1, "config": options, "num_embeddings": {"a": 3}, "numeric": []}
    (tmp_path / place / "config.json").write_text(json.dumps(written))
    for width, expected in ((7, paper()), (8, small_table(1000))):
        command = cli.parse(["train", "--data", "x", "--factor-dim", str(width)])
        assert isinstance(command, Train)
        assert command._config_for(prepared(1000), 1, tmp_path) == replace(expected, factor_dim=width)


def test_a_run_keeps_the_optimizer_of_sharded_tables(tmp_path: Path) -> None:
    for words in (["--constraint", "a=column_wise"], [], ["--constraint", "a=row_wise"]):
        command = cli.parse(["train", "--data", "x", *words])
        assert isinstance(command, Train)
        config = command._config_for(prepared(1000), 1, tmp_path)
        assert config.sparse_optimizer == "rowwise_adagrad"
        written = {"format_version": 1, "config": asdict(config), "num_embeddings": {"a": 3}, "numeric": []}
        (tmp_path / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("words", [["--ranks", "2"], ["--samples-per-second", "1000"]])
def test_nothing_to_work_out_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["recipes", "paper", *words])
    assert f"{words[0]}: needs --data as well, as paper has no published data\n" in capsys.readouterr().err
    cli.main(["recipes", "criteo-x1", *words])


def test_recipes_that_there_are_not() -> None:
    with pytest.raises(UserError, match=r"critio-x1: unknown recipe; choose .*\(did you mean 'criteo-x1'\?\)"):
        recipe("critio-x1")
    with pytest.raises(UserError, match=r"choose one of paper, d2l, .*, smoke, or give FILE.py:FUNCTION"):
        recipe("")


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(factor_dim=5, over_arch_layer_sizes=(7, 3), batch_norm=True),
        TrainConfig(factor_dim=4, over_arch_layer_sizes=(6,)),
        TrainConfig(factor_dim=7, terms=("linear", "fm")),
    ],
)
def test_the_count_of_dense_weights_is_that_of_the_model(config: TrainConfig) -> None:
    sizes = {"a": 11, "b": 5}
    tables = EmbeddingBagCollection(tables=embedding_tables(sizes, config.factor_dim), device=torch.device("cpu"))
    model = DeepFM(
        tables, 3, config.over_arch_layer_sizes, config.factor_dim, terms=config.terms, batch_norm=config.batch_norm
    )
    inside = {id(parameter) for parameter in tables.parameters()}
    dense = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    assert dense_parameters(config, fields=5, numeric=3) == dense
    size = size_of(config, table_rows=16, fields=5, numeric=3, train_rows=100)
    assert size.table_bytes == sum(4 * parameter.numel() for parameter in tables.parameters())


def test_sizes_by_hand() -> None:
    """Criteo Terabyte at MLPerf's size: 204,184,588 rows of 128 float32, Adagrad's state as large again."""
    about = {"table_rows": 204_184_588, "fields": 39, "numeric": 13, "train_rows": 4_195_197_692}
    size = size_of(recipe("criteo-terabyte"), **about, ranks=8)
    assert size.row_width == 128
    assert size.table_bytes == size.table_state_bytes == 204_184_588 * 512
    assert size.steps == 4_195_197_692 // 65_536
    mlp = 39 * 127 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256 + 256
    assert size.dense_parameters == mlp + 13 * 128 + 1
    assert size.checkpoint_bytes == 2 * size.table_bytes + 12 * size.dense_parameters
    assert size.rank_bytes == 2 * size.table_bytes // 8 + 16 * size.dense_parameters
    assert size.pooled_bytes == 2 * 26 * 128 * 4 * 8192  # rows and gradients of the categorical fields
    averaged = size_of(replace(recipe("criteo-terabyte"), ema=0.9), **about, ranks=8)
    assert averaged.average_bytes == size.table_bytes + 4 * size.dense_parameters
    adam = size_of(replace(recipe("criteo-terabyte"), sparse_optimizer="adam"), **about, ranks=8)
    assert adam.rank_bytes == 4 * size.table_bytes + 16 * size.dense_parameters  # weights, gradient, two moments


def test_the_page_tells_of_every_recipe_and_its_commands() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"| `{name}` |" in page, name
    for name in ("criteo-x1", "criteo-terabyte"):  # the two that are dry-run; the others go the same way
        for line in recipe_text(name).partition("Commands:")[2].splitlines()[1:3]:
            assert line.strip() in page
