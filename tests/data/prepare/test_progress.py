"""The progress that prepare prints, on a terminal and elsewhere."""

import pytest

from torchrec_deepfm.data.prepare import progress
from torchrec_deepfm.data.prepare.progress import Phase


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_now_and_then(clock, capsys):
    lines = []
    with Phase("read", 100.0, done=20.0, report=lines.append) as phase:
        for _ in range(8):
            clock[0] += 10
            phase.add(5.0, 1000)
    # Every 30 s: 35 of 100 done, 15 of them in 30 s, so that 65 take 130 s more; 3,000 rows in 30 s.
    assert lines == ["read 35%, 100 rows/s, 02:10 left", "read 50%, 100 rows/s, 01:40 left"]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    lines = []
    with Phase("encode", 10.0, report=lines.append) as phase:
        phase._started -= 2.0
        phase._bar.mininterval = 0
        phase.add(5.0, 4000)
    shown = capsys.readouterr().err
    assert "encode  50%|" in shown
    assert "rows/s [" in shown
    assert " left]" in shown
    assert lines == []


def test_silence_where_nobody_listens(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Phase("count", 2.0, report=None) as phase:
        phase.add(1.0, 0)
    assert capsys.readouterr().err == ""
