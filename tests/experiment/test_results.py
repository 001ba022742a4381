"""The folder of an experiment: it reads back what was written, and says what is wrong with a damaged one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans.experiments import cpu, experiment, plan
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.plans import write_experiment
from torchrec_deepfm.experiment.results import Experiment, PlanMeasured, read_experiment
from torchrec_deepfm.sharding.inputs.tables import Table

TABLES = (
    Table(name="a", num_embeddings=100, embedding_dim=8),
    Table(name="b", num_embeddings=50, embedding_dim=8, pooling_factor=2.5),
)


def example() -> Experiment:
    plans = {"one": plan(TABLES, ["table_wise", "row_wise"], 2), "two": plan(TABLES, ["data_parallel"] * 2, 2)}
    return experiment(TABLES, plans, {"one": 10.0, "two": 12.0}, cpu(2))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example; copy it to change it."""
    folder = tmp_path_factory.mktemp("written") / "here"
    write_experiment(example(), folder)
    return folder


def test_it_reads_what_it_wrote(written: Path) -> None:
    assert read_experiment(written) == example()
    assert read_experiment(written / "results.json") == example()
    assert sorted(path.relative_to(written).as_posix() for path in written.rglob("*.*")) == [
        "plans/one.json", "plans/two.json", "report.html", "results.json",
    ]  # fmt: skip
    assert list(written.parent.iterdir()) == [written]


def test_a_step_is_the_median_over_turns_of_the_slowest_rank() -> None:
    one = example().plans[0]
    assert one.turns_ms == [12.0, 10.0, 9.0]
    assert one.step_ms == 10.0


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="the folder is not empty"):
        write_experiment(example(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="a file has this name"):
        write_experiment(example(), tmp_path / "mine.txt")


def remove(key: str) -> Callable[[Any], None]:
    return lambda raw: raw.pop(key)


def put(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("plans"), "missing plans; run the experiment again"),
        (remove("settings"), "missing settings; run the experiment again"),
        (put([], "plans"), "plans: expected a list of length >= 1, not []; run the experiment "),
        (put("x", "plans"), "plans: expected a list, not 'x'; run the experiment again"),
        (
            put("../../etc/passwd", "plans", 0, "name"),
            "plans[0] (../../etc/passwd): '../../etc/passwd' is not a valid nam",
        ),
        (put("absent", "plans", 0, "name"), "absent.json: no such file"),
        (put([], "plans", 0, "ranks"), "plan one has 0 ranks, not 2 in order; run the experiment again"),
        (
            put([], "plans", 0, "ranks", 0, "step_ms"),
            "plans[0] (one).ranks[0].step_ms: expected a list of length >= 1, n",
        ),
        (
            put([-1.0], "plans", 0, "ranks", 0, "step_ms"),
            "plans[0] (one).ranks[0].step_ms[0]: expected a number > 0.0, not -",
        ),
        (
            put(["fast"], "plans", 0, "ranks", 0, "step_ms"),
            "plans[0] (one).ranks[0].step_ms[0]: expected a number, not 'fast';",
        ),
        (put(1, "settings", "unknown"), "settings: unknown key 'unknown'; choose one of tables, ranks, loca"),
        (put(7, "format_version"), "format version 7"),
        (put([1.0, 2.0], "plans", 0, "ranks", 1, "step_ms"), "plan one has 2 turns, not 3; run the experiment again"),
        (put("2", "settings", "ranks"), "settings.ranks: expected a whole number, not '2'; run the experime"),
        (put(True, "settings", "local_ranks"), "settings.local_ranks: expected a whole number, not True; run the e"),
        (put(1e999, "settings", "batch_size"), "settings.batch_size: expected a whole number, not inf; run the exp"),
        (put(0, "settings", "turns"), "settings.turns: expected a whole number >= 1, not 0; run the exper"),
        (put(0.5, "settings", "seed"), "settings.seed: expected a whole number, not 0.5; run the experimen"),
        (
            put(["a"], "settings", "over_arch_layer_sizes"),
            "settings.over_arch_layer_sizes[0]: expected a whole number, not 'a",
        ),
        (
            put("abc", "settings", "over_arch_layer_sizes"),
            "settings.over_arch_layer_sizes: expected a list, not 'abc'; run th",
        ),
        (put("adamw", "settings", "optimizer"), "settings.optimizer: 'adamw' is not valid; choose one of rowwise_ad"),
        (put(None, "settings", "device"), "settings.device: expected text, not None; run the experiment again"),
        (
            put(-1, "settings", "tables", 0, "num_embeddings"),
            "settings.tables[0] (a).num_embeddings: expected a whole number >= ",
        ),
        (put(99, "settings", "tables", 0, "num_embeddings"), "plan one: table a is 100 x 8 in the plan, but 99 x 8"),
        (put(-1, "hardware", "ddr_bytes"), "hardware.ddr_bytes: expected a whole number >= 1, not -1; run the "),
        (put(1e999, "plans", 0, "ranks", 0, "table_bytes"), "ranks[0].table_bytes: expected a whole number, not inf"),
        (put("\ud800", "settings", "device"), "damaged (key 'device': '\\ud800' can't be printed)"),
        (put("other", "format"), "not the results of an experiment; name a folder that experiment wr"),
    ],
)
def test_damage_is_reported(written: Path, tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    shutil.copytree(written, tmp_path / "here")
    path = tmp_path / "here" / "results.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw).replace("Infinity", "1e999"))
    with pytest.raises(UserError) as error:
        read_experiment(tmp_path / "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": NaN}'])
def test_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="experiment"):
        read_experiment(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: no such file; name a folder that experiment wrote"):
        read_experiment(tmp_path / "absent")


@pytest.mark.parametrize(("turns", "noise"), [((3.0, 9.0), True), ((2.0, 2.5), True), ((4.1, 9.0), False)])
def test_plans_whose_turns_overlap_are_within_noise(turns: tuple[float, float], noise: bool) -> None:
    """By hand, beside a plan whose turns took 2 to 4 ms on its slowest rank."""
    tables = (Table(name="a", num_embeddings=100, embedding_dim=8),)
    (made,) = experiment(tables, {"one": plan(tables, ["table_wise"], 2)}, {"one": 1.0}, cpu(2)).plans
    quick, slow = made.ranks

    def took(*step_ms: float) -> PlanMeasured:
        return replace(made, ranks=(replace(quick, step_ms=(1.0, 1.0)), replace(slow, step_ms=step_ms)))

    assert took(*turns).within_noise_of(took(2.0, 4.0)) is noise
    assert took(2.0, 4.0).within_noise_of(took(*turns)) is noise
