"""Requests to stop and bad losses, exchanged after steps: at each step, or at each N-th."""

from unittest import mock

import pytest
import torch.distributed as dist

from tests.support.ranks import one_rank
from torchrec_deepfm.distributed.step_sync import Control

SIGTERM = 15


@pytest.mark.parametrize(("every", "exchanges", "seen"), [(1, 12, 6), (4, 3, 12)])
def test_a_request_is_seen_at_the_exchange_after_the_next(every: int, exchanges: int, seen: int) -> None:
    with one_rank():
        control = Control(60.0, every=every)
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as called:
            found = [control.after_step(step, SIGTERM if step >= 5 else 0, None) for step in range(1, 13)]
    assert called.call_count == exchanges
    assert found.index((SIGTERM, None)) + 1 == seen
    assert set(found[: seen - 1]) == {(0, None)}


def test_the_first_bad_step_is_seen() -> None:
    with one_rank():
        control = Control(60.0, every=4)
        found = [control.after_step(step, 0, 3 if step >= 3 else None) for step in range(1, 9)]
        assert control.now(0, 3) == (0, 3)
    assert found == [(0, None)] * 7 + [(0, 3)]
