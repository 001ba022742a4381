"""Ids on a GPU: noted at each step, checked where the loss is read; the message is that of the CPU."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torchrec import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.pretend_gpu import pretend_gpu
from torchrec_deepfm.cli.main import main
from torchrec_deepfm.data.prepare.prepare import prepare
from torchrec_deepfm.data.synthetic.generate import generate
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.model import arches
from torchrec_deepfm.model.deepfm import DeepFM
from torchrec_deepfm.model.id_check import SeenIds, check_ids
from torchrec_deepfm.model.tables import embedding_tables
from torchrec_deepfm.training import start
from torchrec_deepfm.training.build import build_model

SIZES = {"a": 5, "b": 3}
Bags = Mapping[str, Sequence[Sequence[int]]]


def batch(bags: Bags, dtype: torch.dtype = torch.int32) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        list(bags),
        torch.tensor([one for rows in bags.values() for row in rows for one in row], dtype=dtype),
        torch.tensor([len(row) for rows in bags.values() for row in rows], dtype=torch.int32),
    )


def error(work: Callable[[], object]) -> str | None:
    try:
        work()
    except UserError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "bags",
    [
        {"a": [[0], [4]], "b": [[2], [0]]},
        {"a": [[0], [5]], "b": [[2], [0]]},
        {"a": [[0], [1]], "b": [[-1], [0]]},
        {"b": [[1, 3], []], "a": [[2, 0, 1], [4]]},
        {"b": [[1, 2], []], "a": [[2, -7, 1], [4]]},
        {"a": [[], []], "b": [[], [3]]},
        {"a": [[], []], "b": [[], []]},
        {"a": [[1], [1]], "not a table's": [[99], [99]], "b": [[1], [1]]},
    ],
)
def test_the_noted_ids_are_refused_as_those_in_host_memory(bags: Bags, dtype: torch.dtype) -> None:
    seen = SeenIds()
    seen.add(batch({"a": [[1], [2]], "b": [[0], [2]]}))
    seen.add(batch(bags, dtype))
    seen.add(batch({"a": [[1], [2]], "b": [[0], [2]]}))
    expected = error(lambda: check_ids(batch(bags, dtype), SIZES))
    wrong = any(not 0 <= one < SIZES[key] for key, rows in bags.items() if key in SIZES for row in rows for one in row)
    assert (expected is not None) == wrong
    assert error(lambda: seen.check(SIZES)) == expected


def test_a_model_notes_ids_of_a_gpu_and_does_not_read_them() -> None:
    model = DeepFM(EmbeddingBagCollection(tables=embedding_tables(SIZES)), 0, over_arch_layer_sizes=())
    state = list(model.state_dict())
    wrong = batch({"a": [[1], [5]], "b": [[0], [2]]})
    read = mock.Mock(side_effect=AssertionError("read, which waits for the GPU"))
    with (
        mock.patch.object(arches, "_in_host_memory", return_value=False),
        mock.patch.object(model.sparse_arch.embedding_bag_collection, "forward", side_effect=KeyError("looked up")),
        mock.patch.multiple(torch.Tensor, tolist=read, item=read, __int__=read, __bool__=read),
        pytest.raises(KeyError, match="looked up"),
    ):
        model(torch.empty(2, 0), wrong)
    expected = "feature 'a' has the id 5, but its table has 5 rows (ids 0 to 4); build the tables with the "
    assert error(lambda: arches.check_seen_ids(model)) == expected + "num_embeddings of the data"
    assert list(model.state_dict()) == state


def test_a_training_ends_in_one_line_at_the_next_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path / "raw", rows=2000, seed=0)
    prepare([tmp_path / "raw" / "day_0.tsv"], tmp_path / "data")

    def with_less_rows(config: Any, sizes: Mapping[str, int], *args: Any, **options: Any) -> Any:
        return build_model(config, {**sizes, "C3": 2}, *args, **options)

    words = ["train", "--data", tmp_path / "data", "--output", tmp_path / "run", "--recipe", "smoke"]
    with (
        pretend_gpu(),
        mock.patch.object(start, "build_model", with_less_rows),
        pytest.raises(SystemExit) as stop,
    ):
        main([str(word) for word in [*words, "--batch-size", "32"]])
    shown = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(shown) == 1
    assert shown[0].startswith("error: feature 'C3' has the id ")
    assert "but its table has 2 rows (ids 0 to 1); build the tables with the num_embeddings of the data" in shown[0]
