"""Files on an S3 server, with the faults that such servers have: tried again, or one line."""

import re
from pathlib import Path

import pytest

from tests.support.s3_server import FaultProxy, Kind
from torchrec_deepfm.errors import UserError
from torchrec_deepfm.remote.objects import Objects


def put(address: str, folder: Path, **contents: bytes) -> Objects:
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    objects = Objects(address)
    objects.store(folder, contents)
    return objects


@pytest.mark.parametrize("store", ["s3", "gs", "az"])
def test_files_are_stored_listed_fetched_and_removed(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(store)
    address = f"{store}://bucket/files"
    assert Objects(address).entries() == {}
    objects = put(f"{address}/", tmp_path, a=b"abc", b=bytes(1000))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c").write_bytes(b"c")
    objects.store(tmp_path, ["deep/c"])
    assert {name: entry.bytes for name, entry in objects.entries().items()} == {"a": 3, "b": 1000, "deep/c": 1}
    assert objects.read("a") == b"abc"
    assert objects.read("absent") is None
    assert objects.ranges([("a", 1, 3), ("b", 10, 20), ("a", 0, 1)]) == [b"bc", bytes(10), b"a"]
    objects.fetch(["deep/c"], tmp_path / "there")
    assert (tmp_path / "there" / "deep" / "c").read_bytes() == b"c"
    before = objects.entries()["a"].version
    put(address, tmp_path, a=b"xyz")
    assert objects.entries()["a"].version != before
    objects.remove(["a", "b", "absent"])
    assert list(objects.entries()) == ["deep/c"]


@pytest.mark.parametrize("kind", ["500", "503", "reset", "slow"])
def test_a_fault_that_passes_is_not_noticed(s3: FaultProxy, tmp_path: Path, kind: Kind) -> None:
    objects = Objects(f"s3://bucket/passing-{kind}")
    (tmp_path / "a").write_bytes(bytes(range(200)))
    with s3.fault(kind, times=1, method="PUT") as met:
        objects.store(tmp_path, ["a"])
    assert [one[2] for one in met] == [kind]
    with s3.fault(kind, times=1, method="GET") as met:
        assert objects.ranges([("a", 100, 200)]) == [bytes(range(100, 200))]
    assert [one[2] for one in met] == [kind]


def test_half_an_answer_is_read_again(s3: FaultProxy, tmp_path: Path) -> None:
    objects = put("s3://bucket/cut", tmp_path, a=bytes(range(200)))
    with s3.fault("cut", times=1, method="GET", path="cut/a") as met:
        assert objects.ranges([("a", 0, 200)]) == [bytes(range(200))]
    assert len(met) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [  # the second is what answers without a body hold
        ("500", r"internal error|Internal Server Error"),
        ("503", r"reduce your request rate|Service Unavailable"),
        ("expired", r"The provided token has expired|Bad Request"),
    ],
)
@pytest.mark.usefixtures("tried_twice")
def test_a_fault_that_stays_is_one_line(s3: FaultProxy, tmp_path: Path, kind: Kind, reason: str) -> None:
    objects = put(f"s3://bucket/staying-{kind}", tmp_path, a=b"abc")
    for work in (
        objects.entries,
        lambda: objects.read("a"),
        lambda: objects.ranges([("a", 0, 1)]),
        lambda: objects.fetch(["a"], tmp_path / "there"),
        lambda: objects.store(tmp_path, ["a"]),
        lambda: objects.remove(["a"]),
    ):
        with s3.fault(kind) as met, pytest.raises(UserError) as raised:
            work()
        message = str(raised.value)
        assert message.startswith(f"s3://bucket/staying-{kind}")
        assert re.search(rf"can't be reached \(.*({reason})", message)
        assert message.endswith("check address, network and credentials, then run the same command again")
        assert "\n" not in message
        assert kind == "expired" or len(met) > 1, "it was not tried again"
    assert objects.read("a") == b"abc"


def test_a_server_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")  # fsspec keeps a connection per set of options
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserError, match=r"^s3://bucket/x: can't be reached \(Could not connect .*; check address"):
            Objects("s3://bucket/x").entries()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_chain_of_addresses_is_refused() -> None:
    with pytest.raises(UserError, match="a chain of addresses can't be used here"):
        Objects("simplecache::s3://bucket/x")
