"""``train --constraint`` and ``--plan`` on two real ranks: what comes out, and how their mistakes reach every rank."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ranks import CPU, run_module, run_ranks
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.distributed.process_group import on_main
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.plan.io import load_plan
from torchrec_deepfm.training.config import RunOptions
from torchrec_deepfm.training.recipes import smoke
from torchrec_deepfm.training.trainer import train

CONFIG = smoke()
RULES = (
    "C*=column_wise", "C3=row_wise", "C4=table_row_wise", "C5=grid_shard:min_partition=4", "C6=table_column_wise",
    "C7=table_wise", "C8=data_parallel",
)  # fmt: skip


FOR_ONE = "--plan {}: made for 1 rank(s), but there are 2; start 1 (-j), or make a plan for 2"


def refusal(folder: str, **options: Any) -> str:
    """The lines that this rank gets; a run that is refused leaves nothing behind."""
    output = Path(folder) / "refused"
    config = options.pop("config", CONFIG)
    with pytest.raises(UserError) as raised:
        train(config, PreparedData.open(Path(folder) / "data"), output, CPU, RunOptions(**options))
    dist.barrier()
    return f"{raised.value}{' and leaves its folder' if output.exists() else ''}"


def everything(folder: str) -> dict[str, Any]:
    home, data = Path(folder), PreparedData.open(Path(folder) / "data")
    train(CONFIG, data, home / "by rules", CPU, RunOptions(constraints=RULES))
    train(CONFIG, data, home / "by plan", CPU, RunOptions(plan=home / "by rules" / "plan.json"))
    train(CONFIG, data, home / "by planner", CPU)
    options = RunOptions(hardware=str(home / "here.toml"))
    said: list[str] = []
    train(CONFIG, data, home / "by hardware", CPU, options, say=said.append)
    on_main(lambda: unfinished(home / "by rules", home / "gone on with"))
    train(CONFIG, data, home / "gone on with", CPU, RunOptions(plan=home / "by planner" / "plan.json"))
    return {
        "placed": [line for line in said if line.startswith("Tables placed by")],
        "hardware": refusal(folder, hardware="h100"),
        "one rank": refusal(folder, plan=home / "one rank.json"),
        "absent": refusal(folder, plan=home / "absent.json"),
        "both": refusal(folder, plan=home / "by rules" / "plan.json", constraints=RULES),
        "rule": refusal(folder, constraints=("C99*=row_wise",)),
        "qcomms": refusal(folder, config=replace(CONFIG, qcomms=("bf16",))),
    }


def unfinished(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()


@pytest.fixture(scope="module")
def home(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plans")
    shutil.copytree(data.folder, home / "data")
    tables = [
        {
            "name": f"t_{name}", "num_embeddings": rows, "embedding_dim": 12, "sharding_type": "table_wise",
            "compute_kernel": "fused", "ranks": [0], "shards": [{"rank": 0, "offsets": [0, 0], "sizes": [rows, 12]}],
        }
        for name, rows in data.num_embeddings.items()
    ]  # fmt: skip
    (home / "here.toml").write_text('base = "cpu"\nintra_host_bandwidth = "0.4 GB/s"\n[extra]\nshard_ms = 0.05\n')
    head = {
        "format": "torchrec_deepfm.plan", "format_version": 2, "world_size": 1, "local_world_size": 1,
        "batch_size": None, "search": "by hand", "hardware": None, "made_with": {}, "predicted": None,
    }  # fmt: skip
    (home / "one rank.json").write_text(json.dumps({**head, "tables": tables}))
    return home


@pytest.fixture(scope="module")
def reported(home: Path) -> list[dict[str, Any]]:
    return run_ranks(everything, 2, str(home))


def summary(home: Path, run: str) -> Any:
    found = json.loads((home / run / "summary.json").read_text())
    return {split: found[split] for split in ("validation", "test")}


def test_a_plan_of_a_run_gives_the_same_run(reported: list[dict[str, Any]], home: Path) -> None:
    plan = load_plan(home / "by rules" / "plan.json")
    kinds = {table.name: table.sharding_type for table in plan.tables}
    assert (plan.search, plan.world_size, plan.local_world_size, plan.batch_size) == ("constraints", 2, 2, 256)
    expected = {
        "t_C3": "row_wise", "t_C4": "table_row_wise", "t_C5": "grid_shard", "t_C6": "table_column_wise",
        "t_C7": "table_wise", "t_C8": "data_parallel",
    }  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected
    assert load_plan(home / "by plan" / "plan.json") == plan
    assert summary(home, "by plan") == summary(home, "by rules")


def test_a_run_resumes_under_another_plan(reported: list[dict[str, Any]], home: Path) -> None:
    assert load_plan(home / "gone on with" / "plan.json") == load_plan(home / "by planner" / "plan.json")
    before, after = summary(home, "by rules"), summary(home, "gone on with")
    for split in before:
        assert after[split]["auc"] == pytest.approx(before[split]["auc"], abs=1e-6)


def test_mistakes_reach_every_rank_in_one_line(reported: list[dict[str, Any]], home: Path) -> None:
    placed = [each.pop("placed") for each in reported]
    assert reported[0] == reported[1]
    assert placed[1] == []
    assert re.fullmatch(
        r"Tables placed by (the balanced|TorchRec's) planner, \d+\.\d\d ms per step predicted for here", *placed[0]
    )
    plan = load_plan(home / "by hardware" / "plan.json")
    assert plan.predicted is not None
    assert plan.hardware is not None
    assert (plan.hardware.name, plan.hardware.intra_host_bandwidth) == ("here", 4e8)
    assert reported[0] == {
        "hardware": "--hardware h100: it describes cuda ranks, these are cpu ranks; leave the option out, or name "
        "another one",
        "one rank": FOR_ONE.format(home / "one rank.json"),
        "absent": f"{home / 'absent.json'}: no such file; make a plan with plan, or name a run's plan.json",
        "both": "--plan and --constraint: a plan already places every table; leave one of them out",
        "rule": "--constraint C99*=row_wise: no table or feature has this name; did you mean one of C9, C19, t_C9?",
        "qcomms": "--qcomms bf16 bf16: quantised communication needs GPUs, these are cpu ranks; leave the option out",
    }


def test_the_command_line(data: PreparedData, home: Path, tmp_path: Path) -> None:
    launcher = ["torchrec_deepfm.launch", "--standalone", "--nproc_per_node", "2", "-m", "torchrec_deepfm"]
    command = ["train", "--data", str(data.folder), "--output", str(tmp_path / "run"), "--recipe", "smoke"]
    done = run_module([*launcher, *command, "--plan", str(home / "one rank.json")], OMP_NUM_THREADS="1")
    line = FOR_ONE.format(home / "one rank.json")
    assert (done.returncode, done.stderr.splitlines()) == (2, [f"error: {line}"])
    assert not (tmp_path / "run").exists()
