"""Every conversation is in one row, no row is too long, and little of it is padding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.finetune.packing import pack


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 30))
def test_rows_hold_each_conversation_once_and_fit(lengths, sequence_length):
    rows = pack(lengths, sequence_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= sequence_length for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_conversation_goes_where_least_room_is_left():
    assert pack([5, 7, 3, 1], 8) == [[0, 2], [1, 3]]
    assert pack([5, 7, 1, 3], 8) == [[0, 3], [1, 2]]


def test_rows_are_nearly_full_on_lengths_of_real_chats():
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.2, 20_000).clip(20, 2048).astype(int).tolist()
    rows = pack(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.99
