"""Rules for tables: what they match, which of them counts, and what is said of those that can't be met."""

import pytest

from torchrec_deepfm import embedding_tables
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.sharding.inputs.constraints import keep_to_possible, parse_constraints
from torchrec_deepfm.sharding.inputs.sharding_types import SHARDING_TYPES, column_cuts, default_min_partition

# Rows of 16 columns. One column is called as another one's table, one has letters of rules and globs in its name.
SIZES = {"C1": 10, "C2": 2_000_000, "C10": 100_000, "t_C1": 7, "a=b:*": 40}
TABLES = embedding_tables(SIZES, factor_dim=15)


def types(*rules: str, **ranks: int) -> dict[str, str]:
    found = parse_constraints(rules, TABLES, **ranks)  # type: ignore[arg-type]
    return {name: "|".join(each.sharding_types or []) for name, each in found.items()}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], {}),
        (["C1=row_wise"], {"t_C1": "row_wise"}),
        (["t_C2=row_wise"], {"t_C2": "row_wise"}),
        (["t_C1=table_wise"], {"t_C1": "table_wise"}),  # the table, and not the feature that is called so
        (["t_t_C1=table_wise"], {"t_t_C1": "table_wise"}),
        (["a=b:*=row_wise"], {"t_a=b:*": "row_wise"}),
        (["C1*=row_wise"], {"t_C1": "row_wise", "t_C10": "row_wise"}),
        (["C[12]=row_wise"], {"t_C1": "row_wise", "t_C2": "row_wise"}),
        (["C?=row_wise"], {"t_C1": "row_wise", "t_C2": "row_wise"}),
        ([">1e5=row_wise"], {"t_C2": "row_wise"}),
        ([">=1e5=row_wise"], {"t_C2": "row_wise", "t_C10": "row_wise"}),
        (["<10=table_wise"], {"t_t_C1": "table_wise"}),
        (["<=10=table_wise"], {"t_C1": "table_wise", "t_t_C1": "table_wise"}),
        (["10..100000=table_wise"], {"t_C10": "table_wise", "t_a=b:*": "table_wise"}),
        (["> 1e5 = row_wise", "C1 = row_wise, table_wise"], {"t_C1": "table_wise|row_wise", "t_C2": "row_wise"}),
        (["C1=row_wise,table_wise"], {"t_C1": "table_wise|row_wise"}),
        (["C1=any"], {"t_C1": "|".join(SHARDING_TYPES)}),
        (["C1=any:kernel=fused"], {"t_C1": "|".join(SHARDING_TYPES[1:])}),
        (["C1=any:kernel=dense"], {"t_C1": "data_parallel"}),
    ],
    ids=str,
)
def test_what_a_rule_matches(rules: list[str], expected: dict[str, str]) -> None:
    assert types(*rules) == expected


def test_a_name_goes_before_a_glob_before_a_size_in_any_order() -> None:
    rules = [">1=table_wise", "C*=column_wise", "C1=row_wise"]
    expected = {
        "t_C1": "row_wise", "t_C2": "column_wise", "t_C10": "column_wise", "t_t_C1": "table_wise",
        "t_a=b:*": "table_wise",
    }  # fmt: skip
    assert types(*rules) == types(*reversed(rules)) == expected


def test_two_rules_that_say_the_same_do_not_contradict_each_other() -> None:
    assert types("C1*=row_wise", "C[12]=row_wise")["t_C1"] == "row_wise"


def test_the_most_particular_rule_counts_alone() -> None:
    found = parse_constraints(["C*=column_wise:min_partition=4:pooling_factor=20", "C2=column_wise"], TABLES)
    assert (found["t_C1"].min_partition, found["t_C1"].pooling_factors) == (4, [20.0])
    assert (found["t_C2"].min_partition, found["t_C2"].pooling_factors) == (None, [1.0])


def test_options() -> None:
    [found] = parse_constraints(
        ["C2=any:kernel=fused_uvm_caching:cache_load_factor=0.25"], TABLES, compute_device="cuda"
    ).values()
    assert found.compute_kernels == ["fused_uvm_caching"]
    assert found.cache_params is not None
    assert found.cache_params.load_factor == 0.25


def test_types_that_a_table_cannot_have_are_no_choices() -> None:
    row = ["row_wise", "table_row_wise", "grid_shard"]
    alone = [kind for kind in SHARDING_TYPES if kind not in row[1:]]
    assert types("C1=any", world_size=1, local_world_size=1) == {"t_C1": "|".join(alone)}
    # 10 rows on 4 ranks of a host are 3, 3, 3, 1; 7 rows on 6 ranks of two hosts are 2, 2, 2, 1, 0, 0 and 3, 3, 1.
    assert types("C1=any", world_size=4, local_world_size=4) == {"t_C1": "|".join(SHARDING_TYPES)}
    kept = [kind for kind in SHARDING_TYPES if kind != "row_wise"]
    assert types("t_t_C1=any", world_size=6, local_world_size=3) == {"t_t_C1": "|".join(kept)}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["C1"], "--constraint C1: write NAME=TYPE, such as C1=row_wise or '>1e6=column_wise'"),
        (["=row_wise"], "--constraint =row_wise: write NAME=TYPE"),
        (["C1="], "--constraint C1=: unknown sharding type ''; choose one of data_parallel, table_wise, row_"),
        (["C1=rowwise"], "--constraint C1=rowwise: unknown sharding type 'rowwise'; choose one of data_parallel, tabl"),
        (["C3=row_wise"], "--constraint C3=row_wise: no table or feature has this name; did you mean one of C"),
        (["D*=row_wise"], "--constraint D*=row_wise: no table or feature has this name; did you mean one of "),
        ([">1e9=row_wise"], "--constraint >1e9=row_wise: no table has that many rows: they have 7 (t_t_C1) to 2,000,0"),
        ([">many=row_wise"], "--constraint >many=row_wise: 'many' is not a number of rows; write one such as 100000 o"),
        ([">nan=row_wise"], "--constraint >nan=row_wise: 'nan' is not a number of r"),
        ([">=-1=row_wise"], "--constraint >=-1=row_wise: '-1' is not a number of r"),
        (
            ["C1*=row_wise", "C?=table_wise"],
            "--constraint C1*=row_wise and --constraint C?=table_wise contradict each other over table t_C1; leave one",
        ),
        (["C1=row_wise", "t_C1=table_wise"], "--constraint C1=row_wise and --constraint t_C1=table_wise contradict "),
        ([">5=row_wise", ">6=table_wise"], "--constraint >5=row_wise and --constraint >6=table_wise contradict each "),
        (
            ["C1=column_wise:min_partition=4", "t_C1=column_wise"],
            "--constraint C1=column_wise:min_partition=4 and --constraint t_C1=column_wise contradict each other",
        ),
        (["C1=row_wise:kernal=fused"], "--constraint C1=row_wise:kernal=fused: unknown option 'kernal'; choose one of"),
        (["C1=row_wise:kernel"], "--constraint C1=row_wise:kernel: option kernel needs one value, kernel=..."),
        (["C1=row_wise:kernel=quick"], "--constraint C1=row_wise:kernel=quick: unknown kernel 'quick'; choose one of "),
        (["C1=row_wise:kernel=dense"], "--constraint C1=row_wise:kernel=dense: row_wise has no kernel dense; choose o"),
        (["C1=data_parallel:kernel=fused"], "--constraint C1=data_parallel:kernel=fused: data_parallel has no kernel "),
        (
            ["C1=row_wise:kernel=fused_uvm"],
            "--constraint C1=row_wise:kernel=fused_uvm: table t_C1: kernel fused_uvm needs GPUs, not cpu ranks; l",
        ),
        (["C1=row_wise:min_partition=8"], "--constraint C1=row_wise:min_partition=8: min_partition is for column_wise"),
        (["C1=column_wise:min_partition=6"], "--constraint C1=column_wise:min_partition=6: min_partition 6 is not a m"),
        (["C1=column_wise:min_partition=0"], "--constraint C1=column_wise:min_partition=0: min_partition 0 is not a m"),
        (["C1=column_wise:min_partition=x"], "--constraint C1=column_wise:min_partition=x: min_partition 'x' is not a"),
        (
            ["C1=column_wise:min_partition=16"],
            "--constraint C1=column_wise:min_partition=16: table t_C1: min_partition 16 leaves its 16 columns in one p",
        ),
        (["C1=column_wise:min_partition=16388"], "--constraint C1=column_wise:min_partition=16388: min_partition is a"),
        ([f"C1=column_wise:min_partition={'9' * 32}"], f"--constraint C1=column_wise:min_partition={'9' * 32}: min_p"),
        ([f"C1=column_wise:min_partition={'9' * 400}"], "--constraint C1=column_wise:min_partition=999"),
        ([f"C1=column_wise:min_partition={'9' * 5000}"], "--constraint C1=column_wise:min_partition=999"),
        (["C1=any:pooling_factor=1e308"], "--constraint C1=any:pooling_factor=1e308: pooling_factor 1e+308 is the mea"),
        (["1e5..1e4=row_wise"], "--constraint 1e5..1e4=row_wise: no number is above 100000 and at most 10000; write"),
        (["C1=row\nwise"], "--constraint 'C1=row\\nwise': this can't be printed; write NAME=TYPE on one line"),
        (["C1=\ud800"], "--constraint 'C1=\\ud800': this can't be printed"),
        (["C1=any:cache_load_factor=0.2"], "--constraint C1=any:cache_load_factor=0.2: cache_load_factor is for kerne"),
        (["C1=any:pooling_factor=nan"], "--constraint C1=any:pooling_factor=nan: pooling_factor 'nan' is not a num"),
        (["C1=any:pooling_factor=-1"], "--constraint C1=any:pooling_factor=-1: pooling_factor -1 is the mean number o"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_rules(rules: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_constraints(rules, TABLES)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_what_torchrec_plans_by_itself_is_kept_to_what_ranks_can_run() -> None:
    """10 rows on 8 CPU ranks of two hosts are pieces of 2, which leaves 3 ranks none, but 3, 3, 3, 1 on one host."""
    ranks = {"world_size": 8, "local_world_size": 4}
    given = parse_constraints(["t_t_C1=table_wise"], TABLES, **ranks)  # type: ignore[arg-type]
    found = keep_to_possible(given, TABLES, compute_device="cpu", **ranks)
    assert set(found) == {"t_C1", "t_t_C1"}
    assert found["t_C1"].sharding_types == [kind for kind in SHARDING_TYPES if kind != "row_wise"]
    assert found["t_t_C1"] is given["t_t_C1"]
    assert keep_to_possible({}, TABLES, compute_device="cuda", **ranks) == {}
    alone = keep_to_possible({}, TABLES, compute_device="cuda", world_size=4, local_world_size=1)
    kept = [kind for kind in SHARDING_TYPES if kind not in ("table_row_wise", "grid_shard")]
    assert {name: each.sharding_types for name, each in alone.items()} == dict.fromkeys((t.name for t in TABLES), kept)


def test_a_load_factor_is_a_share() -> None:
    for wrong in ("0", "1", "1.5", "-0.1"):
        with pytest.raises(UserError, match="the share of rows in the cache, between 0 and 1"):
            parse_constraints(
                [f"C1=any:kernel=fused_uvm_caching:cache_load_factor={wrong}"], TABLES, compute_device="cuda"
            )


@pytest.mark.parametrize(
    ("rule", "ranks", "message"),
    [
        ("C1=table_row_wise", (4, 1), "table_row_wise cuts rows over the ranks of a host, and a host has one rank her"),
        ("C1=grid_shard", (4, 1), "grid_shard cuts rows over the ranks of a host, and a host has one rank here"),
        ("t_t_C1=row_wise", (6, 6), "row_wise cuts its 7 rows into pieces of 2 and leaves 2 of 6 ranks none"),
        ("t_t_C1=table_row_wise", (6, 6), "table_row_wise cuts its 7 rows into pieces of 2 and leaves 2 of 6 ranks no"),
    ],
)  # fmt: skip
def test_types_that_these_ranks_cannot_have(rule: str, ranks: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_constraints([rule], TABLES, world_size=ranks[0], local_world_size=ranks[1])
    assert str(raised.value).startswith(
        f"--constraint {rule}: table t_{rule.split('=')[0].removeprefix('t_')}: {message}"
    )


def test_four_columns_and_a_single_row_cannot_be_cut() -> None:
    [narrow] = embedding_tables({"C": 9}, factor_dim=3)
    for kind in ("column_wise", "table_column_wise", "grid_shard"):
        with pytest.raises(UserError, match=r"and its 4 columns can't be cut so; choose another type"):
            parse_constraints([f"C={kind}"], [narrow])
    [short] = embedding_tables({"C": 1}, factor_dim=15)
    with pytest.raises(UserError, match=r"grid_shard cuts rows and columns, and it has one row; choose another type"):
        parse_constraints(["C=grid_shard"], [short], compute_device="cuda")


def test_column_shards_are_as_wide_as_torchrec_makes_them() -> None:
    """Its own computation is the oracle: the default must be a width that it takes, and that cuts."""
    from torchrec.distributed.sharding_plan import _get_block_size_for_cw_shard

    for width in range(4, 516, 4):
        taken = {_get_block_size_for_cw_shard(width, least) for least in range(4, width, 4)} - {width}
        assert column_cuts(width) == sorted(taken)
        default = default_min_partition(width)
        if default is None:
            assert not taken
        else:
            assert _get_block_size_for_cw_shard(width, default) == default < width
            stock = _get_block_size_for_cw_shard(width, None)
            assert default == (stock if stock < width else max(taken))
