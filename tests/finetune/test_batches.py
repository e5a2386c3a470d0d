"""Batches hold every example once an epoch, and any of them can be made again by itself."""

import jax
import numpy as np
import pytest

from gptoss_jax.errors import DataError
from gptoss_jax.finetune.batches import Batch, Batches
from gptoss_jax.finetune.data import Example
from gptoss_jax.harmony.tokens import END, RETURN


def make(length, line):
    """An example whose ids tell its line and place, the second half of them trained."""
    ids = np.arange(length, dtype=np.int32) + 100 * line
    return Example(ids, np.arange(length) >= length // 2, line)


LENGTHS = [4, 9, 6, 3, 11, 5, 8, 7, 2, 10, 6]
EXAMPLES = [make(length, line) for line, length in enumerate(LENGTHS, 1)]


def batches(examples=EXAMPLES, **settings):
    return Batches(examples, **{"batch_size": 2, "sequence_length": 12, "seed": 7, **settings})


def conversations(batch: Batch):
    """(inputs, targets, weights) of each conversation of a batch, by its segment."""
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max(initial=0) + 1):
            place = row, batch.segments[row] == segment
            length = int(place[1].sum())
            assert batch.positions[place].tolist() == list(range(length))
            assert np.diff(place[1].nonzero()[0]).tolist() == [1] * (length - 1)
            yield batch.tokens[place].tolist(), batch.targets[place].tolist(), batch.weights[place].tolist()


@pytest.mark.parametrize("epoch", [0, 3])
def test_epoch_has_every_example_once(epoch):
    made = batches()
    first = sum(made.steps_per_epoch(earlier) for earlier in range(epoch))
    steps = range(first, first + made.steps_per_epoch(epoch))
    found = sorted(conversation for step in steps for conversation in conversations(made.at(step)))
    assert found == [
        (example.ids[:-1].tolist(), example.ids[1:].tolist(), example.trained[1:].astype(float).tolist())
        for example in EXAMPLES
    ]
    assert [made.epoch_of(step) for step in steps] == [(epoch, index) for index in range(len(steps))]


def test_padding_has_no_segment_and_no_weight():
    made = batches(EXAMPLES[:3])
    assert made.steps_per_epoch(0) == 1
    batch = made.at(0)
    assert {array.shape for array in jax.tree.leaves(batch)} == {(2, 12)}
    assert batch.segments[:, -1].max() == 0
    assert batch.weights[batch.segments == 0].sum() == 0
    lonely = batches(EXAMPLES[:1]).at(0)
    assert (lonely.segments[1] == 0).all(), "the last batch of an epoch is filled up with rows of padding"


def test_any_step_is_the_same_in_any_order():
    forward, backward = batches(), batches()
    steps = list(range(12))
    made = {step: forward.at(step) for step in steps}
    for step in reversed(steps):
        jax.tree.map(np.testing.assert_array_equal, backward.at(step), made[step])


def test_order_follows_seed_and_epoch():
    def order(made, epoch):
        first = sum(made.steps_per_epoch(earlier) for earlier in range(epoch))
        return [made.at(first + step).tokens.tolist() for step in range(made.steps_per_epoch(epoch))]

    assert order(batches(), 0) != order(batches(), 1)
    assert order(batches(), 0) != order(batches(seed=8), 0)
    assert order(batches(shuffle=False), 0) == order(batches(shuffle=False), 1)
    assert batches(shuffle=False).at(0).tokens[0, 0] == EXAMPLES[0].ids[0]


def test_answer_in_the_middle_reads_end_and_targets_return():
    example = Example(np.array([1, RETURN, 2, RETURN], np.int32), np.ones(4, bool), 1)
    batch = batches([example]).at(0)
    assert batch.tokens[0, :3].tolist() == [1, END, 2]
    assert batch.targets[0, :3].tolist() == [RETURN, 2, RETURN]


def test_conversation_that_exactly_fits_is_kept_whole():
    batch = batches([make(13, 1)]).at(0)
    assert batch.targets[0].tolist() == list(range(101, 113))


def test_too_long_conversations_are_refused_with_their_lines():
    long = r"2 conversations of over 8 tokens: a.jsonl, lines 5, 10: .* length of 10, or truncate"
    with pytest.raises(DataError, match=long):
        batches(sequence_length=8, source="a.jsonl")
    long = [make(30, line) for line in range(1, 15)]
    with pytest.raises(DataError, match="lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4 more"):
        batches(long)


def test_truncation_cuts_the_end_and_refuses_to_cut_all_that_is_trained():
    cut = batches([make(16, 1)], truncate=True).at(0)
    assert cut.targets[0].tolist() == list(range(101, 113))
    assert cut.weights[0].sum() == 5
    untrained = "1 conversations have nothing to train on in their first 12 tokens: a.jsonl, line 2:"
    with pytest.raises(DataError, match=untrained):
        batches([make(16, 1), make(40, 2)], truncate=True, source="a.jsonl")


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="no examples"):
        batches([])
