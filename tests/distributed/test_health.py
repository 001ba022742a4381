"""When a rank counts as stalled: the pace of its own steps decides. Real stalls are in tests/faults."""

import pytest

from tests.support.ranks import one_rank
from torchrec_deepfm.distributed import health


def test_the_pace_of_the_steps_decides_how_long_one_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(health.time, "monotonic", lambda: clock)
    with one_rank():
        heartbeat = health.Heartbeat(120.0)

    def after(seconds: float, phase: str, step: int) -> float:
        nonlocal clock
        clock += seconds
        heartbeat.at(phase, step)
        return heartbeat._allowed()

    assert after(500, "training", 1) == 1800, "no step is known yet"
    assert after(1, "reading data", 1) == 1800
    assert after(2, "training", 2) == 120, "20 times 3 seconds are less than two minutes"
    assert after(30, "training", 3) == 600
    assert after(1, "training", 4) == 600, "the slowest one counts"
    assert after(1, "evaluation", 4) == 1800
    assert after(900, "training", 5) == 600, "an evaluation is not part of a step"
    assert after(200, "training", 6) == 1800, "never longer than anything else"
    assert health.longest_wait(4000.0) == 4000


def beat(phase: str, step: int) -> dict[str, object]:
    return {"phase": phase, "step": step}


@pytest.mark.parametrize(
    ("beats", "behind"),
    [
        ([beat("training", 9), beat("training", 8)], [1]),
        ([beat("training", 9), beat("checkpoint", 8), beat("training", 9)], [1]),
        ([beat("training", 8), beat("checkpoint", 8)], [0]),  # a checkpoint follows upon its step
        ([beat("training", 8), beat("reading data", 8)], [1]),
        ([beat("training", 8), beat("training", 8)], []),
        ([beat("reading data", 8), beat("reading data", 8)], []),
    ],
)
def test_who_keeps_the_others_waiting(beats: list[dict[str, object]], behind: list[int]) -> None:
    assert health._behind(beats) == behind
