"""Which plans an experiment makes: those that its ranks can run, under names that can be files."""

from pathlib import Path

import pytest

from tests.support.plans.experiments import BATCH_SIZE, cpu
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.experiment.plans import PlanSelection, PlanSet, check_output, make_plans
from torchrec_deepfm.sharding.inputs.sharding_types import ROW_TYPES
from torchrec_deepfm.sharding.inputs.tables import Table

ONE_ROW = (Table(name="a", num_embeddings=1, embedding_dim=8), Table(name="b", num_embeddings=1000, embedding_dim=8))


def made(**wanted: object) -> PlanSet:
    return make_plans(PlanSelection(**wanted), ONE_ROW, cpu(2), 2, BATCH_SIZE, "rowwise_adagrad")  # type: ignore[arg-type]


def test_a_rule_that_leaves_a_rank_without_a_row_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--constraint \*=row_wise: table a: row_wise cuts its 1 rows .* choose ano"):
        made(rules=("*=row_wise",), sweep=False)


def test_a_sweep_leaves_out_what_these_ranks_cannot_run() -> None:
    plans = made()
    for kind in ROW_TYPES:
        assert "table a" in plans.left_out[kind]
    assert "table a" not in plans.left_out.get("small_replicated+row_wise", "")  # only b has its rows cut
    for _, plan in plans.named:
        for table in plan.tables:
            assert all(min(shard.sizes) >= 1 for shard in table.shards)


def test_names_that_can_be_no_files() -> None:
    [(name, _)] = made(rules=("*=table_wise" + " b=table_wise" * 40,), sweep=False).named
    assert len(name) <= 60


def test_a_folder_is_written_below_a_folder(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match=r"nothing can be written below .*a; name another folder"):
        check_output(tmp_path / "a" / "b")
