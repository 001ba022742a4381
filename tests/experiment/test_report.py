"""Reports: what they show is what is in the plans and the measurements, and they need nothing else."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import embedded_data
from tests.support.plans.experiments import cpu, experiment, plan
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.report import write_experiment_report
from torchrec_deepfm.sharding.estimate import with_prediction
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.tables import Table
from torchrec_deepfm.sharding.plan.io import save_plan
from torchrec_deepfm.sharding.plan.plan import Cost, PlanCost, PlanFile
from torchrec_deepfm.sharding.plan.report import write_plan_report

pytestmark = pytest.mark.pictures

TABLES = (
    Table(name="a", num_embeddings=1000, embedding_dim=16),
    Table(name="b", num_embeddings=500, embedding_dim=16),
    Table(name="c", num_embeddings=64, embedding_dim=16, pooling_factor=4.0),
)


class Links(HTMLParser):
    """Every address in a page, by its attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(name, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data")]


def read_costs(path: Path) -> dict[str, list[float]]:
    """What a plan's file gives for its ranks, by plain Python: the sums over the shards, not the file's own sums."""
    raw = json.loads(path.read_text())
    sums: dict[str, list[float]] = {}
    for table in raw["tables"]:
        for shard in table["shards"]:
            for key, value in shard["predicted"].items():
                sums.setdefault(key, [0.0] * raw["world_size"])[shard["rank"]] += value
    return sums


@pytest.fixture
def predicted(tmp_path: Path) -> tuple[PlanFile, Path]:
    one = with_prediction(plan(TABLES, ["table_wise", "row_wise", "data_parallel"], 4), TABLES, cpu(4))
    save_plan(one, tmp_path / "plan.json")
    return one, tmp_path


def test_a_plans_heat_maps_are_the_plans(predicted: tuple[PlanFile, Path]) -> None:
    one, folder = predicted
    write_plan_report(one, folder / "plan.html", bound_ms=1e-6)
    html = (folder / "plan.html").read_text()
    assert "1 table is whole on one rank each; 1 table is cut by rows over all ranks; 1 table is replicated" in html
    assert "Lower bound of the options searched" in html
    data = embedded_data(html)
    file = {table["name"]: table for table in json.loads((folder / "plan.json").read_text())["tables"]}
    assert sorted(data["placement"]["tables"]) == sorted(file)
    for name, amounts in zip(data["placement"]["tables"], data["placement"]["amounts"], strict=True):
        held = {shard["rank"]: shard["predicted"]["total_ms"] for shard in file[name]["shards"]}
        assert amounts == [pytest.approx(held[rank]) if rank in held else None for rank in range(4)]
    costs = read_costs(folder / "plan.json")
    assert data["heat-maps"]["cost_ms"] == pytest.approx(costs["total_ms"])
    assert len(set(data["heat-maps"]["cost_ms"])) > 1
    assert data["heat-maps"]["ddr_gib"] == pytest.approx([value / 2**30 for value in costs["ddr_bytes"]])
    assert "hbm_gib" not in data["heat-maps"]
    assert data["terms"]["exchange of rows (fwd_comms)"] == pytest.approx(costs["fwd_comms_ms"])
    assert [sum(parts) for parts in zip(*data["terms"].values(), strict=True)] == pytest.approx(costs["total_ms"])


def test_an_experiments_heat_maps_are_the_plans_and_the_measurements(tmp_path: Path) -> None:
    plans = {
        "all_tw": plan(TABLES, ["table_wise"] * 3, 2),
        "mix<1>": plan(TABLES, ["row_wise", "data_parallel", "table_wise"], 2),
    }
    one = experiment(TABLES, plans, {"all_tw": 10.0, "mix<1>": 20.0}, cpu(2))
    write_experiment_report(one, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    maps = embedded_data(html)["heat-maps"]
    assert maps["plans"] == ["all_tw", "mix<1>"]
    assert maps["measured_ms"] == [[10.0, 10.0], [20.0, 20.0]]
    for number, measured in enumerate(one.plans):
        save_plan(measured.plan, tmp_path / "plan.json")
        costs = read_costs(tmp_path / "plan.json")
        assert maps["predicted_ms"][number] == pytest.approx(costs["total_ms"])
        memory = [max(hbm, ddr) / 2**20 for hbm, ddr in zip(costs["hbm_bytes"], costs["ddr_bytes"], strict=True)]
        assert maps["predicted_mib"][number] == pytest.approx(memory)
    assert embedded_data(html)["split"]["look-up"] == [5.0, 10.0]
    assert embedded_data(html)["against"]["measured_ms"] == [10.0, 20.0]
    assert embedded_data(html)["scaling"]["measured, fastest plan"] == {"2": 10.0}
    links = [value for name, value in Links(html).found if name == "href" and not value.startswith("#")]
    assert links == ["plans/all_tw.json", "plans/mix<1>.json"]
    assert "mix<1>" not in html  # escaped
    # Nothing is loaded from anywhere else.
    assert all(value.startswith("data:image/") for name, value in Links(html).found if name != "href")


def test_a_plan_of_many_ranks(tmp_path: Path) -> None:
    """1,024 ranks on 128 hosts: one picture, a size that a browser takes, and every rank's number in it."""
    tables = tuple(Table(name=f"t{number}", num_embeddings=1000, embedding_dim=16) for number in range(1024))
    cost = {name: 0 if name.endswith("bytes") else 0.0 for name in Cost.__dataclass_fields__}
    ranks = tuple(Cost(**{**cost, "total_ms": 1.0 + r / 1024, "hbm_bytes": r}) for r in range(1024))  # type: ignore[arg-type]
    wide = plan(tables, ["table_wise"] * 1024, 1024)
    one = PlanFile(
        world_size=1024, local_world_size=8, batch_size=1, search="by hand", tables=wide.tables,
        hardware=PRESETS["h100"], predicted=PlanCost(critical_path_ms=2.0, mean_ms=1.5, per_rank=ranks),
    )  # fmt: skip
    write_plan_report(one, tmp_path / "plan.html")
    data = embedded_data((tmp_path / "plan.html").read_text())
    assert data["heat-maps"]["cost_ms"] == [1.0 + rank / 1024 for rank in range(1024)]
    assert (tmp_path / "plan.html").stat().st_size < 2_000_000


def test_a_plan_without_predictions(tmp_path: Path) -> None:
    write_plan_report(plan(TABLES, ["table_wise"] * 3, 2), tmp_path / "plan.html")
    html = (tmp_path / "plan.html").read_text()
    assert "table_wise" in html
    assert set(embedded_data(html)) == {"placement"}
    assert "3 tables are whole on one rank each" in html


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_plan_report(plan(TABLES, ["table_wise"] * 3, 2), tmp_path / "file" / "plan.html")


def test_reports_load_no_torch(tmp_path: Path) -> None:
    module = "torchrec_deepfm.experiment.report"
    code = f"import sys, {module}; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
