"""Files made by an attacker: an error, and no code runs. Whoever can write a checkpoint can seal it again, so no
checksum stands in these tests' way."""

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.training.checkpoint import dcp
from torchrec_deepfm.training.checkpoint.dcp import Cut, TensorCuts, load_metadata
from torchrec_deepfm.training.checkpoint.manager import Checkpoints, restore_model
from torchrec_deepfm.training.checkpoint.store import FinalWeights
from torchrec_deepfm.training.run.weights import Weights


class Exploit:
    """Unpickled, it creates a file."""

    def __init__(self, proof: Path) -> None:
        self._command = f"touch {proof}"

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


def state(memory: torch.Tensor) -> dict[str, TensorCuts]:
    return {"weight": TensorCuts(tuple(memory.size()), [Cut((0,) * memory.dim(), memory)])}


@pytest.fixture
def folder(tmp_path: Path, device: torch.device) -> Path:
    """A checkpoint of one tensor."""
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), keep_last=1)
    checkpoints.save(3, state(torch.arange(6.0)), {})
    checkpoints.close()
    return tmp_path / "checkpoints" / "step_00000003"


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / "checkpoint.json").read_bytes())
    del manifest["sha256"]
    for path in folder.iterdir():
        if path.name != "checkpoint.json":
            content = path.read_bytes()
            manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checkpoint.json").write_bytes(seal(manifest))


def read(folder: Path) -> str | None:
    checkpoints = Checkpoints(str(folder.parent), keep_last=1)
    [(step, manifest)] = list(checkpoints.intact([]))
    memory = torch.zeros(6)
    reason = checkpoints.read(step, manifest, state(memory))
    if reason is None:
        assert memory.tolist() == [0, 1, 2, 3, 4, 5]
    checkpoints.close()
    return reason


def test_the_folder_as_it_was_is_read(folder: Path) -> None:
    reseal(folder)
    assert read(folder) is None


def change_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))
    reseal(folder)


def test_code_in_the_metadata(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Exploit(proof)))
    assert proof.exists(), "the exploit is none, so the test proves nothing"
    proof.unlink()
    change_metadata(folder, lambda metadata: Exploit(proof))
    with pytest.raises(BaseException):  # noqa: B017, PT011 - the stock reader runs it, whatever it says afterwards
        raise Exception(filesystem.FileSystemReader(folder).read_metadata())
    assert proof.exists()
    proof.unlink()
    reason = read(folder)
    assert reason is not None
    assert "names posix.system, which no metadata needs" in reason
    assert not proof.exists()


def test_code_deep_in_the_metadata(folder: Path, tmp_path: Path) -> None:
    def hide(metadata: Metadata) -> Metadata:
        metadata.planner_data = {"weight": ("x", Exploit(tmp_path / "proof"))}
        return metadata

    change_metadata(folder, hide)
    assert "which no metadata needs" in (read(folder) or "")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.filesystem\npickle.loads\n.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n.",
        b"\x80\x04\x8c\x05torch\x8c\x0cserialization\x93.",
        b"Ppersistent\n.",
        b"",
        b"\x80",
        b"garbage",
        pickle.dumps({"a": 1}),
        pickle.dumps(torch.Size([1])),
        b"\x80\x04\x95" + b"\xff" * 8,
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"),
    ],
)
def test_pickles_that_are_not_metadata(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        load_metadata(content, frozenset())


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "other.distcp", "./__0_0.distcp", ""])
def test_a_path_that_leaves_the_folder(folder: Path, path: str) -> None:
    def lead_away(metadata: Metadata) -> Metadata:
        for info in metadata.storage_data.values():
            info.relative_path = path
        return metadata

    change_metadata(folder, lead_away)
    assert f"refers to {path!r}, which is not a file of its folder" in (read(folder) or "")


def test_code_in_a_shard(folder: Path, tmp_path: Path) -> None:
    """The tensors themselves are files of torch.save; DCP reads them with weights_only."""
    proof = tmp_path / "proof"
    [shard] = folder.glob("*.distcp")
    stream = io.BytesIO()
    torch.save({"tensor": Exploit(proof)}, stream)
    shard.write_bytes(stream.getvalue())

    def whole_file(metadata: Metadata) -> Metadata:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, shard.stat().st_size
        return metadata

    change_metadata(folder, whole_file)
    assert zipfile.is_zipfile(shard)
    assert "Weights only load failed" in (read(folder) or "")
    assert not proof.exists()


def test_a_tensor_that_became_an_object(folder: Path, tmp_path: Path) -> None:
    """DCP's own planner unpickles objects without weights_only."""
    proof = tmp_path / "proof"
    [shard] = folder.glob("*.distcp")
    stream = io.BytesIO()
    torch.save(Exploit(proof), stream)
    shard.write_bytes(stream.getvalue())

    def to_bytes(metadata: Metadata) -> Metadata:
        metadata.state_dict_metadata["weight"] = BytesStorageMetadata()
        info = filesystem._StorageInfo(shard.name, 0, shard.stat().st_size)
        metadata.storage_data = {MetadataIndex("weight"): info}
        return metadata

    change_metadata(folder, to_bytes)
    assert read(folder) is not None
    assert not proof.exists()


@pytest.mark.parametrize("size", [[7], [2, 3], [-6], [2**40], []])
def test_sizes_that_lie(folder: Path, size: list[int]) -> None:
    def lie(metadata: Metadata) -> Metadata:
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))
        metadata.state_dict_metadata["weight"] = TensorStorageMetadata(TensorProperties(), torch.Size(size), [chunk])
        return metadata

    change_metadata(folder, lie)
    assert read(folder) is not None


def test_the_weights_of_a_finished_run(folder: Path, tmp_path: Path) -> None:
    change_metadata(folder, lambda metadata: Exploit(tmp_path / "proof"))
    manifest = json.loads((folder / "checkpoint.json").read_bytes())
    del manifest["sha256"]
    (folder / "checkpoint.json").write_bytes(seal({**manifest, "step": 0}))
    model = torch.nn.Linear(2, 1)
    with pytest.raises(UserError, match=r"the checkpoint can't be read \(.metadata names .*\); train again$"):
        restore_model(model, Weights(store=FinalWeights(folder), key=0, step=None))  # type: ignore[arg-type]
    assert not (tmp_path / "proof").exists()


class _Attribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the members of an Enum."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


def test_getattr_in_metadata_gives_members_of_one_enum_and_nothing_else():
    def read(*arguments):
        return dcp._MetadataUnpickler(io.BytesIO(pickle.dumps(_Attribute(*arguments)))).load()

    formats = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    assert read(formats, "TORCH_CONTIGUOUS_FORMAT") is formats.TORCH_CONTIGUOUS_FORMAT
    for arguments in ((formats, "__class__"), (formats, "mro"), (torch.Size, "__init__"), (formats, "x", None)):
        with pytest.raises((pickle.UnpicklingError, TypeError)):
            read(*arguments)
