"""PlanSet written and read: nothing is lost, and whatever is wrong with a file is reported in one line."""

import copy
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.types import BoundsCheckMode, CacheAlgorithm, CacheParams
from torchrec.types import DataType

from tests.support.plans.every_type import PATH, TABLES, plan_file, sharding_plan
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.presets import PRESETS
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES
from torchrec_deepfm.sharding.plan.io import load_plan, plan_json, save_plan
from torchrec_deepfm.sharding.plan.plan import Cost, PlanCost, PlanFile, PlannedShard, PlannedTable
from torchrec_deepfm.sharding.plan.torchrec_plan import planned_tables, to_sharding_plan
from torchrec_deepfm.sharding.plan.validate import check_fits

TYPE_OF = {table.name: table.sharding_type for table in plan_file().tables}


def cost(number: int) -> Cost:
    return Cost(
        total_ms=21.0 * number, fwd_compute_ms=1.0 * number, fwd_comms_ms=2.0 * number, bwd_compute_ms=3.0 * number,
        bwd_comms_ms=4.0 * number, prefetch_ms=5.0 * number, input_dist_comms_ms=6.0 * number, hbm_bytes=7 * number,
        ddr_bytes=8 * number,
    )  # fmt: skip


def with_predictions(plan: PlanFile) -> PlanFile:
    tables = tuple(
        replace(table, shards=tuple(replace(shard, predicted=cost(n)) for n, shard in enumerate(table.shards)))
        for table in plan.tables
    )
    predicted = PlanCost(critical_path_ms=63.0, mean_ms=31.5, per_rank=tuple(cost(rank) for rank in range(4)))
    return replace(plan, tables=tables, predicted=predicted, hardware=PRESETS["h100"])


def test_every_type_is_in_the_plan() -> None:
    assert set(TYPE_OF.values()) == set(SHARDING_TYPES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torchrecs_plan_survives_a_file(tmp_path: Path, device: str) -> None:
    plan = sharding_plan(device)
    written = replace(plan_file(), tables=planned_tables(plan, {PATH: TABLES}, world_size=4))
    save_plan(written, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == written
    again = to_sharding_plan(loaded, PATH, torch.device(device))
    assert again == plan
    if device == "cuda":  # ranks of a host take its GPUs in order
        placement = again.plan[PATH]["t_b"].sharding_spec.shards[0].placement  # type: ignore[index]
        assert (placement.rank(), str(placement.device())) == (3, "cuda:1")


def test_predictions_and_hardware_survive_a_file(tmp_path: Path) -> None:
    plan = with_predictions(plan_file())
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.without_predictions() == replace(plan_file(), hardware=plan.hardware, made_with=plan.made_with)


def test_options_of_kernels_survive_a_file(tmp_path: Path) -> None:
    plan = sharding_plan("cuda")
    sharding = plan.plan[PATH]["t_c"]  # type: ignore[index]
    sharding.compute_kernel = "fused_uvm_caching"
    sharding.cache_params = CacheParams(
        algorithm=CacheAlgorithm.LFU, load_factor=0.25, reserved_memory=2.0, precision=DataType.FP16,
        prefetch_pipeline=True,
    )  # fmt: skip
    sharding.enforce_hbm, sharding.stochastic_rounding = True, False
    sharding.bounds_check_mode, sharding.output_dtype = BoundsCheckMode.WARNING, DataType.BF16
    written = replace(plan_file(), tables=planned_tables(plan, {PATH: TABLES}, world_size=4))
    save_plan(written, tmp_path / "plan.json")
    assert to_sharding_plan(load_plan(tmp_path / "plan.json"), PATH, torch.device("cuda")) == plan


def test_a_plan_over_nvlink_domains(tmp_path: Path) -> None:
    """A table over the eight ranks of two trays that share NVLink."""
    shards = tuple(PlannedShard(rank=rank, offsets=(5 * rank, 0), sizes=(5, 8)) for rank in range(8))
    table = PlannedTable(
        name="t",
        num_embeddings=40,
        embedding_dim=8,
        sharding_type="table_row_wise",
        compute_kernel="fused",
        shards=shards,
    )
    plan = PlanFile(
        world_size=16, local_world_size=4, pod_size=2, batch_size=8, search="balanced", tables=(table,), made_with={}
    )
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    check_fits(plan, [table], 16, local_world_size=4, pod_size=2)
    with pytest.raises(
        UserError, match=r"t is table_row_wise.*TORCHREC_RESOLVED_POD_SIZE=2 in the environment"
    ) as caught:
        check_fits(plan, [table], 16, local_world_size=4, pod_size=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"made for hosts of 4 rank\(s\), but they have 8"):
        check_fits(plan, [table], 16, local_world_size=8, pod_size=2)
    whole = replace(table, sharding_type="table_wise", shards=(PlannedShard(rank=3, offsets=(0, 0), sizes=(40, 8)),))
    check_fits(replace(plan, tables=(whole,)), [table], 16, local_world_size=8, pod_size=1)  # depends on no host
    for wrong, message in (({"pod_size": 3}, "not a multiple of 12"), ({"pod_size": 1}, "over 4 ranks")):
        save_plan(replace(plan, **wrong), tmp_path / "plan.json")
        with pytest.raises(UserError, match=message):
            load_plan(tmp_path / "plan.json")


def test_the_file_is_json_for_people() -> None:
    """Plain Python reads it, and a shard is a line of it."""
    text = plan_json(with_predictions(plan_file()))
    raw = json.loads(text)
    assert (raw["format"], raw["format_version"], raw["world_size"]) == ("torchrec_deepfm.plan", 2, 4)
    row_wise = next(table for table in raw["tables"] if table["name"] == "t_c")
    assert (row_wise["sharding_type"], row_wise["ranks"]) == ("row_wise", [0, 1, 2, 3])
    # TorchRec cuts 50 rows into pieces of ceil(50 / 4) = 13.
    assert [(each["offsets"], each["sizes"]) for each in row_wise["shards"]] == [
        ([0, 0], [13, 256]), ([13, 0], [13, 256]), ([26, 0], [13, 256]), ([39, 0], [11, 256]),
    ]  # fmt: skip
    replicated = next(table for table in raw["tables"] if table["name"] == "t_a")
    assert [(each["rank"], each["sizes"]) for each in replicated["shards"]] == [(n, [37, 256]) for n in range(4)]
    lines = text.splitlines()
    assert sum(line.lstrip().startswith('{"rank"') for line in lines) == 4 + sum(
        len(t["shards"]) for t in raw["tables"]
    )
    assert max(len(line) for line in lines) < 400


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_plan(plan_file(), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"folder/plan\.json: the plan can't be written \(No such file or directory\)"):
        save_plan(plan_file(), tmp_path / "folder" / "plan.json")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"taken: the plan can't be written \(Is a directory\); name another file"):
        save_plan(plan_file(), tmp_path / "taken")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["plan.json", "taken"]
    assert path.read_bytes() == before
    assert stat.S_ISREG(path.stat().st_mode)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        load_plan(path)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged (Expecting value: line 1 column 1 (char 0)); make the plan again"),
        (plan_json(plan_file()).encode()[:-50], "damaged (Expecting value: line 105 column 52 (char 3446)); make th"),
        (b"\xff\xfe", "byte 0 is not valid UTF-8; save it as UTF-8, or make a plan with plan, or"),
        (b"[" * 100_000, "damaged (nested too deeply); make the plan again"),
        (b'{"world_size": NaN}', "damaged (NaN is not a valid number); make the plan again"),
        (b'{"a": 1, "a": 2}', "damaged (key 'a' appears twice in one object); make the plan again"),
        (b"[]", 'not a plan (it lacks "format": "torchrec_deepfm.plan"); make one w'),
        (b"{}", "not a plan (it lacks \"format\": \"torchrec_deepfm.plan\"); make one with plan, or name a run's plan"),
        (b'{"format_version": 1, "world_size": 2, "tables": {}}', "a plan of format version 1, which lacks the sizes "),
        (b'{"format": "torchrec_deepfm.plan", "format_version": 3}', "format version 3, but this version of torchrec_"),
    ],
)  # fmt: skip
def test_files_that_are_not_plans(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.json").write_bytes(content)
    assert refusal(tmp_path / "p.json").startswith(message)


def test_places_without_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").startswith("no such file; make a plan with plan")
    assert refusal(tmp_path) == "a folder; name the file of a plan"
    save_plan(plan_file(), tmp_path / "plan.json")
    assert refusal(tmp_path) == f"a folder; name {tmp_path / 'plan.json'}"


def table(raw: Any, name: str) -> Any:
    return next(each for each in raw["tables"] if each["name"] == f"t_{name}")


def put(name: str, shard: int, /, **values: Any) -> Callable[[Any], None]:
    """Change a shard; its rank in the table's list too."""

    def change(raw: Any) -> None:
        table(raw, name)["shards"][shard] |= values
        if "rank" in values:
            table(raw, name)["ranks"][shard] = values["rank"]

    return change


def set_in(name: str, /, **values: Any) -> Callable[[Any], None]:
    return lambda raw: table(raw, name).update(values)


def drop(name: str, shard: int) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        for key in ("shards", "ranks"):
            table(raw, name)[key].pop(shard)

    return change


def both(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        first(raw)
        second(raw)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(world_size=0), "world_size: expected a whole number >= 1, not 0; make the plan aga"),
        (lambda raw: raw.update(world_size=True), "world_size: expected a whole number, not True; make the plan again"),
        (lambda raw: raw.update(local_world_size=3), "world_size 4 is not a multiple of local_world_size 3; every hos"),
        (lambda raw: raw.pop("search"), "missing search; make the plan again"),
        (lambda raw: raw.update(world_size=10**400), "world_size: expected a whole number <= 4611686018427387904, not"),
        (lambda raw: raw["predicted"].update(mean_ms=10**400), "predicted.mean_ms: 1000000000000000000000000000000000"),
        (lambda raw: raw.update(serach="x"), "unknown key 'serach'; choose one of world_size, local_world_size, "),
        (lambda raw: raw.update(tables=[]), "tables: expected a list of length >= 1, not []; make the plan agai"),
        (lambda raw: raw.update(hardware="h100"), "hardware: expected a table of keys or null, not 'h100'; make the p"),
        (lambda raw: raw.update(hardware={"name": "h100"}), "hardware: missing compute_device, ranks_per_host, hbm_by"),
        (lambda raw: raw["hardware"].update(hbm_bytes=-1), "hardware.hbm_bytes: expected a whole number >= 1, not -1;"),
        (lambda raw: raw.update(search="\ud800"), "damaged (key 'search': '\\ud800' can't be printed); make the plan "),
        (lambda raw: raw["made_with"].update(torch=2), "made_with.torch: expected text, not 2; make the plan again"),
        (set_in("b", name="t\nb"), "tables[1]: name 't\\nb' can't be printed on one line; make the plan again"),
        (set_in("b", name="\udcff"), "damaged (key 'name': '\\udcff' can't be printed); make the plan again"),
        (lambda raw: raw["predicted"]["per_rank"].pop(), "predicted.per_rank has 3 ranks, world_size is 4"),
        (lambda raw: raw["predicted"]["per_rank"][1].update(rank=2), "predicted.per_rank[1]: rank is 2, not 1; list a"),
        (lambda raw: raw["predicted"].update(mean_ms=-1), "predicted.mean_ms: expected a number >= 0.0, not -1; make "),
        (lambda raw: raw["tables"].append(raw["tables"][0]), "table t_a appears twice; remove one"),
        (set_in("b", name=""), "tables[1].name: expected text of length >= 1, not ''; make the pla"),
        (set_in("b", num_embeddings=0), "tables[1] (t_b).num_embeddings: expected a whole number >= 1, not 0; make th"),
        (set_in("b", ranks=[1]), "tables[1] (t_b): ranks is [1], but the shards are on [3]; give the rank of each s"),
        (set_in("b", sharding_type="rowwise"), "table t_b: unknown sharding type 'rowwise'; choose one of data_parall"),
        (set_in("b", compute_kernel="dense"), "table t_b: table_wise has no kernel 'dense'; choose one of fused, fuse"),
        (set_in("a", compute_kernel="fused"), "table t_a: data_parallel has no kernel 'fused'; choose one of dense"),
        (set_in("b", kernel_options={"x": 1}), "table t_b: unknown kernel option 'x'; choose one of "),
        (set_in("b", kernel_options={"cache_load_factor": 2}), "table t_b: kernel option cache_load_factor must be a "),
        (set_in("b", kernel_options={"enforce_hbm": 1}), "table t_b: kernel option enforce_hbm must be true or false,"),
        (set_in("b", kernel_options={"output_dtype": "X"}), "table t_b: kernel option output_dtype must be one of FP3"),
        (put("b", 0, rank=4), "table t_b: shard 0 is on rank 4, but there are 4 ranks, 0 to 3; name one of those"),
        (put("b", 0, rank=-1), "tables[1] (t_b).shards[0].rank: expected a whole number >= 0, not -1; make the"),
        (put("b", 0, sizes=[24]), "tables[1] (t_b).shards[0].sizes: expected a list of length 2, not [24]; make the p"),
        (put("b", 0, sizes=[23, 256]), "table t_b: the shards hold 5,888 of its 24 x 256 = 6,144 numbers and leave a "),
        (put("b", 0, offsets=[1, 0]), "table t_b: shard 0 is rows 1 to 25, columns 0 to 256, beyond the table of 24 x"),
        (put("a", 2, sizes=[37, 128]), "table t_a: shard 2 is rows 0 to 37, columns 0 to 128, but each rank of data_"),
        (drop("a", 1), "table t_a: data_parallel needs one whole shard on each of the 4 ranks"),
        (drop("d", 2), "table t_d: the shards hold 7,872 of its 41 x 256 = 10,496 numbers and leave a hole"),
        (
            put("d", 1, offsets=[0, 32]),
            "table t_d: shards 0 and 1 overlap: rows 0 to 41, columns 0 to 64 and rows 0 to 41, columns 32 to 96",
        ),
        (put("c", 1, offsets=[12, 0]), "table t_c: shards 0 and 1 overlap: rows 0 to 13, columns 0 to 256 and rows 12"),
        (put("g", 3, offsets=[64, 0]), "table t_g: shards 1 and 3 overlap: rows 64 to 128, columns 0 to 128 and rows "),
        (put("c", 0, rank=1), "table t_c: row_wise has one shard on each rank, in order, not on 1, 1, 2, 3"),
        (
            both(put("c", 0, sizes=[14, 256]), put("c", 1, offsets=[14, 0], sizes=[12, 256])),
            "table t_c: row_wise over 4 ranks has pieces of 13 rows (the last ones of the remainder), all of the same ",
        ),
        (set_in("d", sharding_type="table_wise"), "table t_d: table_wise has one shard, not 4"),
        (set_in("c", sharding_type="column_wise"), "table t_c: shard 0 of column_wise is rows 0 to 13, columns 0 to 2"),
        (set_in("d", sharding_type="table_column_wise"), "table t_d: table_column_wise must be on one host of 2 ranks"),
        (put("f", 0, rank=3), "table t_f: table_row_wise needs every rank of a host, in order, not 3, 3"),
        (put("f", 0, rank=0), "table t_f: table_row_wise must be on one host of 2 ranks, but the plan names ranks 0, "),
        (put("g", 0, rank=0), "table t_g: grid_shard must be on one host of 2 ranks, but the plan names ranks 0, 3"),
        (
            both(put("d", 0, sizes=[41, 2]), put("d", 1, offsets=[0, 2], sizes=[41, 126])),
            "table t_d: shard 0 is 2 columns wide; FBGEMM's kernels need multiples of 4",
        ),
    ],
)  # fmt: skip
def test_plans_that_do_not_hold_together(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    raw = json.loads(plan_json(with_predictions(plan_file())))
    change(copy.deepcopy(raw))
    change(raw)
    (tmp_path / "p.json").write_text(json.dumps(raw))
    assert refusal(tmp_path / "p.json").startswith(message)


def misfit(plan: PlanFile, tables: Any = TABLES, world_size: int = 4, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        check_fits(plan, tables, world_size, where="--plan p.json", **options)
    message = str(raised.value)
    assert "\n" not in message
    return message.removeprefix("--plan p.json: ")


def test_a_plan_that_fits() -> None:
    check_fits(plan_file(), TABLES, 4, local_world_size=2, compute_device="cpu")


def test_a_plan_for_other_ranks() -> None:
    plan = plan_file()
    assert misfit(plan, world_size=8) == ("made for 4 rank(s), but there are 8; start 4 (-j), or make a plan for 8")
    assert misfit(plan, local_world_size=4) == (
        "made for hosts of 2 rank(s), but they have 4, and table t_e is table_column_wise, which depends on hosts; "
        "start 2 ranks per host, or make a plan for 4"
    )
    by_ranks = [each for each in plan.tables if each.name in ("t_a", "t_b", "t_c", "t_d")]
    check_fits(replace(plan, tables=tuple(by_ranks)), TABLES[:4], 4, local_world_size=1)


def test_a_plan_for_other_tables() -> None:
    plan = plan_file()
    assert misfit(plan, TABLES[:-1]) == "table t_g does not exist here; make a plan for these tables"
    lacks = replace(plan, tables=plan.tables[4:])
    assert misfit(lacks) == "it lacks table t_a, t_b, t_c and 1 more; make a plan for these tables"
    other = replace(plan, tables=(replace(plan.tables[0], num_embeddings=38), *plan.tables[1:]))
    assert misfit(other) == "table t_a is 38 x 256 in the plan, but 37 x 256 here; make a plan for these tables"


def test_a_plan_for_another_device() -> None:
    plan = plan_file()
    tables = (plan.tables[0], replace(plan.tables[1], compute_kernel="fused_uvm"), *plan.tables[2:])
    check_fits(replace(plan, tables=tables), TABLES, 4, compute_device="cuda")
    assert misfit(replace(plan, tables=tables), compute_device="cpu") == (
        "table t_b has the kernel fused_uvm, which needs GPUs; write fused, or start where there are some"
    )


def test_a_large_plan_is_read(tmp_path: Path) -> None:
    """1,024 ranks, whose shards are not compared pair by pair: that would be half a million a table."""
    rows, ranks = 1024 * 7, 1024
    shards = [{"rank": r, "offsets": [7 * r, 0], "sizes": [7, 8]} for r in range(ranks)]
    raw = json.loads(plan_json(plan_file())) | {"world_size": ranks, "local_world_size": 8}
    raw["tables"] = [
        {
            "name": f"t{number}", "num_embeddings": rows, "embedding_dim": 8, "sharding_type": "row_wise",
            "compute_kernel": "fused", "ranks": list(range(ranks)), "shards": shards,
        }
        for number in range(26)
    ]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(raw))
    assert len(load_plan(tmp_path / "p.json").tables) == 26
