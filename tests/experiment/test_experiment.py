"""An experiment on two real ranks, from the command line to the folder, against counts by plain Python."""

import json
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pages import embedded_data
from tests.support.plans.experiments import BATCH_SIZE, plan
from tests.support.ranks import run_module, run_modules
from torchrec_deepfm.cli import main as cli
from torchrec_deepfm.cli.experiment import ExperimentCommand
from torchrec_deepfm.experiment.results import CollectiveBytes, Experiment, read_experiment
from torchrec_deepfm.experiment.step_timer import PHASES
from torchrec_deepfm.experiment.workload import DENSE_IN_FEATURES, BatchOptions, batches
from torchrec_deepfm.sharding.estimate import predict_plan
from torchrec_deepfm.sharding.inputs.tables import Table, read_tables
from torchrec_deepfm.sharding.plan.io import load_plan, save_plan

RANKS = 2
DIM = 8
LAYER = 4
SIZES = {"a": 300, "b": 40, "c": 1000, "d": 7}
OWNERS = (0, 1, 0, 0)
KINDS = {
    "tw": ["table_wise"] * 4,
    "rw": ["row_wise"] * 4,
    "cw": ["column_wise"] * 4,
    "dp": ["data_parallel"] * 4,
    "mix": ["table_wise", "row_wise", "column_wise", "data_parallel"],
}
TABLES = tuple(Table(name=name, num_embeddings=rows, embedding_dim=DIM) for name, rows in SIZES.items())
FLOAT = 4
ID = 4
LENGTH = 4
HOST_KINDS = ["table_wise", "table_row_wise", "grid_shard"]


def write_tables(folder: Path) -> Path:
    lines = [f'[[tables]]\nname = "{name}"\nnum_embeddings = {rows}\n' for name, rows in SIZES.items()]
    (folder / "tables.toml").write_text(f"embedding_dim = {DIM}\n" + "".join(lines))
    return folder / "tables.toml"


def write_plans(folder: Path) -> list[str]:
    for name, kinds in KINDS.items():
        save_plan(plan(TABLES, kinds, RANKS, OWNERS), folder / f"{name}.json")
    return [str(folder / f"{name}.json") for name in KINDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("experiment")
    words = ["--tables", str(write_tables(here)), "--output", str(here / "out"), "--plans", *write_plans(here)]
    words += [
        "--rules",
        "a=row_wise <500=data_parallel",
        "--batch-size",
        str(BATCH_SIZE),
        "--steps",
        "2",
        "--turns",
        "2",
    ]
    words += ["--over-arch-layer-sizes", str(LAYER), "--ranks", str(RANKS), "--scaling", "1", "2"]
    done = run_module(["torchrec_deepfm", "experiment", *words], OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "rank correlation" in done.stdout
    assert done.stderr == ""
    return here


@pytest.fixture(scope="module")
def experiment(folder: Path) -> Experiment:
    return read_experiment(folder / "out")


def sent(experiment: Experiment, name: str, rank: int) -> Mapping[str, CollectiveBytes]:
    [one] = [one for one in experiment.plans if one.name == name]
    return one.ranks[rank].traffic


def dense_parameters() -> int:
    """Of DeepFM with k = DIM - 1: a row per numeric feature, the bias, a hidden layer, the last one without bias."""
    fields = DENSE_IN_FEATURES + len(SIZES)
    hidden = fields * (DIM - 1) * LAYER + LAYER
    return DENSE_IN_FEATURES * DIM + 1 + hidden + LAYER


def all_reduced(experiment: Experiment, name: str) -> int:
    return sent(experiment, name, 0)["all_reduce"].sent_bytes


@pytest.mark.parametrize("rank", range(RANKS))
def test_bytes_of_table_wise(experiment: Experiment, rank: int) -> None:
    """By hand: who holds a table gets its ids of everybody, and sends their rows back; gradients go the other way."""
    mine, others = OWNERS.count(rank), len(OWNERS) - OWNERS.count(rank)
    splits = 3 * 8 * (RANKS - 1)  # how many lengths, ids and samples are to come: int64
    ids = others * BATCH_SIZE * (LENGTH + ID)  # one id a bag
    rows = mine * BATCH_SIZE * (RANKS - 1) * DIM * FLOAT
    gradients = others * BATCH_SIZE * DIM * FLOAT
    found = sent(experiment, "tw", rank)
    assert found["all_to_all"].sent_bytes == splits + ids + rows + gradients
    assert set(found) == {"all_to_all", "all_reduce"}
    assert found["all_reduce"].sent_bytes == 2 * dense_parameters() * FLOAT * (RANKS - 1) // RANKS


@pytest.mark.parametrize("rank", range(RANKS))
def test_bytes_of_row_wise(experiment: Experiment, rank: int) -> None:
    """By hand: ids go where their row is; each rank has partial sums of all samples, to be reduced and scattered."""
    batch = batches(TABLES, BatchOptions(batch_size=BATCH_SIZE), rank, 1, torch.device("cpu"))[
        0
    ].sparse_features.to_dict()
    away = sum(
        value // math.ceil(rows / RANKS) != rank
        for name, rows in SIZES.items()
        for value in batch[name].values().tolist()
    )
    everything = len(SIZES) * BATCH_SIZE
    found = sent(experiment, "rw", rank)
    assert found["all_to_all"].sent_bytes == 3 * 8 * (RANKS - 1) + everything * (RANKS - 1) * LENGTH + away * ID
    assert found["reduce_scatter"].given_bytes == everything * RANKS * DIM * FLOAT
    assert found["reduce_scatter"].sent_bytes == everything * (RANKS - 1) * DIM * FLOAT
    assert found["all_gather"].sent_bytes == everything * (RANKS - 1) * DIM * FLOAT


def test_bytes_of_data_parallel(experiment: Experiment) -> None:
    assert set(sent(experiment, "dp", 0)) == {"all_reduce"}
    tables = sum(SIZES.values()) * DIM
    assert all_reduced(experiment, "dp") == 2 * (tables + dense_parameters()) * FLOAT * (RANKS - 1) // RANKS
    assert all_reduced(experiment, "mix") - all_reduced(experiment, "tw") == 2 * SIZES["d"] * DIM * FLOAT // 2


def test_every_rank_holds_its_shards(experiment: Experiment) -> None:
    """Weights, and for each row that is held one moment of rowwise Adagrad."""
    by_name = {one.name: one for one in experiment.plans}
    row = (DIM + 1) * FLOAT
    for rank in range(RANKS):
        held = sum(rows for rows, owner in zip(SIZES.values(), OWNERS, strict=True) if owner == rank)
        assert by_name["tw"].ranks[rank].table_bytes == held * row
        assert by_name["cw"].ranks[rank].table_bytes == sum(SIZES.values()) * (DIM // RANKS + 1) * FLOAT
    assert by_name["dp"].ranks[0].table_bytes >= sum(SIZES.values()) * DIM * FLOAT


def test_phases_are_there_where_a_plan_has_them(experiment: Experiment) -> None:
    by_name = {one.name: one for one in experiment.plans}
    for one in experiment.plans:
        for rank in one.ranks:
            assert set(rank.split_ms) == set(PHASES)
            assert len(rank.step_ms) == experiment.settings.turns
            assert min(rank.step_ms) > 0
            assert rank.peak_bytes is None or rank.peak_bytes >= 0
    for phase in PHASES:
        assert by_name["mix"].ranks[0].split_ms[phase] > 0
    assert by_name["dp"].ranks[0].split_ms["backward_output_dist"] == 0


def test_predictions_are_those_of_predict(folder: Path, experiment: Experiment) -> None:
    hardware = experiment.hardware
    tables = read_tables(str(folder / "tables.toml"))
    for one in experiment.plans:
        reported = predict_plan(load_plan(folder / "out" / "plans" / f"{one.name}.json"), tables, hardware)
        assert one.plan.predicted == reported
    for name, kinds in KINDS.items():
        written = {
            table.name: table.sharding_type for table in load_plan(folder / "out" / "plans" / f"{name}.json").tables
        }
        assert written == dict(zip(SIZES, kinds, strict=True))


def test_rules_make_a_plan(experiment: Experiment) -> None:
    [one] = [one for one in experiment.plans if one.name not in KINDS]
    kinds = {table.name: table.sharding_type for table in one.plan.tables}
    assert one.name == "a_row_wise_500_data_parallel"
    assert (kinds["a"], kinds["b"], kinds["d"]) == ("row_wise", "data_parallel", "data_parallel")


def test_the_report_shows_what_the_results_say(folder: Path) -> None:
    raw: Any = json.loads((folder / "out" / "results.json").read_text())
    shown = embedded_data((folder / "out" / "report.html").read_text())
    assert shown["against"]["measured_ms"] == [one["step_ms"] for one in raw["plans"]]
    assert shown["heat-maps"]["table_mib"] == [[r["table_bytes"] / 2**20 for r in one["ranks"]] for one in raw["plans"]]
    assert {int(ranks) for ranks in shown["scaling"]["predicted, for the plan that the search finds"]} == {1, 2}


def test_calibrate_reads_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["calibrate", str(folder / "out"), "--output", str(folder / "mine.toml")])
    assert "class PerfConfig(EmbeddingPerfEstimatorConfig)" in (folder / "mine.py").read_text()
    reported = capsys.readouterr().out
    assert "spearman" in reported
    (folder / "out" / "report-calibrated.html").unlink()
    cli.main(["calibrate", str(folder / "out" / "results.json"), "--output", str(folder / "mine.toml")])
    assert capsys.readouterr().out == reported
    assert (folder / "out" / "report-calibrated.html").exists()
    assert "ranks_per_host = 2" in (folder / "mine.toml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plans", "tw.json"], "tw.json: made for 2 rank(s), but there are 1"),
        (["--plans", "absent.json"], "absent.json: no such file"),
        (["--plans", "tables.toml"], "tables.toml: damaged (Expecting value"),
        (["--rules", "z=row_wise"], "--constraint z=row_wise"),
        (["--rules", "a=diagonal"], "diagonal"),
        (["--rules", "a=data_parallel", "a=data_parallel"], "another plan has the name a_data_parallel"),
        (["--hardware", "h100"], "it describes cuda ranks, these are cpu ranks"),
        (["--hardware", "h1000"], "no such preset"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--steps", "-1"], "--steps -1: must be at least 1"),
        (["--scaling", "0"], "--scaling 0: must be at least 1"),
        (["--scaling", "70000"], "--scaling 70000: must be at most 65,536"),
        (["--batch-size", "9" * 30], "must be at most 2,147,483,647"),
        (["--ranks", "9" * 30], "must be at most 65,536"),
        (["--output", "tables.toml/new"], "nothing can be written below"),
        (["--plans", "one\nline.json"], r"--plans 'one\nline.json': the name is too long or can't be printed"),
        (["--over-arch-layer-sizes", "0"], "--over-arch-layer-sizes 0"),
        (["--output", "."], "the folder is not empty"),
        (["--tables", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    given = {"--tables": "tables.toml", "--output": "new", "--ranks": "1"}
    given = {option: value for option, value in given.items() if option not in words}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["experiment", *(word for pair in given.items() for word in pair), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "new").exists()


def test_numbers_of_ranks_are_checked_before_anything_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = ["--tables", folder / "tables.toml", "--output", folder / "new", "--ranks", 1, "--rules", "*=table_wise"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["experiment", *map(str, words), "--scaling", "2", "3"])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --scaling 3: 3 ranks on cpu: not a multiple of the 2 ranks of a host")
    assert captured.out == ""
    assert not (folder / "new").exists()


def test_calibrate_writes_nothing_where_the_output_is_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "out" / "report-calibrated.html"
    report.unlink(missing_ok=True)
    for output, message in ((folder, "this is a folder"), (folder / "absent" / "x.toml", "its folder does not exist")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["calibrate", str(folder / "out"), "--output", str(output)])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: --output {output}: {message}")
    assert not report.exists()


def test_calibrate_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([str(folder / "absent")], "results.json: no such file"),
        ([], "no experiment given"),
        ([str(folder)], "results.json: no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["calibrate", *words, "--output", str(folder / "other.toml")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (folder / "other.toml").exists()


@pytest.fixture(scope="module")
def on_two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two agents with two ranks each, as on two hosts."""
    here = tmp_path_factory.mktemp("hosts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--tables", str(write_tables(here)), "--output", str(here / "out"), "--batch-size", str(BATCH_SIZE)]
    words += ["--steps", "2", "--turns", "1", "--over-arch-layer-sizes", str(LAYER)]
    words += ["--rules", *(f">=40={kind} <40=data_parallel" for kind in HOST_KINDS)]
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "2"]
    command = ["-m", "torchrec_deepfm", "experiment", *words]
    launchers = [["torchrec_deepfm.launch", *meeting, "--node-rank", str(number), *command] for number in range(2)]
    for host in run_modules(launchers, OMP_NUM_THREADS="1"):
        assert host.returncode == 0, f"{host.stdout[-3000:]}\n{host.stderr[-3000:]}"
    return here


def test_two_hosts(on_two_hosts: Path) -> None:
    found = read_experiment(on_two_hosts / "out")
    assert (found.settings.ranks, found.settings.local_ranks) == (4, 2)
    assert [one.plan.tables[0].sharding_type for one in found.plans] == HOST_KINDS
    hardware = found.hardware
    assert (hardware.ranks_per_host, hardware.local_world_size(4)) == (2, 2)
    for one in found.plans:
        assert len(one.ranks) == 4
        assert one.plan.predicted == predict_plan(one.plan, TABLES, hardware)
        if one.plan.tables[0].sharding_type != "table_wise":
            pieces = [shard for table in one.plan.tables[:3] for shard in table.shards]
            cuts = {(table.name, shard.offsets[1]) for table in one.plan.tables[:3] for shard in table.shards}
            assert len(pieces) == 2 * len(cuts)  # both ranks of a host have rows of each piece of columns


def test_bytes_of_table_row_wise_on_two_hosts(on_two_hosts: Path) -> None:
    """By hand: the ranks of the table's host add up their parts, then each sends its half of the samples' rows on."""
    plans = read_experiment(on_two_hosts / "out").plans
    [one] = [each for each in plans if each.plan.tables[0].sharding_type == "table_row_wise"]
    sharded = [table for table in one.plan.tables if table.sharding_type == "table_row_wise"]
    assert [sorted(table.ranks) in ([0, 1], [2, 3]) for table in sharded] == [True] * 3
    for rank, measured in enumerate(one.ranks):
        mine = sum(rank in {shard.rank for shard in table.shards} for table in sharded)
        # Partial sums of all four ranks' samples, half of which the neighbour on the host is to add up.
        sent_bytes = mine * 4 * BATCH_SIZE * DIM * FLOAT // 2
        assert measured.traffic.get("reduce_scatter", CollectiveBytes()).sent_bytes == sent_bytes


def test_the_command_line_of_the_ranks_is_the_same_command() -> None:
    words = "experiment|--tables|t.csv|--output|o|--plans|a.json|b c.json|--rules|*=row_wise a=any|--sweep|--ranks|4|"
    words += "--over-arch-layer-sizes|--ids|uniform|--scaling|1|8"
    for line in (words, "experiment|--tables|t.csv|--output|o"):
        command = cli.parse(line.split("|"))
        assert isinstance(command, ExperimentCommand)
        assert command.sweep == ("--sweep" in line)
        assert cli.parse(command.words()) == command
