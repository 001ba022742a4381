"""Every row once, wherever an epoch is interrupted and on however many ranks it resumes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data.batches import real_rows, rows_of
from torchrec_deepfm.data.loader.loader import Loader
from torchrec_deepfm.errors import UserError


def test_the_position_counts_the_rows_of_all_ranks(data):
    loader = Loader(data, "train", batch_size=10, rank=1, world_size=2, shuffle=True, seed=3, prefetch=2)
    assert len(loader) == loader.steps_left == 7
    state = {"version": 1, "epoch": 0, "row": 0, "seed": 3, "shuffle": True, "rows": 123}
    assert loader.state_dict() == state
    batches = iter(loader)
    for step in range(1, 8):
        next(batches)
        row = min(step * 20, 123)
        assert loader.state_dict() == loader.position(step) == {**state, "row": row}
    loader.set_epoch(4)
    assert loader.state_dict() == {**state, "epoch": 4}
    with pytest.raises(IndexError):
        loader.position(8)


def test_a_resumed_loader_yields_the_next_batches(data, small_blocks):
    def loader():
        return Loader(data, "train", batch_size=10, shuffle=True, seed=2)

    one = loader()
    one.set_epoch(3)
    whole = real_rows(one)
    batches = iter(one)
    for _ in range(5):
        next(batches)
    two = loader()
    two.load_state_dict(one.state_dict())
    assert (len(two), two.steps_left, two.valid_rows(7), two.valid_rows(6)) == (13, 8, 3, 10)
    two.set_epoch(3)  # what a training loop calls first
    assert real_rows(two) == whole[5:] == real_rows(two)
    assert rows_of(two.batch(2)) == whole[7]
    assert two.state_dict() == {**one.state_dict(), "row": 123}
    two.set_epoch(4)
    one.set_epoch(4)
    assert real_rows(two) == real_rows(one)
    assert (len(two), two.steps_left) == (13, 13)


def test_an_epoch_is_done_after_its_last_step(data):
    """What drop_last leaves out is not caught up on by a loader that would have room for it."""
    loader = Loader(data, "train", batch_size=25, world_size=2, drop_last=True)
    assert [loader.position(step)["row"] for step in range(3)] == [0, 50, 123]
    small = Loader(data, "train", batch_size=5, drop_last=True)
    small.load_state_dict(loader.position(2))
    assert (small.steps_left, list(small)) == (0, [])
    small.load_state_dict(loader.position(1))
    assert small.steps_left == 14
    assert [rows_of(batch) for batch in small] == [list(range(50 + 5 * i, 55 + 5 * i)) for i in range(14)]


@settings(max_examples=60, deadline=None)
@given(
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 3),
    legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=5),
    prefetch=st.integers(0, 2),
)
def test_every_row_once_across_ranks_and_resumes(data, shuffle, drop_last, seed, legs, prefetch):
    """Legs of (ranks, batch size, steps); the last one goes to the end of the epoch. No row twice, none left out."""
    seen: list[int] = []
    state = None
    for number_of_leg, (world_size, batch_size, steps) in enumerate(legs):
        loaders = [
            Loader(
                data,
                "train",
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                seed=seed,
                drop_last=drop_last,
                prefetch=prefetch,
            )
            for rank in range(world_size)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        steps_left = {loader.steps_left for loader in loaders}
        assert len(steps_left) == 1
        taken = steps_left.pop() if number_of_leg == len(legs) - 1 else min(steps, loaders[0].steps_left)
        for loader in loaders:
            batches = iter(loader)
            for step in range(taken):
                seen += rows_of(next(batches))[: loader.valid_rows(step)]
        assert len({str(loader.state_dict()) for loader in loaders}) == 1
        state = loaders[0].state_dict()
        if drop_last and state["row"] == 123:
            break
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(range(123))
    left_out = legs[-1][0] * legs[-1][1] - 1 if drop_last else 0
    if not drop_last or state["row"] < 123 or number_of_leg == len(legs) - 1:
        assert len(seen) >= 123 - left_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 122}, "state of the loader: rows was 122, now it is 123; resume with the same data and options"),
        ({"seed": 1}, "state of the loader: seed was 1, now it is 0; resume with the same data and options"),
        (
            {"shuffle": True},
            "state of the loader: shuffle was True, now it is False; resume with",
        ),
        ({"version": 2}, "state of the loader: version 2, this version reads 1; use the version that wrote it"),
        ({"row": 124}, "state of the loader: row 124 of epoch 0 does not exist; start the epoch from its beginning"),
        ({"row": -1}, "state of the loader: row -1 of epoch 0 does not exist"),
        ({"epoch": -1}, "state of the loader: row 0 of epoch -1 does not exist"),
        ({"row": "7"}, "state of the loader: damaged ({"),
        ({"row": None}, "state of the loader: damaged ({"),
        ({"row": True}, "state of the loader: damaged ({"),
    ],
)
def test_states_that_do_not_fit(data, change, message):
    loader = Loader(data, "train", batch_size=10)
    with pytest.raises(UserError) as caught:
        loader.load_state_dict({**loader.state_dict(), **change})
    assert str(caught.value).startswith(message)
    assert loader.steps_left == 13
