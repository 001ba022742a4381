"""Checkpoints on disk and in fsspec's memory: complete or invisible, and nothing tampered with gets by."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from torchrec_deepfm.errors import UserError
from torchrec_deepfm.files import seal
from torchrec_deepfm.training.checkpoint.store import MANIFEST, Damaged, Store, unseal

CONTENT = {"a.distcp": b"one", ".metadata": b"two" * 1000}


def files(content: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()}


def write(store: Store, step: int, content: dict[str, bytes] = CONTENT, **meta: Any) -> None:
    path = store.begin(step)
    store._fs.makedirs(path, exist_ok=True)
    for name, data in content.items():
        with store._fs.open(f"{path}/{name}", "wb") as file:
            file.write(data)
    store.commit(step, files(content), meta)


@pytest.fixture(params=["local", "file URL", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    targets = {"local": f"{tmp_path}/run", "file URL": f"file://{tmp_path}/run", "memory": f"memory://{tmp_path}/run"}
    return Store(targets[request.param])


def test_a_checkpoint_is_what_was_written(store: Store) -> None:
    assert store.steps() == []
    write(store, 12, plan="p")
    assert store.steps() == [12]
    manifest = store.manifest(12)
    assert (manifest["step"], manifest["plan"], manifest["files"]) == (12, "p", files(CONTENT))
    store.verify(12, manifest["files"])


def test_a_checkpoint_does_not_pass_for_that_of_another_step(store: Store) -> None:
    write(store, 12)
    store._fs.mv(store.path(12), store.path(20), recursive=True)
    with pytest.raises(Damaged, match="is of step 12"):
        store.manifest(20)


def test_what_is_not_complete_is_invisible_and_cleaned_away(store: Store) -> None:
    write(store, 5)
    path = store.begin(7)
    store._fs.makedirs(path, exist_ok=True)
    with store._fs.open(f"{path}/a.distcp", "wb") as file:
        file.write(b"half")
    assert store.steps() == [5]
    store.clean()
    assert store.steps() == [5]
    assert not store._fs.exists(path)
    store.verify(5, store.manifest(5)["files"])


def test_the_newest_and_the_best_are_kept(store: Store) -> None:
    for step in (1, 20, 3, 400, 5):
        write(store, step)
    assert store.steps() == [400, 20, 5, 3, 1]
    store.retain(2, {3})
    assert store.steps() == [400, 20, 3]
    store.retain(1, ())
    assert store.steps() == [400]


def test_a_step_can_be_written_again(store: Store) -> None:
    write(store, 5)
    if not store.local:
        store.set_aside(5)
    write(store, 5, {"a.distcp": b"other"})
    assert store.steps() == [5]
    store.verify(5, store.manifest(5)["files"])
    assert list(store.manifest(5)["files"]) == ["a.distcp"]
    if store.local:
        assert [path.name for path in Path(store._root).iterdir()] == ["step_00000005"]


def test_set_aside(store: Store) -> None:
    write(store, 5)
    write(store, 6)
    store.forget_newer(5)
    assert store.steps() == [5]
    if store.local:
        assert (Path(store.path(6)).parent / "step_00000006.refused" / "a.distcp").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("name", "change", "reported"),
    [
        ("a.distcp", lambda data: data[:-1], "a.distcp has 2 bytes, 3 were written"),
        ("a.distcp", lambda data: bytes([data[0] ^ 1]) + data[1:], "a.distcp is not what was written (its checksum"),
        ("a.distcp", None, "a.distcp is missing"),
        (".metadata", lambda data: data + b"x", ".metadata has 3001 bytes, 3000 were written"),
        (MANIFEST, lambda data: data[:-5], "checkpoint.json"),
        (MANIFEST, lambda data: data.replace(b'"step": 5', b'"step": 6'), "checkpoint.json is not what was written"),
        (MANIFEST, lambda data: b"[" * 100_000, "checkpoint.json is not valid JSON"),
        (MANIFEST, lambda data: b"\xff", "checkpoint.json is not valid JSON"),
        (MANIFEST, lambda data: b"[1, 2]", "checkpoint.json has no checksum of its own"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, name: str, change: Any, reported: str) -> None:
    store = Store(str(tmp_path))
    write(store, 5)
    path = Path(store.path(5)) / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged) as raised:
        store.verify(5, store.manifest(5)["files"])
    assert str(raised.value).startswith(reported)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", ".", "a\0b", "c:\\x", "a/../../b"])
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Whoever rewrites a manifest can also seal it again."""
    store = Store(str(tmp_path / "checkpoints"))
    write(store, 5)
    (tmp_path / "secret").write_bytes(b"one")
    manifest = json.loads((Path(store.path(5)) / MANIFEST).read_bytes())
    manifest["files"][name] = manifest["files"].pop("a.distcp")
    del manifest["sha256"]
    (Path(store.path(5)) / MANIFEST).write_bytes(seal(manifest))
    with pytest.raises(Damaged, match="which is not a file of its folder"):
        store.manifest(5)


def test_a_manifest_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    write(store, 5)
    with (Path(store.path(5)) / MANIFEST).open("ab") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(Damaged, match=r"checkpoint\.json is larger than 64 MiB"):
        store.manifest(5)


def test_the_seal_is_the_digest_of_the_file_with_zeros_in_its_place() -> None:
    content = seal({"b": 1, "a": ["0" * 64, "é"]})
    manifest = json.loads(content)
    with_zeros = content.decode().replace(manifest["sha256"], "0" * 64).encode()
    assert hashlib.sha256(with_zeros).hexdigest() == manifest.pop("sha256")
    assert manifest == {"b": 1, "a": ["0" * 64, "é"]}
    assert unseal(content)["b"] == 1


def test_a_kill_between_rename_and_rename_loses_nothing(tmp_path: Path) -> None:
    """``remove`` renames first: what a kill leaves behind is not a checkpoint, and does not come back."""
    store = Store(str(tmp_path))
    write(store, 5)
    write(store, 6)
    os.rename(store.path(6), f"{store.path(6)}.deleted")  # noqa: PTH104
    assert store.steps() == [5]
    store.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005"]


def test_an_unknown_protocol() -> None:
    with pytest.raises(UserError, match="--checkpoints nowhere://x: "):
        Store("nowhere://x")


def test_cleaning_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000003.mine").mkdir()
    Store(str(tmp_path)).clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003.mine", "step_notes"]
    shutil.rmtree(tmp_path)
    Store(str(tmp_path)).clean()
