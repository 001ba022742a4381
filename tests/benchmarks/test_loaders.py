"""The benchmarks of the loader run, and the one of mixing tells good orders from bad ones.

The sizes are tiny, and no rate is looked at.
"""

from tests.benchmarks.scripts import run


def test_mixing() -> None:
    rows = [
        line.rsplit(maxsplit=6) for line in run("mixing.py", "--rows", 3_000_000, "--batch-sizes", 4096).splitlines()
    ]
    table = {words[0]: [float(word.replace(",", "")) for word in words[1:]] for words in rows[2:]}
    expected = table["global shuffle"]
    assert expected[0] == 4096
    assert 0.9 < expected[2] < 1.1
    assert abs(expected[3]) < 0.15
    # In file order a batch has one value of a slow column: the spread is the square root of its rows.
    files = next(value for name, value in table.items() if name.startswith("file order"))
    assert 60 < files[2] < 65
    assert files[3] > 0.99
    assert table["Loader"][2] < 1.2
    assert table["windows of blocks from anywhere"][2] > 2


def test_the_loader() -> None:
    found = run("loader.py", "--rows", 16_000, "--days", 2, "--batch-size", 512, "--repeats", 1).splitlines()
    kinds = [
        "Loader, in order",
        "Loader, shuffled",
        "Loader, shuffled, no thread",
        "Loader, lists",
        "TorchRec, in order",
    ]
    assert "16,000 rows, batch 512" in found[0]
    assert [line.startswith(kind) for kind, line in zip(kinds, found[1:], strict=True)] == [True] * 5
