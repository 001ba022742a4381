"""``export --layout triton``: by Triton's own schema, and by what onnxruntime reports about the model."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from tests.inference.export.test_export import run_readme
from tests.inference.test_load import read_raw
from torchrec_deepfm import load
from torchrec_deepfm.data.dataset.prepared import PreparedData
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.inference.export.export import export
from torchrec_deepfm.inference.export.inputs import Signature
from torchrec_deepfm.inference.export.triton import config

TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's ``model_config``; the module alone, since the package's own import wants a client's libraries."""
    found = importlib.util.find_spec("tritonclient")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_the_one_described(
    run: Path, run_data: PreparedData, tmp_path: Path, schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "deepfm"
    folder.parent.mkdir()
    export(run, folder, to="onnx", layout="triton")
    described = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    assert described.max_batch_size > 0
    for written, there in ((described.input, session.get_inputs()), (described.output, session.get_outputs())):
        assert [one.name for one in written] == [one.name for one in there]
        for one, real in zip(written, there, strict=True):
            assert schema.DataType.Name(one.data_type) == TYPES[real.type]
            dims = list(one.reshape.shape) if one.HasField("reshape") else list(one.dims)
            assert [isinstance(real.shape[0], str), *dims] == [True, *real.shape[1:]]
    frame = read_raw(run_data.folder.parent / "test.tsv").drop("label")[:20]
    rows, expected = load(run).encoder.encode(frame), load(run).predict(frame)
    [found] = session.run(["probability"], {"dense": rows.dense, "ids": rows.sparse.astype(np.int64)})
    assert np.abs(found - expected).max() <= 1e-6
    assert np.abs(load(folder).predict(frame) - expected).max() <= 1e-6  # it is a package too
    assert [part.get("session") is not None for part in run_readme(folder, monkeypatch)] == [False, True]


def test_lists_are_not_batched(schema: Any) -> None:
    signature = Signature(
        inputs=("ids", "values", "lengths", "weights"), dense=(), ids=("a",), bags=("b", "c"),
        num_embeddings={"a": 9, "b": 9, "c": 9},
    )  # fmt: skip
    described = text_format.Parse(config(signature, 4), schema.ModelConfig())
    assert described.max_batch_size == 0
    assert not described.HasField("dynamic_batching")
    assert {one.name: list(one.dims) for one in described.input} == {
        "ids": [-1, 1], "values": [-1], "lengths": [2, -1], "weights": [-1]
    }  # fmt: skip
    assert {one.name: list(one.dims) for one in described.output} == {
        "probability": [-1], "fields": [-1, 3, 5], "deep": [-1]
    }  # fmt: skip


def test_other_forms_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layout triton: Triton's onnxruntime runs ONNX, not aoti"):
        export(run, tmp_path / "p", to="aoti", layout="triton")
